"""From a trained run to probabilities."""
