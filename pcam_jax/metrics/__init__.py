"""Figures of merit as plain numpy functions of labels and probabilities."""
