"""Spec strings and recipe fields: words to fields, fields to a `QuantSpec`, and both ways back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from qcompile.errors import SpecError
from qcompile.numerics.criterion import CRITERIA, AbsMax, Criterion, MinMax, parse_criterion
from qcompile.numerics.element import ELEMENTS, Element, nearest, parse_element
from qcompile.numerics.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    axis_text,
)
from qcompile.numerics.scale_type import SCALE_TYPES, ScaleType

if TYPE_CHECKING:
    from qcompile.numerics.spec import QuantSpec, Range, When, Zero

    T = TypeVar("T")

# The words that stand alone in a spec string, each with the field it sets.
_WORDS = {
    **dict.fromkeys(("sym", "asym"), "symmetry"),
    **dict.fromkeys(("signed", "half", "full", "narrow"), "range"),
    **dict.fromkeys(("tensor", "channel", "token"), "granularity"),
    **dict.fromkeys(("static", "dynamic"), "when"),
    **dict.fromkeys(CRITERIA, "observer"),
}
_SYMMETRIES = ("sym", "asym")
_RANGES: tuple[Range, ...] = ("signed", "half", "full", "narrow")
_GRANULARITIES = ("tensor", "channel", "token")
_ZEROS: tuple[Zero, ...] = ("none", "int", "float")
_WHENS: tuple[When, ...] = ("static", "dynamic")
_NAMES = (
    *("element", "bits", "symmetry", "range", "granularity", "group", "block", "axis"),
    *("scale", "zero", "when", "observer", "percentile", "mse"),
)


def split_words(text: str) -> dict[str, object]:
    """The fields a spec string sets; SpecError for an unknown word, or for a field that is set twice."""
    element, *words = text.split() or [""]
    fields: dict[str, object] = {"element": str(parse_element(element))}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and word in _WORDS:
            name, value = _WORDS[word], word
        elif not equals or name not in _NAMES:
            hint = nearest(name, _NAMES) if equals else nearest(word, [*_WORDS, *(f"{n}=" for n in _NAMES), *ELEMENTS])
            known = f"{', '.join(_WORDS)}, group=, block=, axis=, scale=, zero="
            raise SpecError(f"unknown word {word!r} in spec {text!r}{hint}; after the element come {known}")
        if name in fields:
            raise SpecError(f"{word!r} sets {name} again in spec {text!r}, after {fields[name]!r}; keep one")
        fields[name] = value
    return fields


def build(fields: Mapping[str, object]) -> QuantSpec:
    """The spec that `fields` describe, with defaults filled in (see `QuantSpec`)."""
    from qcompile.numerics.spec import QuantSpec  # that module needs this one

    given = {name: value for name, value in fields.items() if value is not None}
    for name in given:
        if name not in _NAMES:
            raise SpecError(f"unknown spec field {name!r}{nearest(name, _NAMES)}; fields are {', '.join(_NAMES)}")
    element = _element(given)
    symmetric = _choice(given, "symmetry", _SYMMETRIES, "sym") == "sym"
    when = _choice(given, "when", _WHENS, None)
    return QuantSpec(
        element=element,
        symmetric=symmetric,
        range=_choice(given, "range", _RANGES, default_range(element, symmetric, when)),
        granularity=_granularity(given, when),
        scale=_scale(given),
        zero=_choice(given, "zero", _ZEROS, "none" if symmetric else "int"),
        when=when,
        observer=_criterion(given, symmetric),
    )


def describe(spec: QuantSpec) -> dict[str, str | int]:
    """The fields that `build` needs to make `spec` again; defaults left out, but for symmetry and granularity."""
    fields: dict[str, str | int] = {"element": str(spec.element), "symmetry": "sym" if spec.symmetric else "asym"}
    if spec.range != default_range(spec.element, spec.symmetric, spec.when):
        fields["range"] = spec.range
    match spec.granularity:
        case PerGroup(size, axis):
            fields["group"] = size
            if axis != -1:
                fields["axis"] = axis
        case PerBlock(rows, columns):
            fields["block"] = f"{rows}x{columns}"
        case PerChannel(axes) if axes != default_channel(spec.when).axes:
            fields["granularity"] = "channel"
            fields["axis"] = axes[0] if len(axes) == 1 else axis_text(axes)
        case other:
            fields["granularity"] = str(other)
    if spec.scale != "f32":
        fields["scale"] = spec.scale
    if spec.zero == "float":
        fields["zero"] = spec.zero
    if spec.when is not None:
        fields["when"] = spec.when
    if spec.observer != default_criterion(spec.symmetric):
        fields["observer"] = str(spec.observer)
    return fields


def join_words(fields: Mapping[str, str | int]) -> str:
    """The spec string of `describe`'s fields."""
    words = []
    for name, value in fields.items():
        plain = name in ("element", "observer") or _WORDS.get(str(value)) == name
        words.append(str(value) if plain else f"{name}={value}")
    return " ".join(words)


