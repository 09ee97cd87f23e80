"""Fold a norm that reads nothing but an embedding into the embedding's table.

    x = embedding(ids, E)
    y = layer_norm(x, γ, β)           ⟶      y = embedding(ids, E′)         E′[v] = layer_norm(E[v], γ, β)

Exact: each row of the table is normalised on its own, in float64, and rounded once. Afterwards the residual stream
starts at a plain table, and rotations may pass. A table that others read too, such as a tied head, is kept for them:
the embedding gets a copy, and the report says what that costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Embedding, find_embeddings
from qcompile.ir.edits import EDITABLE, AlongAxis
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.norm.affine import NORMS, computed, vectors
from qcompile.spaces.apply import part_weight

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class FoldEmbeddingNorm(Pass):
    """Normalise the rows of an embedding's table once, where a norm is all that reads the embedding."""

    name: ClassVar[str] = "fold-embedding-norm"

    def run(self, program: Program) -> Report:
        """Fold; every other norm whose input is made of embeddings alone is reported with the reason."""
        report = Report()
        tables = {found.node: found for found in find_embeddings(program)}
        lookups = _made_of(program, set(tables))
        for norm in program.calls(*NORMS):
            x = program.arg(norm, "input")
            if x not in lookups:
                continue
            reason = _unfit(program, norm, tables.get(x), x)
            if reason is not None:
                report.skip(norm, reason)
                continue
            found = tables[x]
            _fold(program, norm, found, report)
            report.rewrote(norm, f"folded into the rows of {program.key(program.arg(x, 'weight'))!r}")
        if not report.rewritten and not report.skipped:
            report.note("no norm reads an embedding")
        return report


def _made_of(program: Program, lookups: set[fx.Node]) -> set[fx.Node]:
    """Calls that come to what `lookups` give, added up, scaled or moved: no weight stands between."""
    made = set(lookups)
    through = (aten.add.Tensor, aten.mul.Tensor, aten.to.dtype, aten.dropout.default, aten.slice.Tensor)
    for node in program.calls(*through):
        if any(source in made for source in node.all_input_nodes):
            made.add(node)
    return made


def _unfit(program: Program, norm: fx.Node, found: Embedding | None, x: fx.Node) -> str | None:
    if found is None:
        return f"its input {x.name} ({x.target}) is made of embeddings, and is not one by itself"
    others = [user.name for user in x.users if user is not norm]
    if others:
        return f"the embedding {x.name} is also read by {', '.join(others)}"
    if found.path:
        return f"the table of {x.name} is read through {', '.join(step.name for step in found.path)}"
    value = x.meta["val"]
    if list(program.arg(norm, "normalized_shape")) != [value.shape[-1]]:
        return "it normalises more than the features of a row"
    if norm.meta["val"].dtype != value.dtype or value.dtype not in EDITABLE:
        return f"it makes {norm.meta['val'].dtype} of {value.dtype} rows"
    return computed(program, norm)


def _fold(program: Program, norm: fx.Node, found: Embedding, report: Report) -> None:
    normalise = _normaliser(program, norm, found.node.meta["val"].dtype)
    table = program.arg(found.node, "weight")  # parted from other readers by an earlier norm, perhaps
    if len(table.users) > 1:
        table = part_weight(program, table, [found.node], report)
    program.edit_weight(table, AlongAxis(found.axis_features, normalise))
    program.replace(norm, found.node)


def _normaliser(program: Program, norm: fx.Node, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The norm on rows ``[…, features]``, in float64 inside."""
    gain, bias = [
        None if name not in vectors(norm) or (v := program.arg(norm, name)) is None else program.weight(v).double()
        for name in ("weight", "bias")
    ]
    eps = program.arg(norm, "eps")
    if eps is None:
        eps = torch.finfo(dtype).eps
    centred = norm.target is aten.layer_norm.default

    def normalise(rows: Tensor) -> Tensor:
        wide, shape = rows.double(), [rows.shape[-1]]
        if centred:
            done = torch.nn.functional.layer_norm(wide, shape, gain, bias, eps)
        else:
            done = torch.nn.functional.rms_norm(wide, shape, gain, eps)
        return done.to(rows.dtype)

    return normalise
