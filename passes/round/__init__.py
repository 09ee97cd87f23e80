"""Passes that round weights by what it does to a layer's outputs; they share one run over the calibration data."""
