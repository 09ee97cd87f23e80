"""Give an output head its own copy of the table that it shares with the embedding.

    x = embedding(ids, E)                      x = embedding(ids, E)
    logits = linear(h, E)             ⟶        logits = linear(h, E.untied)

Exact to the bit. Passes that want different things of the two untie them on their own; this one does it beforehand,
for a head that is to be quantized in another way than the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from qcompile.ir.contractions import find_contractions, find_embeddings
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.spaces.apply import part_weight


@register
@dataclass(frozen=True)
class UntieEmbeddings(Pass):
    """Part every table that is looked up and multiplied with."""

    name: ClassVar[str] = "untie-embeddings"

    def run(self, program: Program) -> Report:
        """Part them; the report says how many bytes each copy takes, or that there is nothing to part."""
        report = Report()
        tables = {found.weight for found in find_embeddings(program)}
        heads: dict[fx.Node, list[fx.Node]] = {}
        for product in find_contractions(program):
            if product.weight in tables:
                heads.setdefault(product.weight, []).append(product.node)
        for table, readers in heads.items():
            copy = part_weight(program, table, readers, report)
            size = program.weights.nbytes(program.key(copy))
            report.measure(program.key(copy), {"bytes": float(size)})
            for reader in readers:
                report.rewrote(reader, f"reads its own {program.key(copy)!r}, {size} bytes more")
        if not heads:
            report.note("no table is both an embedding and the weight of a product: nothing to untie")
        return report
