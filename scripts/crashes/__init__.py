"""Training that is watched, and ended at chosen moments."""
