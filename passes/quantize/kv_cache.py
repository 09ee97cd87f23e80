"""Keep keys and values of the cache as codes. Not exact: from here on attention reads them rounded.

    all = cat([past, new], 2)        ⟶   p = choose_qparams(new, spec); s, z = p; c = quantize(new, s, z)
    return present: all                  codes = cat([past, c], 2); scales = cat([past_scale, s], 2); …
                                         all = dequantize(codes, scales, zero_points)
                                         return present: codes, present_scale: scales, …

Each key and value is rounded once, when it is made. The inputs and outputs ``past_key_values_0_key`` and
``present_0_key`` become codes, packed where several fill a byte (`cache_bits`); behind each follow, where scales are
dynamic, ``…_scale`` and ``…_zero_point``. Static ones are weights, which `calibrate` finds. The order of everything
else stays. Whatever reads the whole cache reads it decoded; whatever reads only the new tokens reads them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile.errors import RecipeError
from qcompile.ir.contractions import short_name
from qcompile.ir.moves import rank
from qcompile.ir.program import Program
from qcompile.ir.state import present_name
from qcompile.ir.types import Dim, dim_expr
from qcompile.numerics.granularity import PerBlock, PerGroup
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.quantize.cache_bits import codes_per_byte, pack, unpack
from qcompile.passes.quantize.fit_value import fit_value
from qcompile.passes.quantize.insert_qdq import quantize_value
from qcompile.recipe.specs import activation_spec

aten = torch.ops.aten

_PAST = re.compile(r"past_key_values_(\w+)_(key|value)")
_TOKENS, _FEATURES = 2, 3  # axes of a cache [batch, heads, tokens, features]


@register
@dataclass(frozen=True)
class QuantizeKVCache(Pass):
    """Store the cache as codes.

    Args:
        keys, values: specs, ``token`` or ``group=N`` dynamic, ``tensor`` or ``channel`` static; null leaves them float.

    Raises RecipeError for a spec whose scales are not known when a token is made, and for groups that do not divide
    the features.
    """

    name: ClassVar[str] = "quantize-kv-cache"
    preserves_function: ClassVar[bool] = False

    keys: str | None = None
    values: str | None = None

    def run(self, program: Program) -> Report:
        report = Report()
        specs = {
            "key": activation_spec(self.keys, f"{self.name}, keys"),
            "value": activation_spec(self.values, f"{self.name}, values"),
        }
        inputs = [(node, match[2]) for node in program.inputs if (match := _PAST.fullmatch(node.name)) is not None]
        if not inputs:
            report.note("the program has no cache: none of its inputs is called past_key_values_…")
        plans = []
        for past, part in inputs:
            if (spec := specs[part]) is None:
                continue
            plan = _plan(program, past, part, spec)
            if isinstance(plan, str):
                report.skip(past.name, plan)
            else:
                plans.append(plan)
        for plan in plans:
            _store(program, plan, report)
        if plans:
            program.calling_convention = None  # inputs and outputs are not those that were exported any more
        if any(plan.spec.when == "static" for plan in plans):
            report.note("until calibrate fixes them, static scales are those of each call alone")
        program.refresh()
        return report


@dataclass(frozen=True)
class _Plan:
    """One tensor of the cache."""

    past: fx.Node
    new: fx.Node
    whole: fx.Node  # cat([past, new], 2)
    trims: tuple[fx.Node, ...]  # slices of it that a sliding window returns, in program order
    spec: QuantSpec
    module: str
    part: str  # key or value

    @property
    def where(self) -> str:
        return f"{self.module}.{self.part}" if self.module else self.past.name

    @property
    def packed(self) -> bool:
        """Whether several codes share a byte."""
        return codes_per_byte(self.spec.bits, int(self.new.meta["val"].shape[_FEATURES])) > 1


def _plan(program: Program, past: fx.Node, part: str, spec: QuantSpec) -> _Plan | str:
    """How a tensor of the cache is stored, or why it is left alone."""
    fits = past.meta["val"].is_floating_point() and rank(past) == 4
    if not fits or not all(isinstance(_size(past, axis), int) for axis in (1, _FEATURES)):
        return f"it is {program.type_of(past)}, not float [batch, heads, tokens, features] of fixed heads and features"
    name = present_name(past.name)
    result = program.outputs.get(name)
    if not isinstance(result, fx.Node):
        return f"the program returns no {name}"
    trims: list[fx.Node] = []
    while result.target is aten.slice.Tensor:
        trims.insert(0, result)
        result = program.arg(result, "self")
        assert isinstance(result, fx.Node)
    if any(_size(trim, axis) != _size(result, axis) for trim in trims for axis in (0, 1, _FEATURES)):
        return f"{name} is only a part of the features or heads"
    tensors: Any = program.arg(result, "tensors") if result.target is aten.cat.default else ()
    if len(tensors) != 2 or tensors[0] is not past or program.arg(result, "dim") % 4 != _TOKENS:
        return f"{name} is {short_name(result)} {result.name}, not the past with new tokens behind it"
    if others := [user for user in past.users if user is not result and user.target is not aten.sym_size.int]:
        return f"{others[0].name} reads the past apart from the new tokens"
    plan = _Plan(past, tensors[1], result, tuple(trims), spec, program.module_of(result), part)
    return replace(plan, spec=_fit(program, plan))


def _size(node: fx.Node, axis: int) -> Dim:
    return dim_expr(node.meta["val"].shape[axis])


def _fit(program: Program, plan: _Plan) -> QuantSpec:
    """The spec, if its scales are known when a token is made and never change; RecipeError otherwise."""
    spec, where = plan.spec, plan.where
    along_tokens = (isinstance(spec.granularity, PerGroup) and spec.granularity.axis % 4 == _TOKENS) or (
        isinstance(spec.granularity, PerBlock) and spec.granularity.rows > 1
    )
    if along_tokens:
        raise RecipeError(
            f"{where}: {spec}: a group of tokens would have to wait for the tokens to come; group along features"
        )
    spec = fit_value(spec, plan.new, _FEATURES, where)
    token = _size(plan.new, 0), _size(plan.new, _TOKENS)
    for param in spec.parameters(plan.new.meta["val"].shape) if spec.when == "dynamic" else ():
        sizes = [dim_expr(size) for size in param.shape]
        if len(sizes) != 4 or (sizes[0], sizes[_TOKENS]) != token:
            raise RecipeError(
                f"{where}: {spec}: its {param.name} belongs to a call and not to a token, so it would change for "
                "tokens that are stored; use token or group=N dynamic, or tensor static"
            )
    return spec


def _store(program: Program, plan: _Plan, report: Report) -> None:
    past, whole, spec = plan.past, plan.whole, plan.spec
    float_bytes = _bytes_per_token([past])
    decoded = quantize_value(program, plan.new, spec, whole, plan.module, plan.part)
    codes, *params = decoded.all_input_nodes
    read = {codes: codes}
    signed, stored = codes.meta["val"].dtype == torch.int8, codes
    if plan.packed:
        stored = pack(program, codes, spec.bits, whole, plan.module)
    shape, value = past.meta["val"].shape, stored.meta["val"]
    past.meta["val"] = program.fake((*shape[:_FEATURES], value.shape[_FEATURES]), value.dtype)
    parts = {past: stored}
    names = [param.name for param in spec.parameters(plan.new.meta["val"].shape)]
    for name, param in zip(names, params, strict=True) if spec.when == "dynamic" else ():
        parts[_new_input(program, list(parts)[-1], f"{past.name}_{name}", param)] = param
    returned = {}
    for node, part in parts.items():
        name = node.name.replace(past.name, f"{plan.part}_cache")
        read[part] = joined = program.call(aten.cat.default, ([node, part], _TOKENS), before=whole, name=name)
        for trim in plan.trims:
            joined = program.call(trim.target, (joined, *trim.args[1:]), dict(trim.kwargs), after=trim)  # type: ignore[arg-type]
        returned[present_name(node.name)] = joined
    if plan.packed:
        read[codes] = unpack(program, read[stored], spec.bits, signed, whole, plan.module)
    decoded.args, decoded.kwargs = fx.map_arg((decoded.args, decoded.kwargs), lambda node: read.get(node, node))
    whole.prepend(decoded)
    program.infer(decoded)
    program.replace(whole, decoded)
    _return(program, present_name(past.name), returned)
    code_bytes = _bytes_per_token(parts)
    report.rewrote(plan.where, f"{spec}: {code_bytes} bytes a token for {float_bytes}")
    report.measure(plan.where, {"bytes_per_token": code_bytes, "float_bytes_per_token": float_bytes})
    if not plan.packed and spec.bits < 8:
        report.note(f"{plan.where}: a byte a code; only 1, 2 and 4 bits that fill the bytes of a row are packed")


def _new_input(program: Program, after: fx.Node, name: str, param: fx.Node) -> fx.Node:
    """An input behind another of the cache, as long as that, for what `param` is of the new tokens."""
    with program.graph.inserting_after(after):
        node = program.graph.create_node("placeholder", name, name=name)
    batch, _, tokens, _ = after.meta["val"].shape
    shape = (batch, param.meta["val"].shape[1], tokens, param.meta["val"].shape[_FEATURES])
    node.meta.update(module="", val=program.fake(shape, param.meta["val"].dtype))
    return node


def _return(program: Program, name: str, instead: Mapping[str, fx.Node]) -> None:
    """Return `instead` where `name` was returned."""
    outputs: list[tuple[str, Any]] = []
    for old, value in program.outputs.items():
        outputs += instead.items() if old == name else [(old, value)]
    program.output_names = tuple(name for name, _ in outputs)
    program.output_node.args = (tuple(value for _, value in outputs),)


def _bytes_per_token(inputs: Iterable[fx.Node]) -> int:
    values = [node.meta["val"] for node in inputs]
    return sum(int(v.shape[1]) * int(v.shape[_FEATURES]) * v.dtype.itemsize for v in values)
