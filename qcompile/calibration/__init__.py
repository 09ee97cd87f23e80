"""Calibration: a model is run segment by segment over the data, and passes settle each segment as it comes."""
