"""What the torch dialect has no operator for: products with quantized weights, rows of them, and moves to a device.

    qcompile_mlir::unpack(codes, scale, zero_point?, table?, steps?) -> Tensor
    qcompile_mlir::linear(x, codes, scale, zero_point?, table?, steps?) -> Tensor
    qcompile_mlir::rows(index, codes, scale, zero_point?, table?, steps?) -> Tensor
    qcompile_mlir::integer_linear(x, codes) -> Tensor
    qcompile_mlir::transfer(x, device) -> Tensor

They run in torch too, so that a program that is ready to be written can be compared with the one that it was made of.
Codes are int8 or uint8 ``[…, K]``, one a byte here whatever they are stored in; scale and zero-point ``[…, groups]``.
A code is worth itself (less its zero-point), or ``table[code]``, times its scale, or ``steps[scale]``; in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_VALUES = "Tensor codes, Tensor scale, Tensor? zero_point, Tensor? table, Tensor? steps"


def _unpack(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, table: Tensor | None, steps: Tensor | None
) -> Tensor:
    split = codes.view(*codes.shape[:-1], scale.shape[-1], -1)
    bits = split.view(torch.uint8).long()
    values = split.float() if table is None else table[bits]
    if zero_point is not None:
        values = values - zero_point.float()[..., None]
    step = scale.float() if steps is None else steps[scale.view(torch.uint8).long()]
    return (values * step[..., None]).flatten(-2)


def _linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    table: Tensor | None,
    steps: Tensor | None,
) -> Tensor:
    return x @ _unpack(codes, scale, zero_point, table, steps).T


def _rows(
    index: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    table: Tensor | None,
    steps: Tensor | None,
) -> Tensor:
    zero = None if zero_point is None else zero_point[index]
    return _unpack(codes[index], scale[index], zero, table, steps)


def _integer_linear(x: Tensor, codes: Tensor) -> Tensor:
    return (x.double() @ codes.double().T).to(torch.int32)  # exact: sums stay far below 2^53


def _transfer(x: Tensor, device: int) -> Tensor:
    return x.clone()


def _unpack_fake(codes: Tensor, scale: Tensor, *_: Any) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)


def _linear_fake(x: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _rows_fake(index: Tensor, codes: Tensor, *_: Any) -> Tensor:
    return codes.new_empty((*index.shape, *codes.shape[1:]), dtype=torch.float32)


def _integer_linear_fake(x: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.int32)


def _transfer_fake(x: Tensor, device: int) -> Tensor:
    return x.new_empty(x.shape)


for _name, _schema, _run, _fake in (
    ("unpack", f"({_VALUES}) -> Tensor", _unpack, _unpack_fake),
    ("linear", f"(Tensor x, {_VALUES}) -> Tensor", _linear, _linear_fake),
    ("rows", f"(Tensor index, {_VALUES}) -> Tensor", _rows, _rows_fake),
    ("integer_linear", "(Tensor x, Tensor codes) -> Tensor", _integer_linear, _integer_linear_fake),
    ("transfer", "(Tensor x, int device) -> Tensor", _transfer, _transfer_fake),
):
    torch.library.define(f"qcompile_mlir::{_name}", _schema)
    torch.library.impl(f"qcompile_mlir::{_name}", "CompositeExplicitAutograd", _run)
    torch.library.register_fake(f"qcompile_mlir::{_name}", _fake)

UNPACK = torch.ops.qcompile_mlir.unpack.default
LINEAR = torch.ops.qcompile_mlir.linear.default
ROWS = torch.ops.qcompile_mlir.rows.default
INTEGER_LINEAR = torch.ops.qcompile_mlir.integer_linear.default
TRANSFER = torch.ops.qcompile_mlir.transfer.default
