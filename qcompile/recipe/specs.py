"""Recipe specs as `QuantSpec`, and their granularity on the axes that a tensor really has.

A recipe's granularities are written for a weight ``[out, in]``, a table ``[rows, features]`` and an activation
``[…, features]``: a channel is an output feature or a row, a group runs along the axis that is summed over or along a
row. Tensors are stored otherwise, too: ``[in, out]`` behind addmm, ``[experts, out, in]``, ``[out, in, *window]`` of a
convolution (where groups run along ``in``, and each place of the window has its own), an activation with its features
in the middle.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from qcompile.errors import RecipeError, SpecError
from qcompile.ir.contractions import Contraction, Embedding
from qcompile.ir.moves import rank
from qcompile.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qcompile.numerics.parameters import outer_names
from qcompile.numerics.spec import QuantSpec
from qcompile.recipe.parts import Spec


def weight_spec(spec: Spec, where: str) -> QuantSpec | None:
    """The spec of a weight. RecipeError, naming `where` in the recipe, for a bad one or one made for activations."""
    parsed = _parse(spec, where)
    if parsed is not None and (parsed.when in ("static", "dynamic") or isinstance(parsed.granularity, PerToken)):
        raise RecipeError(f"{where}: {parsed} is for activations; a weight takes tensor, channel, group or block alone")
    return parsed


def activation_spec(spec: Spec, where: str) -> QuantSpec | None:
    """The spec of an activation. RecipeError for a bad one, or one that is neither static nor dynamic."""
    parsed = _parse(spec, where)
    if parsed is not None and parsed.when is None:
        raise RecipeError(f"{where}: {parsed} does not say when its scales are known; add static or dynamic")
    return parsed


def _parse(spec: Spec, where: str) -> QuantSpec | None:
    if spec is None:
        return None
    try:
        parsed = QuantSpec.parse(spec) if isinstance(spec, str) else QuantSpec.from_fields(spec)
    except SpecError as error:
        raise RecipeError(f"{where}: {error}") from None
    if parsed.stack is not None:
        raise RecipeError(f"{where}: {parsed}: which axis stacks experts is read off the program; drop stack=")
    return parsed


def on_weight(spec: QuantSpec, reader: Contraction | Embedding) -> QuantSpec:
    """`spec`, written for ``[out, in]`` (or ``[rows, features]``), on the axes of the stored weight.

    Each expert has scales of its own. Raises SpecError where the stored layout cannot express it.
    """
    axes, last = reader.axes, rank(reader.weight) - 1
    stack = () if reader.experts is None else (reader.experts,)
    if stack and not {"global_scale", "via_scale"}.isdisjoint(outer_names(spec)):
        spec = dataclasses.replace(spec, stack=reader.experts)
    match spec.granularity:
        case PerTensor() if spec.when == "no_scale":
            return spec
        case PerTensor():
            return _on(spec, PerChannel(stack) if stack else PerTensor())
        case PerChannel(kept):
            return _on(spec, PerChannel(tuple(sorted({axes[_index(a, spec)] for a in kept} | set(stack)))))
        case PerGroup(size, axis):
            place = axes[_index(axis, spec)]
            return _on(spec, PerGroup(size, -1 if place == last else place))
        case PerBlock(rows, columns):
            if axes == (last - 1, last):
                return spec
            if axes == (last, last - 1):
                return _on(spec, PerBlock(columns, rows))
    raise SpecError(f"{spec} has no meaning on a weight of {last + 1} axes, output {axes[0]} and input {axes[1]}")


def on_activation(spec: QuantSpec, value: fx.Node, features: int) -> QuantSpec:
    """`spec`, written for ``[…, features]``, on the axes of an activation whose features are axis `features`."""
    place, last = features, rank(value) - 1
    if place == last:
        return spec
    match spec.granularity:
        case PerToken():
            return _on(spec, PerChannel(tuple(a for a in range(last + 1) if a != place)))
        case PerGroup(size, -1):
            return _on(spec, PerGroup(size, place))
        case PerChannel((-1,)):
            return _on(spec, PerChannel((place,)))
        case PerTensor():
            return spec
    raise SpecError(f"{spec} has no meaning on an activation whose features are axis {place} of {last + 1}")


def _on(spec: QuantSpec, granularity: PerTensor | PerChannel | PerGroup | PerBlock) -> QuantSpec:
    return dataclasses.replace(spec, granularity=granularity)


def _index(axis: int, spec: QuantSpec) -> int:
    if not -2 <= axis < 2:
        raise SpecError(f"{spec}: axis={axis} is none of [out, in]; write 0 for outputs or 1 for inputs")
    return axis % 2
