"""Figures and documents made of results."""
