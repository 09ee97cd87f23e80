"""Writing a program as text: calls, inputs and weights by name, and the digits that every choice is read from."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from qcompile.ir.program import Program

BATCH, LENGTH, MEMORY = 2, 5, 3  # sizes of a program that fixes them
VOCABULARY, POSITIONS = 11, 16
END = 2**63 - 1  # where a slice to the end ends
T = TypeVar("T")


@dataclass
class Dice:
    """Choices read from a list of digits; once those run out, every choice is the first option: the plainest one."""

    digits: Sequence[int]
    place: int = 0

    def roll(self, sides: int) -> int:
        """A number below `sides`."""
        digit = self.digits[self.place] if self.place < len(self.digits) else 0
        self.place += 1
        return digit % sides

    def pick(self, *options: T) -> T:
        """One of the options."""
        return options[self.roll(len(options))]

    def rarely(self, one_in: int = 3) -> bool:
        """True once in so many; False when digits ran out."""
        return self.roll(one_in) == one_in - 1

    def often(self) -> bool:
        """True every other time; True when digits ran out."""
        return self.roll(2) == 0


@dataclass(frozen=True)
class _Line:
    name: str
    text: str
    reads: tuple[str, ...]


@dataclass
class Graph:
    """The text of one program as it grows. Values are known by their names in the text.

    `width` is the number of channels of the stream ``[batch, length, width]`` that blocks read and return. With
    `symbolic`, batch and length are symbols; else BATCH and LENGTH.
    """

    symbolic: bool
    seed: int
    width: int = 8
    table: str = ""  # the embedding's, where a head may be tied to it
    scope: str = ""
    maskable: bool = True  # the stream's tokens are those of the inputs
    _inputs: dict[str, str] = field(default_factory=dict)
    _weights: dict[str, str] = field(default_factory=dict)
    _tensors: dict[str, Tensor] = field(default_factory=dict)
    _lines: list[_Line] = field(default_factory=list)
    _outputs: dict[str, str] = field(default_factory=dict)
    _sizes: dict[str, str] = field(default_factory=dict)

    # -------------------------------------------------------------- inputs, sizes, weights

    def input(self, name: str, dtype: str, *sizes: str | int) -> str:
        """An input; sizes ``b``, ``s``, ``m`` (batch, length, memory) are symbols where the program has any."""
        fixed = {"b": BATCH, "s": LENGTH, "m": MEMORY}
        shown = [s if self.symbolic else fixed.get(str(s), s) for s in sizes]
        if name not in self._inputs:
            self._inputs[name] = f"{name}: {dtype}[{', '.join(map(str, shown))}]"
            for axis, size in enumerate(sizes):
                if isinstance(size, str) and size not in self._sizes:
                    self._sizes[size] = f"?{name} {axis}" if self.symbolic else str(fixed[size])
        return name

    def size(self, name: str) -> str:
        """The text for a size: a number, or the call that reads it from an input."""
        if self._sizes[name].startswith("?"):
            source, axis = self._sizes[name][1:].split()
            self._sizes[name] = self.call("sym_size.int", source, int(axis))
        return self._sizes[name]

    @property
    def b(self) -> str:
        """Batch."""
        return self.size("b")

    @property
    def s(self) -> str:
        """Length of the stream."""
        return self.size("s")

    def set_length(self, length: int | str) -> None:
        """The stream has another length from here on."""
        self._sizes["s"], self.maskable = str(length), False

    def weight(self, name: str, shape: Sequence[int], mean: float = 0.0, scale: float | None = None) -> str:
        """A float64 weight of the present scope; by default a matrix [out, …in] that keeps the variance."""
        if scale is None:
            scale = 1 / math.sqrt(math.prod(shape[1:]) if len(shape) > 1 else shape[0])
        key = f"{self.scope}.{name}".strip(".")
        random = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))
        return self._bind(key, mean + scale * torch.randn(list(shape), generator=random, dtype=torch.float64), "f64")

    def shuffle(self, name: str, count: int) -> str:
        """A permutation as an int64 weight."""
        key = f"{self.scope}.{name}".strip(".")
        random = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {key}".encode()))
        return self._bind(key, torch.randperm(count, generator=random), "i64")

    def gain(self, name: str, width: int) -> str:
        """A norm's gain: far from 1, some of it negative."""
        return self.weight(name, [width], 1.0, 0.5)

    def shift(self, name: str, width: int) -> str:
        """A bias: far from 0."""
        return self.weight(name, [width], 0.0, 0.4)

    def _bind(self, key: str, tensor: Tensor, dtype: str) -> str:
        name = key.replace(".", "_")
        if name not in self._weights:
            self._weights[name] = f'{name}: {dtype}[{", ".join(map(str, tensor.shape)) or "()"}] = "{key}"'
            self._tensors[key] = tensor
        assert self._tensors[key].shape == tensor.shape, key
        return name

    # -------------------------------------------------------------- calls

    def call(self, op: str, *args: Any, named: dict[str, Any] | None = None) -> str:
        """Append a call of an ATen operator (overload ``default`` unless written); its name. Text is a value's name."""
        full = op if op.startswith("operator.") else f"aten.{op}" if "." in op else f"aten.{op}.default"
        name = f"{op.split('.')[-1 if op.startswith('operator.') else 0].strip('_')}_{len(self._lines)}"
        given = [*map(_shown, args), *(f"{key}={_shown(value)}" for key, value in (named or {}).items())]
        reads = tuple(_names([*args, *(named or {}).values()]))
        self._lines.append(_Line(name, f"{name} = {full}({', '.join(given)})  # {self.scope}", reads))
        return name

    def item(self, parts: str, index: int) -> str:
        """One part of a call that returns several."""
        return self.call("operator.getitem", parts, index)

    def items(self, parts: str, count: int) -> list[str]:
        """All parts of a call that returns several."""
        return [self.item(parts, i) for i in range(count)]

    def add(self, x: str, y: str | float) -> str:
        """x + y."""
        return self.call("add.Tensor", x, y)

    def mul(self, x: str, y: str | float) -> str:
        """x · y, of tensors that broadcast or with a number."""
        return self.call("mul.Tensor", x, y)

    def view(self, x: str, *sizes: str | int, op: str = "view") -> str:
        """x in another shape."""
        return self.call(op, x, list(sizes))

    def swap(self, x: str, first: int, second: int) -> str:
        """x with two axes exchanged."""
        return self.call("transpose.int", x, first, second)

    def part(self, x: str, axis: int, start: int, end: int = END, step: int = 1) -> str:
        """x[start:end:step] along an axis."""
        return self.call("slice.Tensor", x, axis, start, end, step) if step != 1 else self._plain(x, axis, start, end)

    def _plain(self, x: str, axis: int, start: int, end: int) -> str:
        return self.call("slice.Tensor", x, axis, start, end)

    def activation(self, dice: Dice, x: str) -> str:
        """An elementwise function."""
        return self.call(dice.pick("relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "relu6", "softplus"), x)

    # -------------------------------------------------------------- the end

    def output(self, name: str, value: str) -> None:
        """Return a value; the first name given to it counts."""
        if value not in self._outputs.values():
            self._outputs[name] = value

    def program(self) -> Program:
        """The program, without the calls and weights that nothing reads."""
        alive, kept = set(self._outputs.values()), []
        for line in reversed(self._lines):
            if line.name in alive:
                alive.update(line.reads)
                kept.append(f"    {line.text}")
        inputs = ", ".join(self._inputs.values())
        weights = ", ".join(text for name, text in self._weights.items() if name in alive)
        shown = ", ".join(f'"{name}": {value}' for name, value in self._outputs.items())
        head = f"def main({inputs}{', *, ' + weights if weights else ''}):"
        text = "\n".join([head, *reversed(kept), f"    return {{{shown}}}"])
        read = {key: tensor for key, tensor in self._tensors.items() if key.replace(".", "_") in alive}
        return Program.parse(text, read)


def _shown(value: Any) -> str:
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else str(value)


def _names(values: Iterable[Any]) -> list[str]:
    found: list[str] = []
    for value in values:
        found += _names(value) if isinstance(value, list) else [value] if isinstance(value, str) else []
    return found
