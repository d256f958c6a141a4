"""From raw files to batches: readers, the store, splits, order and loader. Never imports jax."""
