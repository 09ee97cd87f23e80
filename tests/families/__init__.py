"""Tiny random models of many transformers families, captured: what every function-preserving pass must keep exact."""
