"""Activation outliers: put them into a model, for studies of the passes that take them out."""
