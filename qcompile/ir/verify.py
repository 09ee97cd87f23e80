"""What every program must satisfy, as a table of rules checked after every pass.

Each rule is a function that yields one message for each violation. The table is printed in docs/ir.md.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.errors import VerifyError
from qcompile.ir.program import Program
from qcompile.ir.text import target_name
from qcompile.ir.types import dim_expr


@dataclass(frozen=True)
class Rule:
    """One invariant of the IR."""

    name: str
    says: str
    check: Callable[[Program], Iterator[str]]


RULES: list[Rule] = []


def rule(name: str, says: str) -> Callable[[Callable[[Program], Iterator[str]]], Callable[[Program], Iterator[str]]]:
    """Add a check to the table."""

    def add(check: Callable[[Program], Iterator[str]]) -> Callable[[Program], Iterator[str]]:
        RULES.append(Rule(name, says, check))
        return check

    return add


def verify(program: Program) -> None:
    """Raise `VerifyError` with the first violated rule, the message, and the lines around the node."""
    import qcompile.ops  # noqa: F401  registers the operators that rules speak of

    for entry in RULES:
        for message in entry.check(program):
            raise VerifyError(f"{message} (rule {entry.name!r}: {entry.says}; see docs/ir.md#rules)")


@rule("structure", "the graph has placeholders, calls and one output, in topological order")
def _structure(program: Program) -> Iterator[str]:
    seen: set[fx.Node] = set()
    stage = 0  # placeholders, calls, output
    for node in program.graph.nodes:
        order = {"placeholder": 0, "call_function": 1, "output": 2}.get(node.op)
        if order is None:
            yield f"{node.format_node()}: op {node.op!r} is not in the IR"
            return
        if order < stage or (order == 2 and stage == 2):
            yield f"{node.name}: a {node.op} may not stand after {['placeholders', 'calls', 'the output'][stage]}"
        stage = order
        for source in node.all_input_nodes:
            if source not in seen:
                yield f"{node.name} reads {source.name} before it is computed"
        seen.add(node)
    if stage != 2:
        yield "the graph returns nothing"


@rule("weights-first", "weight placeholders stand before inputs")
def _weights_first(program: Program) -> Iterator[str]:
    inputs_began = False
    for node in program.placeholders:
        if "weight" not in node.meta:
            inputs_began = True
        elif inputs_began:
            yield f"weight {node.name} stands after an input"


@rule("operators", "calls are operator overloads, arithmetic on symbolic sizes, or getitem")
def _operators(program: Program) -> Iterator[str]:
    for node in program.nodes:
        try:
            target_name(node.target)
        except VerifyError:
            yield f"{node.name} calls {node.target}, which is no operator"


@rule("functional", "no operator changes a tensor in place")
def _functional(program: Program) -> Iterator[str]:
    for node in program.nodes:
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            yield f"{node.name} calls {node.target}, which writes to its argument"


@rule("values", "every node knows its shape and dtype")
def _values(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            yield f"{node.name} has no value; call program.infer(node) or program.refresh()"


@rule("bound", "every weight is in the store, with the declared shape and dtype, under one placeholder")
def _bound(program: Program) -> Iterator[str]:
    seen: dict[str, str] = {}
    for node in program.weight_nodes:
        key, fake = program.key(node), node.meta["val"]
        if key not in program.weights:
            yield f"{node.name} reads weight {key!r}, which is not in the store"
            continue
        if key in seen:
            yield f"weight {key!r} has two placeholders, {seen[key]} and {node.name}"
        seen[key] = node.name
        shape, dtype = program.weights.meta(key)
        if tuple(fake.shape) != shape or fake.dtype != dtype:
            yield f"weight {key!r} is {dtype}{list(shape)} in the store, {program.type_of(node)} in the graph"


@rule("named-outputs", "outputs have distinct names, as many as are returned")
def _named_outputs(program: Program) -> Iterator[str]:
    returned = program.output_node.args[0]
    if not isinstance(returned, tuple) or len(returned) != len(program.output_names):
        yield f"{len(program.output_names)} outputs are named, returned is {returned}"
    if len(set(program.output_names)) != len(program.output_names):
        yield f"output names {list(program.output_names)} are not distinct"


@rule("alive", "every call is read by another or returned")
def _alive(program: Program) -> Iterator[str]:
    for node in program.nodes:
        if not node.users and not (isinstance(node.target, OpOverload) and node.target._schema.is_mutable):
            yield f"{node.name} is read by nothing; call program.refresh()"


@rule("getitem", "getitem takes a constant index into a node that returns a tuple")
def _getitem(program: Program) -> Iterator[str]:
    for node in program.calls(operator.getitem):
        source, index = node.args
        if not isinstance(source, fx.Node) or not isinstance(source.meta["val"], (tuple, list)):
            yield f"{node.name} indexes {source}, which is no tuple"
        elif not isinstance(index, int) or not 0 <= index < len(source.meta["val"]):
            yield f"{node.name} takes item {index} of {len(source.meta['val'])}"


@rule(
    "codes-decoded",
    "what quantize makes is read by dequantize or a target's own operators, or moved or packed by shape and bit "
    "operators, never computed with",
)
def _codes_decoded(program: Program) -> Iterator[str]:
    for node in program.calls(torch.ops.qcompile.quantize.default):
        for user in _through_moves(node):
            if user.op != "output" and not _takes_codes(user):
                yield f"codes {node.name} are read by {user.name} ({user.target}), which is not dequantize"


def _takes_codes(node: fx.Node) -> bool:
    """dequantize, and operators that backends define: their namespaces are called ``qcompile_…``."""
    return node.target is torch.ops.qcompile.dequantize.default or (
        isinstance(node.target, OpOverload) and node.target.namespace.startswith("qcompile_")
    )


@rule("codes-made", "what dequantize reads is codes: from quantize, from a weight of integer type, or an input")
def _codes_made(program: Program) -> Iterator[str]:
    for node in program.calls(torch.ops.qcompile.dequantize.default):
        codes = program.arg(node, "codes")
        if codes.meta["val"].dtype.is_floating_point and codes.meta["val"].dtype.itemsize > 1:
            yield f"{node.name} decodes {codes.name}, which is {program.type_of(codes)} and no codes"


@rule("blocks-divide", "a scale has its tensor's rank, and each of its sizes divides the tensor's")
def _blocks_divide(program: Program) -> Iterator[str]:
    for node in program.calls(torch.ops.qcompile.quantize.default, torch.ops.qcompile.dequantize.default):
        tensor = node.args[0]
        scale = program.arg(node, "scale")
        shape, blocks = _shape(tensor), _shape(scale)
        if len(shape) != len(blocks):
            yield f"{node.name}: scale {scale.name} has rank {len(blocks)}, its tensor {len(shape)}"
            continue
        for size, count in zip(shape, blocks, strict=True):
            if isinstance(size, int) and isinstance(count, int) and (count == 0 or size % count):
                yield f"{node.name}: scale {scale.name} has {count} blocks along an axis of {size}"


@rule("pair-agrees", "a dequantize that decodes a quantize has the same spec and parameters")
def _pair_agrees(program: Program) -> Iterator[str]:
    for node in program.calls(torch.ops.qcompile.dequantize.default):
        source = program.arg(node, "codes")
        if isinstance(source, fx.Node) and source.target is torch.ops.qcompile.quantize.default:
            for name in ("spec", "scale", "zero_point", "outer"):
                if program.arg(node, name) != program.arg(source, name):
                    yield f"{node.name} decodes {source.name} with another {name}"


def _shape(node: object) -> list[object]:
    value = node.meta["val"] if isinstance(node, fx.Node) else None
    return [dim_expr(d) for d in value.shape] if isinstance(value, Tensor) else []


_MOVES = {
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.cat.default,
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.select.int,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim,
    torch.ops.aten.expand.default,
    # several codes in a byte, and back
    torch.ops.aten.to.dtype,
    torch.ops.aten.bitwise_and.Scalar,
    torch.ops.aten.bitwise_or.Tensor,
    torch.ops.aten.bitwise_xor.Scalar,
    torch.ops.aten.bitwise_left_shift.Tensor_Scalar,
    torch.ops.aten.bitwise_right_shift.Tensor_Scalar,
    torch.ops.aten.sub.Scalar,
}


def _through_moves(node: fx.Node) -> Iterator[fx.Node]:
    """Readers of `node`, looking through operators that only move or pack elements."""
    for user in node.users:
        if user.target in _MOVES:
            yield from _through_moves(user)
        else:
            yield user
