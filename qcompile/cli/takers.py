"""Which targets take a spec, asked of the targets themselves: what they say about a tiny program that uses it."""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx

from qcompile.backend_base import Backend, all_backends, make_backend
from qcompile.errors import QCompileError, SpecError
from qcompile.ir.program import Program
from qcompile.numerics.families import shape_for
from qcompile.numerics.params import choose_qparams
from qcompile.numerics.spec import QuantSpec
from qcompile.passes.quantize.insert_qdq import quantize_value
from qcompile.passes.quantize.rtn import RTN
from qcompile.passes.quantize.sites import find_qdq, replace_by_weight

Use: TypeAlias = Literal["weight", "activation"]

_TINY = (16, 64)
_LINEAR = """\
def main(x: f32[batch, sequence, {columns}], *, w: f32[{rows}, {columns}]):
    y = aten.linear.default(x, w)
    return {{"y": y}}"""
_STACK = """\
def main(x: f32[{stack}, batch, {columns}], *, w: f32[{stack}, {rows}, {columns}]):
    turned = aten.transpose.int(w, 1, 2)
    y = aten.bmm.default(x, turned)
    return {{"y": y}}"""


def uses(spec: QuantSpec) -> tuple[Use, ...]:
    """What a spec can be for: a cast without scales is for both."""
    if spec.when is None:
        return ("weight",)
    return ("weight", "activation") if spec.when == "no_scale" else ("activation",)


@cache
def reasons(spec: QuantSpec, use: Use) -> dict[str, tuple[str, ...]]:
    """By target, why it does not take `spec` for the weight of a linear layer, rounded, or for its input, whose batch
    and sequence vary; nothing where it does.
    """
    try:
        program = _with_weight(spec) if use == "weight" else _with_activation(spec)
    except SpecError as error:
        return dict.fromkeys(_backends(), (str(error).removeprefix(f"{spec}: "),))
    found = {}
    for name, backend in _backends().items():
        try:
            said = [obstacle.reason.removeprefix(f"{spec}: ") for obstacle in backend.obstacles(program)]
        except QCompileError as error:  # a package that it needs is not installed
            said = [str(error)]
        found[name] = tuple(dict.fromkeys(said))
    return found


def takers(spec: QuantSpec) -> tuple[str, ...]:
    """The targets that take `spec`, for whatever it is for."""
    asked = [reasons(spec, use) for use in uses(spec)]
    return tuple(name for name in _backends() if any(not told[name] for told in asked))


@cache
def _backends() -> dict[str, Backend]:
    """Every target, with its default options."""
    return {name: make_backend(name) for name in all_backends()}


def _with_weight(spec: QuantSpec) -> Program:
    shape = shape_for(spec, _TINY)
    program = _program(shape)
    program.weights["w"] = _values(shape)
    (weight,) = program.weight_nodes
    _quantize(program, weight, spec)
    RTN().run(program)
    return program


def _with_activation(spec: QuantSpec) -> Program:
    rows, columns = shape_for(spec, _TINY)[-2:]
    program = _program((16, columns))
    (x,) = program.inputs
    _quantize(program, x, spec)
    if spec.when == "static":
        (place,), stored = find_qdq(program), choose_qparams(_values((2, rows, columns)), spec).stored()
        items = place.items
        for index, tensor in enumerate(stored):
            replace_by_weight(program, items[index], f"x.{index}", tensor, "")
        program.graph.erase_node(place.params)
    program.refresh()
    return program


def _quantize(program: Program, value: fx.Node, spec: QuantSpec) -> None:
    (reader,) = value.users
    reader.replace_input_with(value, quantize_value(program, value, spec, reader, ""))
    program.refresh()


def _program(shape: tuple[int, ...]) -> Program:
    return _parsed(shape).clone()


@cache
def _parsed(shape: tuple[int, ...]) -> Program:
    """One product with a weight of `shape`, `[out, in]` or `[stack, out, in]`."""
    rows, columns = shape[-2:]
    if len(shape) > 2:
        return Program.parse(_STACK.format(stack=shape[0], rows=rows, columns=columns))
    return Program.parse(_LINEAR.format(rows=rows, columns=columns))


def _values(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
