"""Whether a spec fits the tensor it is for: the spec on its axes, or what is wrong and a rule to paste."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from qcompile.errors import RecipeError, SpecError
from qcompile.ir.contractions import Contraction
from qcompile.numerics.granularity import PerGroup
from qcompile.numerics.spec import QuantSpec
from qcompile.recipe.plan import Site
from qcompile.recipe.specs import on_activation, on_weight


@dataclass(frozen=True)
class Misfit:
    """A group that does not divide the axis it runs along."""

    name: str
    role: str
    shape: tuple[int, ...]
    spec: QuantSpec  # as the recipe writes it
    group: int
    axis: str
    size: int


def fit_weight(spec: QuantSpec, site: Site) -> QuantSpec | Misfit:
    """The spec on the stored axes."""
    try:
        stored = on_weight(spec, site.reader)
        if isinstance(stored.granularity, PerGroup):
            group, place = stored.granularity.size, stored.granularity.axis % len(site.shape)
            if site.shape[place] % group:
                names = ("row", "feature") if site.role == "embedding" else ("output", "input")
                axis = names[site.reader.axes.index(place)]
                return Misfit(site.name, site.role, site.shape, spec, group, axis, site.shape[place])
        stored.parameters(site.shape)
    except SpecError as error:
        raise RecipeError(f"{site.name}: {error}; set another spec by rule") from None
    return stored


def fit_input(spec: QuantSpec, site: Site) -> QuantSpec:
    """The spec on the axes of the activation that is read."""
    assert isinstance(site.reader, Contraction)
    return _fit(spec, site, site.reader.input, site.reader.input_axis, "input", "activations")


def fit_result(spec: QuantSpec, site: Site) -> QuantSpec:
    """The spec on the axes of the result."""
    node = site.reader.node
    features = site.reader.output_axis if isinstance(site.reader, Contraction) else node.meta["val"].dim() - 1
    return _fit(spec, site, node, features, "result", "outputs")


def _fit(spec: QuantSpec, site: Site, node: fx.Node, features: int, what: str, field: str) -> QuantSpec:
    value = node.meta["val"]
    if not value.dtype.is_floating_point:
        raise RecipeError(f"{site.name}: its {what} is {value.dtype} and no float; set {field}: null for it by rule")
    try:
        placed = on_activation(spec, node, features)
        placed.parameters(value.shape)
    except SpecError as error:
        raise RecipeError(f"{site.name}: its {what}: {error}") from None
    return placed


def misfit_message(misfits: Sequence[Misfit], has_rules: bool) -> str:
    """One line: the first tensor with its problem, how many more, and rules to paste that mend them all."""
    first = misfits[0]
    near = " and ".join(map(str, _nearest_divisors(first.size, first.group)))
    problem = f"{first.spec} does not divide its {first.axis} size {first.size} (nearest divisors {near})"
    more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
    mends = dict.fromkeys(f"{{{_selector(m)}, weights: {_mend(m)}}}" for m in misfits)
    place = "put first in rules" if has_rules else "add rules"
    return f"{first.name} {list(first.shape)}: {problem}{more}; {place}: [{', '.join(mends)}]"


def _selector(misfit: Misfit) -> str:
    """What selects it, and its like in other layers; a table by its role too, for a head may share its name."""
    role = ", role: embedding" if misfit.role == "embedding" else ""
    return f'match: "{_any_layer(misfit.name)}"{role}'


def _mend(misfit: Misfit) -> str:
    """The spec with the largest power-of-two group from 16 that fits, else with one scale a channel; null for a format
    that has neither."""
    groups = [2**k for k in range(4, 14) if 2**k < misfit.group and misfit.size % 2**k == 0]
    along = groups and misfit.axis in ("input", "feature")
    try:
        return str(misfit.spec.with_fields({"group": groups[-1]} if along else {"granularity": "channel"}))
    except SpecError:
        return "null"


def _any_layer(name: str) -> str:
    """A name with its layer number made a star."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1)


def _nearest_divisors(size: int, group: int) -> list[int]:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return [*[d for d in divisors if d < group][-1:], *[d for d in divisors if d > group][:1]]
