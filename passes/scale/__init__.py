"""Diagonal transformations: smoothing, equalization, activation-aware scales."""
