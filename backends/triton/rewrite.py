"""From a program to the graph of a bundle: quantized products become operators on packed weights.

Whatever no kernel takes stays as it is and runs in torch: other operators, and what is quantized in ways that kernels do
not know (it is named in the notes, with the reason).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from qcompile.backends.onnx_qcdq.rewriting import Rewriter
from qcompile.backends.triton.matching import Left, Site, match_sites
from qcompile.backends.triton.merging import merge
from qcompile.backends.triton.ops.weight_only import WEIGHT_ONLY
from qcompile.backends.triton.storing import PackedWeight, outputs_of, store
from qcompile.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Rewritten:
    """The graph of a bundle, where the codes of each weight lie, and what to say about it."""

    program: Program
    packed: tuple[PackedWeight, ...]
    notes: tuple[str, ...]


def rewrite(program: Program, merged: bool = True) -> Rewritten:
    """Rewrite a copy of `program`; see the file's first lines. Weights are read when they are written."""
    rewriter, index = Rewriter(program), list[PackedWeight]()
    sites, left = match_sites(rewriter.program)
    groups = merge(sites, merged)
    for group in groups:
        lower_products(rewriter, group, index)
    rewriter.program.refresh()
    return Rewritten(rewriter.program, tuple(index), tuple(_notes(sites, groups, left)))


def lower_products(rewriter: Rewriter, sites: Sequence[Site], index: list[PackedWeight]) -> None:
    """Replace products that become one operator."""
    first, operands = sites[0], store(rewriter, sites, index)
    node = first.product.node
    value = rewriter.call(node, WEIGHT_ONLY, first.x, *operands.arguments())
    share(rewriter, sites, value)


def share(rewriter: Rewriter, sites: Sequence[Site], value: fx.Node) -> None:
    """Let the readers of each product read its part of `value`."""
    if len(sites) == 1:
        rewriter.replace(sites[0].product.node, value)
        return
    node = sites[0].product.node
    sizes = [outputs_of(site) for site in sites]
    split = rewriter.call(node, aten.split_with_sizes.default, value, sizes, -1)
    parts = [rewriter.call(node, operator.getitem, split, i) for i in range(len(sites))]
    for site, part in zip(sites, parts, strict=True):
        rewriter.replace(site.product.node, part)


def _notes(sites: Sequence[Site], groups: Sequence[Sequence[Site]], left: Sequence[Left]) -> list[str]:
    kinds = Counter(site.kind for site in sites)
    told = [f"{len(sites)} products with packed weights in {len(groups)} operators"]
    told += [f"{count} of them {kind}" for kind, count in kinds.items()] if len(kinds) > 1 else []
    reasons = Counter(item.reason for item in left)
    told += [f"{count} products with quantized weights stay in torch: {reason}" for reason, count in reasons.items()]
    return told
