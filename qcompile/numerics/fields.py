"""Spec strings and recipe fields: words to fields, fields to a `QuantSpec`, and both ways back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, TypeVar, cast

from qcompile.errors import SpecError, nearest
from qcompile.numerics import formats
from qcompile.numerics.criterion import CRITERIA, AbsMax, Criterion, MinMax, parse_criterion
from qcompile.numerics.element import ELEMENTS, Element, FloatElement, IntElement, parse_element
from qcompile.numerics.float_element import parse_float
from qcompile.numerics.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    axis_text,
)
from qcompile.numerics.scale_type import (
    F32,
    DoubleScale,
    E8M0Scale,
    MicroScale,
    ScaleType,
    parse_double,
    parse_scale,
    unsigned,
)

if TYPE_CHECKING:
    from qcompile.numerics.spec import QuantSpec, Range, When, Zero

    T = TypeVar("T")

# The words that stand alone in a spec string, each with the field it sets.
_WORDS = {
    **dict.fromkeys(("sym", "asym"), "symmetry"),
    **dict.fromkeys(("signed", "half", "full", "narrow"), "range"),
    **dict.fromkeys(("tensor", "channel", "token"), "granularity"),
    **dict.fromkeys(("static", "dynamic", "no_scale"), "when"),
    **dict.fromkeys(CRITERIA, "observer"),
}
_SYMMETRIES = ("sym", "asym")
_RANGES: tuple[Range, ...] = ("signed", "half", "full", "narrow")
_GRANULARITIES = ("tensor", "channel", "token")
_ZEROS = ("none", "int", "float")
_WHENS: tuple[When, ...] = ("static", "dynamic", "no_scale")
_NAMES = (
    *("element", "bits", "symmetry", "range", "granularity", "group", "block", "axis", "stack"),
    *("scale", "double", "scaling_min", "zero", "via", "when", "observer", "percentile", "mse", "golden"),
)
_OBSERVERS = ("observer", "percentile", "mse", "golden")


def split_words(text: str) -> dict[str, object]:
    """The fields a spec string sets; SpecError for an unknown word, or for a field that is set twice."""
    element, *words = re.findall(r"[^\s(]+\([^)]*\)\S*|\S+", text) or [""]
    fields: dict[str, object] = {"element": element}
    if formats.expand(element) is None:
        fields["element"] = str(parse_element(element))
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and word in _WORDS:
            name, value = _WORDS[word], word
        elif not equals or name not in _NAMES:
            hint = nearest(name, _NAMES) if equals else nearest(word, [*_WORDS, *(f"{n}=" for n in _NAMES), *ELEMENTS])
            known = f"{', '.join(_WORDS)}, group=, block=, axis=, scale=, double=, zero=, via="
            raise SpecError(f"unknown word {word!r} in spec {text!r}{hint}; after the element come {known}")
        if name in fields:
            raise SpecError(f"{word!r} sets {name} again in spec {text!r}, after {fields[name]!r}; keep one")
        fields[name] = value
    return fields


def build(fields: Mapping[str, object]) -> QuantSpec:
    """The spec that `fields` describe, with defaults filled in (see `QuantSpec`)."""
    from qcompile.numerics.spec import QuantSpec  # that module needs this one

    given = _expanded({name: value for name, value in fields.items() if value is not None})
    for name in fields:
        if name not in _NAMES:
            raise SpecError(f"unknown spec field {name!r}{nearest(name, _NAMES)}; fields are {', '.join(_NAMES)}")
    element = _element(given)
    symmetric = _choice(given, "symmetry", _SYMMETRIES, "sym") == "sym"
    when = _choice(given, "when", _WHENS, None)
    scale = _scale(given)
    return QuantSpec(
        element=element,
        symmetric=symmetric,
        range=_choice(given, "range", _RANGES, default_range(element, symmetric, when, scale)),
        granularity=_granularity(given, when),
        scale=scale,
        zero=_zero(given, symmetric),
        when=when,
        observer=_criterion(given, symmetric),
        via=_via(given),
        stack=_integer(given, "stack") if "stack" in given else None,
        scaling_min=_number(given, "scaling_min") if "scaling_min" in given else None,
    )


def describe(spec: QuantSpec) -> dict[str, str | int | float]:
    """The fields that `build` needs to make `spec` again; defaults left out, but granularity and an int's symmetry."""
    fields: dict[str, str | int | float] = {"element": str(spec.element)}
    if isinstance(spec.element, IntElement) or not spec.symmetric:
        fields["symmetry"] = "sym" if spec.symmetric else "asym"
    if spec.range != default_range(spec.element, spec.symmetric, spec.when, spec.scale):
        fields["range"] = spec.range
    fields |= _describe_granularity(spec)
    if spec.stack is not None:
        fields["stack"] = spec.stack
    if isinstance(spec.scale, DoubleScale):
        fields["double"] = str(spec.scale)
    elif spec.scale != F32:
        fields["scale"] = str(spec.scale)
    if spec.scaling_min is not None:
        fields["scaling_min"] = spec.scaling_min
    if spec.zero not in ("none", "int"):
        fields["zero"] = str(spec.zero)
    if spec.via is not None:
        fields["via"] = str(spec.via)
    if spec.when is not None:
        fields["when"] = spec.when
    if spec.observer != default_criterion(spec.symmetric):
        fields["observer"] = str(spec.observer)
    return fields


