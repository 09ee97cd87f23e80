"""Quantize queries, keys, values and weights of attention. Not exact: from here on they are rounded.

    context = softmax(q · kᵀ …) · v   ⟶   context = softmax(q′ · k′ᵀ …)′ · v′        x′ = x through quantize, dequantize

q, k and v are rounded where attention reads them, after rotary embeddings and norms, but before keys and values are
repeated for groups of queries: once for all that read them with one spec. Keys and values are those of all tokens, the
cached ones too; a value that is quantized already, as a quantized cache is, stays as it is. To round the weights, a
fused attention is spelled out first, and only then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile.ir.attention import Attention, Operand, survey_attention
from qcompile.ir.contractions import Obstacle
from qcompile.ir.moves import let_reshape, moved, rank
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.quantize.fit_value import fit_value
from qcompile.passes.quantize.insert_qdq import quantize_value
from qcompile.passes.quantize.spell_attention import spell_out, why_not
from qcompile.recipe.specs import activation_spec

aten = torch.ops.aten
_DEQUANTIZE = torch.ops.qcompile.dequantize.default


@register
@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Round what attention multiplies.

    Args:
        q, k, v: specs, static or dynamic, of ``[batch, heads, tokens, features]``; null leaves a value float.
        softmax: spec of the weights ``[batch, heads, queries, keys]``, which lie between 0 and 1: unsigned elements
            waste no code. Groups cannot run along keys, whose number is known at run time only.

    Raises RecipeError for a spec that is neither static nor dynamic, and for groups that do not divide the features.
    """

    name: ClassVar[str] = "quantize-attention"
    preserves_function: ClassVar[bool] = False

    q: str | None = None
    k: str | None = None
    v: str | None = None
    softmax: str | None = None

    def run(self, program: Program) -> Report:
        report = Report()
        specs = {
            name: activation_spec(getattr(self, name), f"{self.name}, {name}") for name in ("q", "k", "v", "softmax")
        }
        survey = survey_attention(program)
        for found in survey:
            if isinstance(found, Obstacle):
                report.skip(found.node, found.reason)
        attentions = [found for found in survey if isinstance(found, Attention)]
        if not attentions:
            report.note("the program has no attention")
        asked = []
        for found in attentions:
            for name, role in (("q", "query"), ("k", "key"), ("v", "value")):
                if (spec := specs[name]) is not None:
                    asked.append((_called(found, role), getattr(found, role), spec))
        _carry_out(program, _plans(program, asked, report), report)
        if (spec := specs["softmax"]) is not None:
            asked = [(where, operand, spec) for where, operand in _weights(program, attentions, report)]
            _carry_out(program, _plans(program, asked, report), report)
        program.refresh()
        return report


@dataclass(frozen=True)
class _Plan:
    """One value that is rounded, for all that read it."""

    where: str  # module and role
    source: fx.Node
    spec: QuantSpec
    operands: tuple[Operand, ...]


def _called(attention: Attention, role: str) -> str:
    return f"{attention.module}.{role}" if attention.module else role


def _plans(program: Program, asked: Iterable[tuple[str, Operand, QuantSpec]], report: Report) -> list[_Plan]:
    """What is rounded: one plan for a value and a spec. What is not goes into the report."""
    groups: dict[tuple[fx.Node, QuantSpec], list[tuple[str, Operand]]] = {}
    for where, operand, spec in asked:
        if (reason := _obstacle(program, operand.source)) is not None:
            report.skip(where, f"{operand.source.name} {reason}")
            continue
        placed = fit_value(spec, operand.source, operand.features, where)
        groups.setdefault((operand.source, placed), []).append((where, operand))
    return [_Plan(m[0][0], source, spec, tuple(o for _, o in m)) for (source, spec), m in groups.items()]


def _obstacle(program: Program, source: fx.Node) -> str | None:
    if program.is_weight(source):
        return "is a weight, and not quantized as an activation"
    node: fx.Node | None = source
    while node is not None and node.target is not _DEQUANTIZE:
        node = moved(program, node)
    return None if node is None else f"is quantized already: {program.arg(node, 'spec')}"


def _weights(program: Program, attentions: Sequence[Attention], report: Report) -> list[tuple[str, Operand]]:
    """The weights of each attention; those inside a fused one are brought out."""
    named = []
    for found in attentions:
        where = _called(found, "softmax")
        if found.weights is not None:
            named.append((where, found.weights))
        elif (reason := why_not(program, found.context)) is not None:
            report.skip(where, reason)
        else:
            softmax, product = spell_out(program, found.context)
            axes = {"tokens": rank(softmax) - 2, "features": rank(softmax) - 1}
            named.append((where, Operand(softmax, product, "self", None, softmax, (), **axes)))
            report.rewrote(found.module, "spelled out")
    return named


def _carry_out(program: Program, plans: Sequence[_Plan], report: Report) -> None:
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for plan in plans:
        first = min((o.path[0] if o.path else o.reader for o in plan.operands), key=order.__getitem__)
        module, _, role = plan.where.rpartition(".")
        _read(program, plan.operands, quantize_value(program, plan.source, plan.spec, first, module, role))
        report.rewrote(plan.where, f"{plan.source.name}: {plan.spec}")


def _read(program: Program, operands: Sequence[Operand], rounded: fx.Node) -> None:
    """Let `operands`, all of one source, read `rounded`, moved as they are; nothing else is touched."""
    copies = {operands[0].source: rounded}
    for operand in operands:
        for node in operand.path:
            if node not in copies:
                args = fx.map_arg(node.args, lambda n: copies.get(n, n))
                target = aten.reshape.default if node.target is aten.view.default else node.target  # laid out anew
                copies[node] = program.call(target, args, dict(node.kwargs), after=node, name=node.name)  # type: ignore[arg-type]
        let_reshape(program, operand.reader)
        value = copies[operand.node]
        if operand.index is None:
            program.set_arg(operand.reader, operand.argument, value)
        else:
            tensors = list(program.arg(operand.reader, operand.argument))
            tensors[operand.index] = value
            program.set_arg(operand.reader, operand.argument, tensors)
