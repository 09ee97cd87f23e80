"""One module a family of operators; importing this package fills the table."""

from qcompile.spaces.rules import attention, indexing, joining, norms, pointwise, products, reductions, views

__all__ = ["attention", "indexing", "joining", "norms", "pointwise", "products", "reductions", "views"]
