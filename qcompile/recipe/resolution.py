"""From a recipe's rules and a program's shapes to a `Plan`: every contraction with its specs, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import fx

from qcompile.errors import RecipeError, SpecError
from qcompile.ir.contractions import Contraction, find_contractions, find_obstacles, roles
from qcompile.ir.program import Program
from qcompile.numerics.granularity import PerGroup
from qcompile.numerics.spec import QuantSpec
from qcompile.recipe.model import Rule, Spec
from qcompile.recipe.plan import Plan, Site
from qcompile.recipe.select import Place, decide, places
from qcompile.recipe.specs import activation_spec, on_activation, on_weight, weight_spec


class Policy(Protocol):
    """The part of a recipe that says what is quantized how; the pass `insert-qdq` has it, too."""

    @property
    def weights(self) -> Spec: ...
    @property
    def activations(self) -> Spec: ...
    @property
    def head(self) -> Spec: ...
    @property
    def router(self) -> Spec: ...
    @property
    def rules(self) -> Sequence[Rule]: ...


def resolve(program: Program, policy: Policy) -> Plan:
    """Decide what `policy` (a `Recipe`, say) does at every contraction of `program`. Reads shapes only, no weight.

    Raises RecipeError for a bad spec, for a rule that decides nowhere, and for a group that does not divide its axis:
    then with rules to paste that mend all such weights.
    """
    contractions = find_contractions(program)
    found = places(program, contractions, roles(program, contractions))
    deciding = decide(policy.rules, found)
    defaults = _Defaults(policy)
    modules = Counter(place.names[0] for place in found)
    sites: list[Site] = []
    misfits: list[Misfit] = []
    for place, rule in zip(found, deciding, strict=True):
        site = _site(program, place, place.names[0 if modules[place.names[0]] == 1 else -1])
        if (done := quantized_already(place.contraction)) is not None:
            sites.append(replace(site, why=f"quantized already: {done}"))
            continue
        weights, activations, why = defaults.at(place, rule)
        fitted = None if weights is None else _fit_weight(weights, site)
        if isinstance(fitted, Misfit):
            misfits.append(fitted)
        else:
            input_spec = None if activations is None else _fit_activation(activations, site)
            sites.append(replace(site, weights=fitted, activations=input_spec, why=why))
    if misfits:
        raise RecipeError(_misfit_message(misfits, bool(policy.rules)))
    before, after = _sizes(program, sites)
    return Plan(tuple(sites), tuple(find_obstacles(program)), before, after)


def quantized_already(contraction: Contraction) -> str | None:
    """The spec of the dequantize between the weight and the contraction, None where there is none."""
    for node in contraction.path:
        if node.target is torch.ops.qcompile.dequantize.default:
            return str(node.args[3])
    return None


def stays_float(sites: Sequence[Site]) -> list[fx.Node]:
    """Readers that need the float weight of `sites`, all the sites of one weight: embeddings, float contractions."""
    first = {s.contraction.node: (*s.contraction.path, s.contraction.node)[0] for s in sites}
    served = {first[s.contraction.node] for s in sites if s.weights is not None}
    kept = [reader for reader in sites[0].contraction.weight.users if reader not in served]
    return kept + [s.contraction.node for s in sites if s.weights is None and first[s.contraction.node] in served]


def _site(program: Program, place: Place, name: str) -> Site:
    c = place.contraction
    key = program.key(c.weight)
    shape, _ = program.weights.meta(key)
    module, size = program.module_of(c.node), program.weights.nbytes(key)
    return Site(name, module, c.op, place.role, key, shape, None, None, "", size, c)


class _Defaults:
    """The specs of a policy, parsed, and what holds at a place."""

    def __init__(self, policy: Policy) -> None:
        self.weights = weight_spec(policy.weights, "weights")
        self.activations = activation_spec(policy.activations, "activations")
        self.named: Mapping[str, QuantSpec | None] = {
            "head": self._or_inherit(policy.head, "head"),
            "router": self._or_inherit(policy.router, "router"),
        }
        self.rules = [
            (
                rule.weights if rule.weights == "inherit" else weight_spec(rule.weights, f"rules.{i}.weights"),
                rule.activations
                if rule.activations == "inherit"
                else activation_spec(rule.activations, f"rules.{i}.activations"),
            )
            for i, rule in enumerate(policy.rules)
        ]

    def _or_inherit(self, spec: Spec, where: str) -> QuantSpec | None:
        return self.weights if spec == "inherit" else weight_spec(spec, where)

    def at(self, place: Place, rule: int | None) -> tuple[QuantSpec | None, QuantSpec | None, str]:
        """Specs of weights and activations as the recipe writes them, and the reason."""
        weights, activations, why = self.weights, self.activations, "default"
        if place.role in self.named:
            weights = self.named[place.role]
            why = f"{place.role}: {'null' if weights is None else weights}"
            activations = activations if weights is not None else None
        if rule is not None:
            why = f"rules.{rule}"
            new_weights, new_activations = self.rules[rule]
            if not isinstance(new_weights, str):
                activations = None if new_weights is None else self.activations
                weights = new_weights
            if not isinstance(new_activations, str):
                activations = new_activations
        return weights, activations, why


@dataclass(frozen=True)
class Misfit:
    """A group that does not divide the axis it runs along."""

    name: str
    shape: tuple[int, ...]
    spec: QuantSpec  # as the recipe writes it
    group: int
    axis: str
    size: int


def _fit_weight(spec: QuantSpec, site: Site) -> QuantSpec | Misfit:
    """The spec on the stored axes."""
    try:
        stored = on_weight(spec, site.contraction)
        if isinstance(stored.granularity, PerGroup):
            group, place = stored.granularity.size, stored.granularity.axis % len(site.shape)
            if site.shape[place] % group:
                axis = "input" if place == site.contraction.axis_in else "output"
                return Misfit(site.name, site.shape, spec, group, axis, site.shape[place])
        stored.scale_shape(site.shape)
    except SpecError as error:
        raise RecipeError(f"{site.name}: {error}; set another spec by rule") from None
    return stored


def _fit_activation(spec: QuantSpec, site: Site) -> QuantSpec:
    """The spec on the axes of the activation that is read."""
    value = site.contraction.input.meta["val"]
    if not value.dtype.is_floating_point:
        raise RecipeError(f"{site.name}: its input is {value.dtype} and no float; set activations: null for it by rule")
    try:
        stored = on_activation(spec, site.contraction)
        stored.scale_shape(value.shape)
    except SpecError as error:
        raise RecipeError(f"{site.name}: its input: {error}") from None
    return stored


def _misfit_message(misfits: Sequence[Misfit], has_rules: bool) -> str:
    """One line: the first tensor with its problem, how many more, and rules to paste that mend them all."""
    first = misfits[0]
    near = " and ".join(map(str, _nearest_divisors(first.size, first.group)))
    problem = f"{first.spec} does not divide its {first.axis} size {first.size} (nearest divisors {near})"
    more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
    mends = dict.fromkeys(f'{{match: "{_any_layer(m.name)}", weights: {_mend(m)}}}' for m in misfits)
    place = "put first in rules" if has_rules else "add rules"
    return f"{first.name} {list(first.shape)}: {problem}{more}; {place}: [{', '.join(mends)}]"


def _mend(misfit: Misfit) -> QuantSpec:
    """The spec with the largest power-of-two group from 16 that fits, else with one scale a channel."""
    groups = [2**k for k in range(4, 14) if 2**k < misfit.group and misfit.size % 2**k == 0]
    if groups and misfit.axis == "input":
        return misfit.spec.with_fields({"group": groups[-1]})
    return misfit.spec.with_fields({"granularity": "channel"})


def _any_layer(name: str) -> str:
    """A name with its layer number made a star."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name, count=1)


def _nearest_divisors(size: int, group: int) -> list[int]:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return [*[d for d in divisors if d < group][-1:], *[d for d in divisors if d > group][:1]]


def _sizes(program: Program, sites: Sequence[Site]) -> tuple[int, int]:
    """Bytes of all weights before and after; a weight that something else reads as well stays, too."""
    before = sum(program.weights.nbytes(key) for key in program.weights)
    after = before
    for key in dict.fromkeys(s.key for s in sites):
        readers = [s for s in sites if s.key == key]
        codes = {s.weights: s.bytes for s in readers if s.weights is not None}
        if codes:
            after += sum(codes.values()) - (0 if stays_float(readers) else program.weights.nbytes(key))
    return before, after