def merge(fields: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """`fields` with `changes`, dropping what a change makes meaningless."""
    kept = dict(fields)
    if not {"granularity", "group", "block"}.isdisjoint(changes):
        for name in ("granularity", "group", "block", "axis"):
            kept.pop(name, None)
    if changes.get("symmetry", fields.get("symmetry")) != fields.get("symmetry"):
        for name in ("range", "zero", "observer"):
            kept.pop(name, None)
    if not {"observer", "percentile", "mse"}.isdisjoint(changes):
        kept.pop("observer", None)
    return {**kept, **changes}


def default_range(element: Element, symmetric: bool, when: When | None) -> Range:
    """`signed` for weights, `half` for activations; `full` and `narrow` where nothing else is possible."""
    if element.ternary:
        return "narrow"
    if not symmetric or not element.signed:
        return "full"
    return "signed" if when is None else "half"


def default_channel(when: When | None) -> PerChannel:
    """The first axis of a weight, the last of an activation."""
    return PerChannel((0,) if when is None else (-1,))


def default_criterion(symmetric: bool) -> Criterion:
    return AbsMax() if symmetric else MinMax()


def _element(given: Mapping[str, object]) -> Element:
    if "element" not in given:
        raise SpecError(f"a spec needs its element, and the fields are {', '.join(given) or 'none'}; add element: int4")
    element = parse_element(str(given["element"]))
    return element.with_bits(_integer(given, "bits")) if "bits" in given else element


def _granularity(given: Mapping[str, object], when: When | None) -> Granularity:
    named = [name for name in ("granularity", "group", "block") if name in given]
    if len(named) > 1:
        both = " and ".join(f"{name}={given[name]}" for name in named)
        raise SpecError(f"{both} are both granularities; keep one")
    axes = _axes(given["axis"]) if "axis" in given else None
    if "group" in given:
        if axes is not None and len(axes) != 1:
            raise SpecError(f"group takes one axis, not axis={axis_text(axes)}; use block=RxC for two")
        return PerGroup(_integer(given, "group"), -1 if axes is None else axes[0])
    default = {None: "channel", "dynamic": "token", "static": "tensor"}[when]
    word = _choice(given, "granularity", _GRANULARITIES, default) if "block" not in given else "block"
    if word == "channel":
        return default_channel(when) if axes is None else PerChannel(axes)
    if axes is not None:
        raise SpecError(f"axis={axis_text(axes)} means nothing to {word}; drop it, or use channel or group")
    if word == "block":
        return PerBlock(*_block(given["block"]))
    return PerTensor() if word == "tensor" else PerToken()


def _criterion(given: Mapping[str, object], symmetric: bool) -> Criterion:
    named = [name for name in ("observer", "percentile", "mse") if name in given]
    if len(named) > 1:
        raise SpecError(f"{' and '.join(f'{n}={given[n]}' for n in named)} are both observers; keep one")
    if not named:
        return default_criterion(symmetric)
    value = given[named[0]]
    return parse_criterion(str(value) if named[0] == "observer" else f"{named[0]}={value}")


def _scale(given: Mapping[str, object]) -> ScaleType:
    word = given.get("scale", "f32")
    return _choice({"scale": "pow2" if word == "pow2(ceil)" else word}, "scale", SCALE_TYPES, "f32")


def _choice(given: Mapping[str, object], name: str, valid: tuple[T, ...], default: T | Literal["", None]) -> T:
    value = given.get(name, default)
    if name in given and value not in valid:
        words = [str(word) for word in valid]
        raise SpecError(f"unknown {name} {value!r}{nearest(str(value), words)}; use {', '.join(words)}")
    return cast("T", value)


def _integer(given: Mapping[str, object], name: str) -> int:
    try:
        return int(str(given[name]))
    except ValueError as error:
        raise SpecError(f"{name}={given[name]} is not an integer; write {name}=8") from error


def _axes(value: object) -> tuple[int, ...]:
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    try:
        return tuple(int(str(part)) for part in parts)
    except ValueError as error:
        raise SpecError(f"axis={value} is not an axis; write axis=0, or axis=0,1 for channel") from error


def _block(value: object) -> tuple[int, int]:
    parts = value if isinstance(value, list | tuple) else str(value).split("x")
    try:
        rows, columns = (int(str(part)) for part in parts)
    except ValueError as error:
        raise SpecError(f"block={value} is not a block; write block=128x128") from error
    return rows, columns
