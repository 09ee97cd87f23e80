"""Rotations: orthogonal transformations, folded into weights or computed online."""
