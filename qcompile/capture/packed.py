"""Which weights of a program lie densely packed in its files: codes, and the integers among their parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.numerics.packing import check_codes, code_range, pack, packed_bytes, unpack
from qcompile.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Packing:
    """How one weight lies in a file: `bits` an entry, dense where fewer than 8 (`qcompile.numerics.packing`)."""

    bits: int
    signed: bool
    shape: tuple[int, ...]
    lowest: int
    highest: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return packed_bytes(torch.Size(self.shape).numel(), self.bits)

    @property
    def dense(self) -> bool:
        """Whether the file holds a stream of bits; else it holds the codes as they are."""
        return self.bits < 8

    def pack(self, codes: Tensor, name: str) -> Tensor:
        """`codes` as they are written. Raises SpecError, with the weight's name, for one out of range."""
        check_codes(codes, self.lowest, self.highest, f"weight {name!r}")
        return pack(codes, self.bits) if self.dense else codes

    def unpack(self, stored: Tensor) -> Tensor:
        """The codes that were written. Raises SpecError for one out of range, and for a stream that is none."""
        codes = unpack(stored, self.bits, self.shape, self.signed) if self.dense else stored
        check_codes(codes, self.lowest, self.highest, "its codes")
        return codes


def packings(program: Program) -> dict[str, Packing]:
    """Weight → how it is packed, of all that `qcompile::dequantize` reads with stored codes, where it can be.

    Float scales are not in it, nor bytes that may hold any value, nor a weight that two readers take for different
    integers.
    """
    found: dict[str, Packing | None] = {}
    for node, spec in _stored(program):
        for key, packing in _parts(program, node, spec):
            found[key] = packing if found.get(key, packing) == packing else None
    return {key: packing for key, packing in found.items() if packing is not None}


def weight_parts(program: Program) -> dict[str, list[str]]:
    """Name of each weight that is stored as codes → its keys in the store: codes, scale, zero-point, outer parameters.

    What two weights share, a global scale, is listed with the first.
    """
    parts: dict[str, list[str]] = {}
    seen: set[str] = set()
    for node, spec in _stored(program):
        keys = [key for key, _ in _parts(program, node, spec)]
        new = [key for key in dict.fromkeys(keys) if key not in seen]
        parts.setdefault(keys[0].removesuffix(".codes"), []).extend(new)
        seen.update(new)
    return parts


def _stored(program: Program) -> Iterator[tuple[fx.Node, QuantSpec]]:
    """Every dequantize of a weight, with its spec."""
    for node in program.calls(torch.ops.qcompile.dequantize.default):
        if program.is_weight(program.arg(node, "codes")):
            yield node, QuantSpec.parse(str(program.arg(node, "spec")))


def _parts(program: Program, node: fx.Node, spec: QuantSpec) -> Iterator[tuple[str, Packing | None]]:
    """Keys of the codes and of the stored parameters, in that order, with the packing that `spec` gives them."""
    codes = program.arg(node, "codes")
    shape = tuple(codes.meta["val"].shape)
    yield program.key(codes), _packing(codes, spec.bits, spec.storage, (spec.qmin, spec.qmax))
    zero = program.arg(node, "zero_point")
    values = [program.arg(node, "scale"), *([] if zero is None else [zero]), *(program.arg(node, "outer") or [])]
    for value, parameter in zip(values, spec.parameters(shape), strict=False):
        if program.is_weight(value):
            ends = (spec.qmin, spec.qmax) if parameter.name == "zero_point" and spec.zero == "int" else None
            yield program.key(value), _packing(value, parameter.bits, parameter.dtype, ends)


def _packing(node: fx.Node, bits: int, dtype: torch.dtype, ends: tuple[int, int] | None) -> Packing | None:
    """None where entries are no integers of at most a byte, or may take every value of it."""
    value = node.meta["val"]
    if dtype not in (torch.int8, torch.uint8) or value.dtype != dtype:
        return None
    signed = dtype == torch.int8
    ends = ends or code_range(bits, signed)
    if bits == 8 and ends == code_range(8, signed):
        return None
    return Packing(bits, signed, tuple(value.shape), *ends)
