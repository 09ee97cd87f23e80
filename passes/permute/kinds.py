"""What kind of channels a space has: those of the residual stream, of attention's heads, or hidden ones."""

from __future__ import annotations

from typing import Literal

from qcompile.spaces import Space

Kind = Literal["stream", "heads", "hidden"]


def kind_of(space: Space) -> Kind:
    """The kind of a space.

    ``stream``: a norm reads it, or several matrices make it and several read it. ``heads``: a cache holds it,
    attention pairs it, or a product that reads it reads others beside it, as an output projection reads all heads.
    ``hidden``: any other; a product makes it and another reads it whole, as between the layers of an MLP.
    """
    if space.of_kind("norm"):
        return "stream"
    if space.of_kind("state", "query", "key"):
        return "heads"
    if any(p.positions.size != p.use.ids.size or len(p.positions) > 1 for p in space.sinks):
        return "heads"
    made = {p.node for p in space.sources if p.use.weight is not p.node}  # a bias is no product
    return "stream" if len(made) > 1 and len(space.sinks) > 1 else "hidden"
