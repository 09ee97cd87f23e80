"""Products that read one value with weights of one format become one: q, k and v; gate and up.

    linear(x, Wq), linear(x, Wk), linear(x, Wv)   ⟶   split(weight_only(x, [Wq; Wk; Wv]), [Nq, Nk, Nv])

Exact: each output is computed from the same numbers. A launch more costs a few microseconds, and a narrow weight (k, v)
alone leaves most of a chip idle.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompile.backends.triton.matching import Site


def merge(sites: Sequence[Site], enabled: bool = True) -> list[list[Site]]:
    """Sites in groups, each in program order; what cannot be merged is alone."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        groups.setdefault(_key(site) if enabled and _mergeable(site) else id(site), []).append(site)
    return list(groups.values())


def _key(site: Site) -> object:
    """Equal for products that may become one."""
    weight, product = site.product.weight, site.product
    dtypes = tuple(None if part is None else part.meta["val"].dtype for part in (weight.scale, weight.zero))
    return site.product.x, site.kind, str(site.form), dtypes, product.bias is None, product.node.meta["val"].dtype


def _mergeable(site: Site) -> bool:
    """A global scale belongs to one weight, and so does a scale for all outputs; blocks of outputs must be whole."""
    return not site.form.outer and site.form.rows != 0 and not site.form.rows > 1