def join_words(fields: Mapping[str, str | int | float]) -> str:
    """The spec string of `describe`'s fields; what a named format covers is said by its name."""
    words = []
    covered: frozenset[str] = frozenset()
    if fields.get("symmetry") != "asym" and "range" not in fields and (named := formats.name_of(fields)) is not None:
        words.append(named[0])
        covered = named[1] | {"symmetry"}
    for name, value in fields.items():
        if name not in covered:
            plain = name in ("element", "observer") or _WORDS.get(str(value)) == name
            words.append(str(value) if plain else f"{name}={value}")
    return " ".join(words)


def _describe_granularity(spec: QuantSpec) -> dict[str, str | int | float]:
    match spec.granularity:
        case PerGroup(size, axis):
            return {"group": size} if axis == -1 else {"group": size, "axis": axis}
        case PerBlock(rows, columns):
            return {"block": f"{rows}x{columns}"}
        case PerChannel(axes) if axes != default_channel(spec.when).axes:
            return {"granularity": "channel", "axis": axes[0] if len(axes) == 1 else axis_text(axes)}
        case PerTensor() if spec.when == "no_scale":
            return {}
        case other:
            return {"granularity": str(other)}


def _expanded(given: dict[str, object]) -> dict[str, object]:
    """`given` with a named format in place of its element taken apart."""
    word = str(given.get("element", ""))
    if (own := formats.expand(word)) is None:
        return given
    taken = {"granularity": "group", "block": "group", "double": "scale"}
    for name in given:
        if name != "element" and (name in own or taken.get(name) in own or name in ("bits", "range", "symmetry")):
            if name == "symmetry" and given[name] == "sym":
                continue
            if name in _OBSERVERS and "observer" not in own:
                continue
            parts = " ".join(f"{k}={v}" if k != "element" else v for k, v in own.items())
            raise SpecError(f"{word} is {parts}, so {name}={given[name]} does not apply; write out what you mean")
    return {**given, **own}


def merge(fields: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """`fields` with `changes`, dropping what a change makes meaningless."""
    kept = dict(fields)
    if not {"granularity", "group", "block"}.isdisjoint(changes):
        for name in ("granularity", "group", "block", "axis"):
            kept.pop(name, None)
    if changes.get("symmetry", fields.get("symmetry")) != fields.get("symmetry"):
        for name in ("range", "zero", "observer"):
            kept.pop(name, None)
    if not set(_OBSERVERS).isdisjoint(changes):
        kept.pop("observer", None)
    if not {"scale", "double"}.isdisjoint(changes):
        for name in ("scale", "double"):
            kept.pop(name, None)
    if "element" in changes:
        for name in ("symmetry", "range", "zero"):
            kept.pop(name, None)
        if formats.expand(str(changes["element"])) is not None:
            for name in ("granularity", "group", "block", "axis", "scale", "double", "observer"):
                kept.pop(name, None)
    return {**kept, **changes}


def default_range(element: Element, symmetric: bool, when: When | None, scale: ScaleType) -> Range:
    """`signed` for weights whose scales have a sign, else `half`; `narrow` and `full` where nothing else can be."""
    if not isinstance(element, IntElement) or not symmetric or not element.signed:
        return "full"
    if scale == E8M0Scale("bfp"):
        return "full"
    if element.ternary or isinstance(scale, E8M0Scale | MicroScale):
        return "narrow"
    return "signed" if when is None and not unsigned(scale) else "half"


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
    default = {None: "channel", "dynamic": "token", "static": "tensor", "no_scale": "tensor"}[when]
    word = _choice(given, "granularity", _GRANULARITIES, default) if "block" not in given else "block"
    if word == "channel":
        return default_channel(when) if axes is None else PerChannel(axes)
    if axes is not None:
        raise SpecError(f"axis={axis_text(axes)} means nothing to {word}; drop it, or use channel or group")
    if word == "block":
        return PerBlock(*_block(given["block"]))
    return PerTensor() if word == "tensor" else PerToken()


def _criterion(given: Mapping[str, object], symmetric: bool) -> Criterion:
    named = [name for name in _OBSERVERS if name in given]
    if len(named) > 1:
        raise SpecError(f"{' and '.join(f'{n}={given[n]}' for n in named)} are both observers; keep one")
    if not named:
        return default_criterion(symmetric)
    value = given[named[0]]
    return parse_criterion(str(value) if named[0] == "observer" else f"{named[0]}={value}")


def _scale(given: Mapping[str, object]) -> ScaleType:
    if "double" not in given:
        return parse_scale(str(given.get("scale", "f32")))
    if "scale" in given:
        raise SpecError(f"scale={given['scale']} and double={given['double']} both say what a scale is; keep one")
    return parse_double(str(given["double"]), "double")


def _zero(given: Mapping[str, object], symmetric: bool) -> Zero:
    word = str(given.get("zero", "none" if symmetric else "int"))
    if word in _ZEROS:
        return cast("Zero", word)
    if word[:1].isdigit():
        return parse_double(word, "zero")
    raise SpecError(f"unknown zero {word!r}{nearest(word, _ZEROS)}; use {', '.join(_ZEROS)}, or 8x128 (bits x group)")


def _via(given: Mapping[str, object]) -> FloatElement | None:
    if "via" not in given:
        return None
    element = parse_float(str(given["via"]))
    if element is None:
        raise SpecError(f"via={given['via']} is no float element; write via=e4m3fn")
    return element


def _number(given: Mapping[str, object], name: str) -> float:
    try:
        return float(str(given[name]))
    except ValueError as error:
        raise SpecError(f"{name}={given[name]} is not a number; write {name}=1e-5") from error


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
