"""Names of weights and modules, with the numbers of layers taken out and put back as ranges."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


def template(name: str) -> str:
    """A name with ``#`` for each part that is a number: ``layers.#.mlp.up_proj.weight``."""
    return _NUMBER.sub("#", name)


def ranges(numbers: Iterable[int]) -> str:
    """``0–31``, ``0, 2–5``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def merged(names: Iterable[str]) -> list[str]:
    """Names that differ in numbers only as one: ``layers.0–31.mlp.up_proj``; in the order of the first of each."""
    numbers: dict[str, list[list[int]]] = {}
    for name in names:
        numbers.setdefault(template(name), []).append([int(n) for n in _NUMBER.findall(name)])
    result = []
    for form, rows in numbers.items():
        spans = iter([_span(column) for column in zip(*rows, strict=True)])
        result.append(re.sub("#", lambda _, s=spans: next(s), form))  # type: ignore[misc]
    return result


def _span(column: Sequence[int]) -> str:
    text = ranges(column)
    return f"[{text}]" if "," in text else text


def plain(name: str) -> str:
    """A weight's name less what says nothing: ``model.layers.0.mlp.up_proj.weight`` → ``layers.0.mlp.up_proj``."""
    return re.sub(r"^(?:model|transformer)\.(?:(?:decoder|model)\.)?", "", name).removesuffix(".weight")


def common(names: Sequence[str]) -> str:
    """The dotted parts that all names start with, short of the last part of each."""
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return ".".join(shared)


def within(name: str, prefix: str) -> str:
    """A name as seen from a module."""
    return name.removeprefix(f"{prefix}.") if prefix else name


def braced(names: Iterable[str]) -> str:
    """Names with what they share said once: ``layers.0–5.{self_attn.o_proj, mlp.down_proj}, norm``."""
    tree: dict[str, list[str]] = {}
    for name in names:
        head, _, rest = name.partition(".")
        tree.setdefault(head, []).append(rest)
    parts = []
    for head, rests in tree.items():
        below = braced(r for r in rests if r)
        parts += [head] if "" in rests else []
        if below:
            several = len({r.partition(".")[0] for r in rests if r}) > 1
            parts.append(f"{head}.{{{below}}}" if several else f"{head}.{below}")
    return ", ".join(parts)
