"""From a recipe's rules and a program's shapes to a `Plan`: every contraction and embedding with its specs, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import fx

from qcompile.errors import RecipeError
from qcompile.ir.contractions import Contraction, Embedding, Obstacle, roles, survey
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.recipe.fit import Misfit, fit_input, fit_result, fit_weight, misfit_message
from qcompile.recipe.model import Recipe, Rule
from qcompile.recipe.parts import Spec
from qcompile.recipe.plan import Plan, Site
from qcompile.recipe.select import Place, decide, places
from qcompile.recipe.specs import activation_spec, weight_spec
from qcompile.recipe.values import decide_values


class Policy(Protocol):
    """The part of a recipe that says what is quantized how; the pass `insert-qdq` has it, too."""

    @property
    def weights(self) -> Spec: ...
    @property
    def activations(self) -> Spec: ...
    @property
    def outputs(self) -> Spec: ...
    @property
    def head(self) -> Spec: ...
    @property
    def router(self) -> Spec: ...
    @property
    def embeddings(self) -> Spec: ...
    @property
    def rules(self) -> Sequence[Rule]: ...


def resolve(program: Program, policy: Policy) -> Plan:
    """Decide what `policy` (a `Recipe`, say) does at every place of `program`. Reads shapes only, no weight.

    Raises RecipeError for a bad spec, for a rule that decides nowhere, and for a group that does not divide its axis:
    then with rules to paste that mend all such weights.
    """
    found = survey(program)
    readers = [f for f in found if not isinstance(f, Obstacle)]
    where = places(program, readers, roles(program, [r for r in readers if isinstance(r, Contraction)]))
    deciding = decide(policy.rules, where)
    _refuse_inputs_of_embeddings(policy.rules, deciding, where)
    defaults = _Defaults(policy)
    modules = Counter(place.names[0] for place in where)
    sites: list[Site] = []
    misfits: list[Misfit] = []
    for place, rule in zip(where, deciding, strict=True):
        site = _site(program, place, place.names[0 if modules[place.names[0]] == 1 else -1])
        if (reason := _why_not(program, site)) is not None:
            sites.append(replace(site, why=reason))
            continue
        decided = _fitted(site, *defaults.at(place, rule))
        if isinstance(decided, Misfit):
            misfits.append(decided)
        else:
            sites.append(decided)
    if misfits:
        raise RecipeError(misfit_message(misfits, bool(policy.rules)))
    values = decide_values(program, policy) if isinstance(policy, Recipe) else ()
    obstacles = tuple(f for f in found if isinstance(f, Obstacle))
    return Plan(tuple(sites), obstacles, *_sizes(program, sites), values)


def quantized_already(reader: Contraction | Embedding) -> str | None:
    """The spec of the dequantize between the weight and what reads it, None where there is none."""
    for node in reader.path:
        if node.target is torch.ops.qcompile.dequantize.default:
            return str(node.args[3])
    return None


def stays_float(sites: Sequence[Site]) -> list[fx.Node]:
    """Readers that need the float weight of `sites`, all the sites of one weight: whatever reads it unquantized."""
    first = {s.reader.node: (*s.reader.path, s.reader.node)[0] for s in sites}
    served = {first[s.reader.node] for s in sites if s.weights is not None}
    kept = [reader for reader in sites[0].reader.weight.users if reader not in served]
    return kept + [s.reader.node for s in sites if s.weights is None and first[s.reader.node] in served]


def _site(program: Program, place: Place, name: str) -> Site:
    reader = place.reader
    key = program.key(reader.weight)
    shape, _ = program.weights.meta(key)
    module, size = program.module_of(reader.node), program.weights.nbytes(key)
    return Site(name, module, reader.op, place.role, key, shape, None, None, None, "", size, reader)


def _why_not(program: Program, site: Site) -> str | None:
    """Why a weight cannot be quantized at all, whatever the recipe says."""
    if (done := quantized_already(site.reader)) is not None:
        return f"quantized already: {done}"
    if 0 in site.shape:
        return f"its weight {site.key!r} {list(site.shape)} has no elements"
    dtype = program.weights.meta(site.key)[1]
    return None if dtype.is_floating_point else f"its weight {site.key!r} is {dtype} and no float"


def _fitted(
    site: Site, weights: QuantSpec | None, inputs: QuantSpec | None, outputs: QuantSpec | None, why: str
) -> Site | Misfit:
    """The site with specs on the axes that its tensors really have."""
    fitted = None if weights is None else fit_weight(weights, site)
    if isinstance(fitted, Misfit):
        return fitted
    return replace(
        site,
        weights=fitted,
        activations=None if inputs is None else fit_input(inputs, site),
        outputs=None if outputs is None else fit_result(outputs, site),
        why=why,
    )


class _Defaults:
    """The specs of a policy, parsed, and what holds at a place."""

    def __init__(self, policy: Policy) -> None:
        self.weights = weight_spec(policy.weights, "weights")
        self.activations = activation_spec(policy.activations, "activations")
        self.outputs = activation_spec(policy.outputs, "outputs")
        self.named: Mapping[str, QuantSpec | None] = {
            "head": self._or_inherit(policy.head, "head"),
            "router": self._or_inherit(policy.router, "router"),
        }
        self.embeddings = weight_spec(policy.embeddings, "embeddings")
        self.rules = [
            (
                _unless_inherited(weight_spec, rule.weights, f"rules.{i}.weights"),
                _unless_inherited(activation_spec, rule.activations, f"rules.{i}.activations"),
                _unless_inherited(activation_spec, rule.outputs, f"rules.{i}.outputs"),
            )
            for i, rule in enumerate(policy.rules)
        ]

    def _or_inherit(self, spec: Spec, where: str) -> QuantSpec | None:
        return self.weights if spec == "inherit" else weight_spec(spec, where)

    def at(self, place: Place, rule: int | None) -> tuple[QuantSpec | None, QuantSpec | None, QuantSpec | None, str]:
        """Specs of the weight, its input and its result as the recipe writes them, and the reason."""
        if isinstance(place.reader, Embedding):
            return self._at_embedding(rule)
        weights, activations, outputs, why = self.weights, self.activations, self.outputs, "default"
        if place.role in self.named:
            weights = self.named[place.role]
            why = f"{place.role}: {'null' if weights is None else weights}"
            activations, outputs = (None, None) if weights is None else (activations, outputs)
        if rule is None:
            return weights, activations, outputs, why
        new_weights, new_activations, new_outputs = self.rules[rule]
        if not isinstance(new_weights, str):
            weights = new_weights
            activations, outputs = (None, None) if weights is None else (self.activations, self.outputs)
        return (
            weights,
            activations if isinstance(new_activations, str) else new_activations,
            outputs if isinstance(new_outputs, str) else new_outputs,
            f"rules.{rule}",
        )

    def _at_embedding(self, rule: int | None) -> tuple[QuantSpec | None, None, QuantSpec | None, str]:
        why = f"embeddings: {'null' if self.embeddings is None else self.embeddings}"
        if rule is None:
            return self.embeddings, None, None, why
        weights, _, outputs = self.rules[rule]
        return (
            self.embeddings if isinstance(weights, str) else weights,
            None,
            None if isinstance(outputs, str) else outputs,
            f"rules.{rule}",
        )


class _Read(Protocol):
    def __call__(self, spec: Spec, where: str) -> QuantSpec | None: ...


def _unless_inherited(read: _Read, spec: Spec, where: str) -> QuantSpec | str | None:
    return spec if spec == "inherit" and isinstance(spec, str) else read(spec, where)


def _refuse_inputs_of_embeddings(rules: Sequence[Rule], deciding: Iterable[int | None], where: Sequence[Place]) -> None:
    """RecipeError for a rule about inputs that decides at embeddings alone: those read integers."""
    kinds: dict[int, set[str]] = {}
    for place, index in zip(where, deciding, strict=True):
        if index is not None:
            kinds.setdefault(index, set()).add(place.role)
    for index, rule in enumerate(rules):
        if kinds.get(index) == {"embedding"} and rule.activations not in ("inherit", None):
            only = f"rules.{index} decides at embeddings alone, and those read integers"
            raise RecipeError(f"{only}; drop its activations, or set outputs")


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
