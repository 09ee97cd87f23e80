"""Normalisation layers: recognise them, fold their affine parts, centre them."""
