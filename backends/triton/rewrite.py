"""From a program to the graph of a bundle: what is quantized becomes operators that read packed weights and codes.

Whatever no kernel takes stays as it is and runs in torch: other operators, and what is quantized in ways that kernels
do not know (it is named in the notes, with the reason).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qcompile.backends.onnx_qcdq.rewriting import Rewriter
from qcompile.backends.triton.attending import lower_attention
from qcompile.backends.triton.fusing import fuse
from qcompile.backends.triton.gathered import lower_experts
from qcompile.backends.triton.matching import Site, match_sites
from qcompile.backends.triton.merging import merge
from qcompile.backends.triton.products import lower_products
from qcompile.backends.triton.storing import PackedWeight
from qcompile.ir.program import Program


@dataclass(frozen=True)
class Rewritten:
    """The graph of a bundle, where the codes of each weight lie, and what to say about it."""

    program: Program
    packed: tuple[PackedWeight, ...]
    notes: tuple[str, ...]


def rewrite(program: Program, merged: bool = True, experts: bool = True) -> Rewritten:
    """Rewrite a copy of `program`; see the file's first lines. Weights are read when they are written.

    Args:
        merged: make products that read one value one product.  experts: pack experts that are gathered.
    """
    rewriter, index = Rewriter(program), list[PackedWeight]()
    sites, left = match_sites(rewriter.program)
    groups = merge(sites, merged)
    for group in groups:
        lower_products(rewriter, group, index)
    gathered, more = lower_experts(rewriter, index) if experts else (0, [])
    attention, reasons = lower_attention(rewriter)
    rewriter.program.refresh()
    fused = fuse(rewriter)
    rewriter.program.refresh()
    notes = [*_products(sites, groups)]
    notes += [f"{gathered} products of packed experts"] if gathered else []
    notes += [f"attention reads codes in {attention} places"] if attention else []
    notes += [f"{count} {what} in kernels" for what, count in fused.items()]
    notes += _counted("products with quantized weights run in torch", (item.reason for item in [*left, *more]))
    notes += _counted("activations are simulated in torch", (site.reason for site in sites if site.reason))
    notes += _counted("attentions over a quantized cache run in torch", reasons)
    return Rewritten(rewriter.program, tuple(index), tuple(notes))


def _products(sites: Sequence[Site], groups: Sequence[Sequence[Site]]) -> Iterator[str]:
    kinds = Counter({"weight_only": "float", "int8": "int8", "fp8": "fp8", "mx": "microscaling"}[s.kind] for s in sites)
    with_what = ", ".join(f"{count} with {kind} activations" for kind, count in kinds.items())
    yield f"{len(sites)} products with packed weights in {len(groups)} operators" + (f": {with_what}" * bool(sites))


def _counted(what: str, reasons: Iterable[str]) -> list[str]:
    return [f"{count} {what}: {reason}" for reason, count in Counter(reasons).items()]
