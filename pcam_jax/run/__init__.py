"""The run folder: configuration, checkpoints, history and what was chosen afterwards."""
