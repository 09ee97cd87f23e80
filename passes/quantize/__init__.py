"""Quantized values in the graph: where they are put, how their scales are found, how weights become codes."""
