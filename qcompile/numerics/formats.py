"""Formats that have a name of their own, each an element, a group and a scale type: `mxfp4(even)`, `nvfp4`, `mx9`.

A name stands where a spec string has its element and sets those three; everything else can follow it. A spec that
equals a named format prints its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import get_args

from qcompile.errors import SpecError, nearest
from qcompile.numerics.scale_type import Rule

_MX_ELEMENTS = {
    "mxfp8_e4m3": "e4m3fn",
    "mxfp8_e5m2": "e5m2",
    "mxfp6_e2m3": "e2m3",
    "mxfp6_e3m2": "e3m2",
    "mxfp4": "e2m1",
    "mxint8": "int8.6",
}
_MX_RULES = ("floor", "even", "ceil", "rceil", "noclip", "mse")
assert set(_MX_RULES) - {"mse"} <= set(get_args(Rule))

NAMES = (*_MX_ELEMENTS, "nvfp4", "bfp16", "bfp", "mx6", "mx9")
"""What each of them takes in parentheses: MX formats a scale rule, nvfp4 `mse`, bfp `block=8 bits=8`."""


def expand(word: str) -> dict[str, str] | None:
    """The fields that a format's name sets, e.g. `mxfp4(even)`; None for a word that is no such name.

    Raises SpecError for something in parentheses that the format does not take.
    """
    found = re.fullmatch(r"([a-z0-9_]+)(?:\(([^()]*)\))?", word)
    if found is None or found[1] not in NAMES:
        return None
    name, inside = found[1], (found[2] or "").strip()
    if name in _MX_ELEMENTS:
        return _mx(name, inside, word)
    if name == "bfp":
        return _bfp(inside, word)
    if name == "nvfp4" and inside in ("", "mse"):
        return {"element": "e2m1", "group": "16", "scale": "e4m3", **({"observer": "mse"} if inside else {})}
    if inside:
        raise SpecError(f"{word}: {name} takes nothing in parentheses{' but mse' if name == 'nvfp4' else ''}; drop it")
    if name == "bfp16":
        return _bfp("block=8 bits=8", word)
    return {"element": {"mx6": "int5", "mx9": "int8"}[name], "group": "2", "scale": "micro(16)"}


def name_of(fields: Mapping[str, str | int | float]) -> tuple[str, frozenset[str]] | None:
    """The name whose fields `fields` holds, and which fields it covers; None where there is none."""
    if "group" not in fields:
        return None
    element, group, scale = (str(fields.get(name)) for name in ("element", "group", "scale"))
    own = frozenset(("element", "group", "scale"))
    mx = next((name for name, of in _MX_ELEMENTS.items() if of == element), None)
    rule = re.fullmatch(r"e8m0(?:\((\w+)\))?", scale)
    if rule is not None and rule[1] == "bfp" and re.fullmatch(r"int\d", element):
        bits = element.removeprefix("int")
        return ("bfp16" if (group, bits) == ("8", "8") else f"bfp(block={group} bits={bits})"), own
    if mx is not None and rule is not None and rule[1] != "bfp" and group == "32":
        if fields.get("observer") == "mse" and rule[1] is None:
            return f"{mx}(mse)", own | {"observer"}
        return mx + (f"({rule[1]})" if rule[1] else ""), own
    if (element, group, scale) == ("e2m1", "16", "e4m3"):
        return ("nvfp4(mse)", own | {"observer"}) if fields.get("observer") == "mse" else ("nvfp4", own)
    if (group, scale) == ("2", "micro(16)") and element in ("int5", "int8"):
        return ("mx6" if element == "int5" else "mx9"), own
    return None


def _mx(name: str, rule: str, word: str) -> dict[str, str]:
    if rule not in ("", *_MX_RULES):
        known = ", ".join(_MX_RULES)
        raise SpecError(f"{word}: unknown scale rule {rule!r}{nearest(rule, _MX_RULES)}; rules are {known}")
    fields = {"element": _MX_ELEMENTS[name], "group": "32", "scale": "e8m0"}
    if rule == "mse":
        return {**fields, "observer": "mse"}
    return fields if rule in ("", "floor") else {**fields, "scale": f"e8m0({rule})"}


def _bfp(inside: str, word: str) -> dict[str, str]:
    given = dict.fromkeys(("block", "bits"), "8")
    for part in inside.replace(",", " ").split():
        name, equals, value = part.partition("=")
        if name not in given or not equals or not value.isdigit():
            raise SpecError(f"{word}: {part!r} is neither block= nor bits=; write bfp(block=8 bits=8)")
        given[name] = value
    if not 2 <= int(given["bits"]) <= 8:
        raise SpecError(f"{word}: mantissas have 2 to 8 bits with their sign, not {given['bits']}; write bits=8")
    return {"element": f"int{given['bits']}", "group": given["block"], "scale": "e8m0(bfp)"}
