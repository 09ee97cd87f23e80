"""Permutations and other changes of the order of channels."""
