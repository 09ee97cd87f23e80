"""Recipe specs as `QuantSpec`, and their granularity on the axes that a tensor really has.

A recipe's granularities are written for a weight ``[out, in]`` and an activation ``[…, in]``: a channel is an output
feature, a group runs along the axis that is summed over. Tensors are stored otherwise, too: ``[in, out]`` behind addmm,
``[experts, out, in]``, an activation with its features in the middle.
"""

from __future__ import annotations

import dataclasses

from qcompile.errors import RecipeError, SpecError
from qcompile.ir.contractions import Contraction
from qcompile.ir.moves import rank
from qcompile.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qcompile.numerics.spec import QuantSpec
from qcompile.recipe.model import Spec


def weight_spec(spec: Spec, where: str) -> QuantSpec | None:
    """The spec of a weight. RecipeError, naming `where` in the recipe, for a bad one or one made for activations."""
    parsed = _parse(spec, where)
    if parsed is not None and (parsed.when is not None or isinstance(parsed.granularity, PerToken)):
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
        return QuantSpec.parse(spec) if isinstance(spec, str) else QuantSpec.from_fields(spec)
    except SpecError as error:
        raise RecipeError(f"{where}: {error}") from None


def on_weight(spec: QuantSpec, contraction: Contraction) -> QuantSpec:
    """`spec`, written for ``[out, in]``, on the axes of the stored weight; each expert has scales of its own.

    Raises SpecError where the stored layout cannot express it.
    """
    c = contraction
    axes, last = (c.axis_out, c.axis_in), rank(c.weight) - 1
    stack = () if c.experts is None else (c.experts,)
    match spec.granularity:
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
    raise SpecError(f"{spec} has no meaning on a weight of {last + 1} axes, output {c.axis_out} and input {c.axis_in}")


def on_activation(spec: QuantSpec, contraction: Contraction) -> QuantSpec:
    """`spec`, written for ``[…, in]``, on the axes of the activation the contraction reads."""
    place, last = contraction.input_axis, rank(contraction.input) - 1
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
