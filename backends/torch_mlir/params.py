"""Weights in safetensors files, which IREE maps as parameter files: written one at a time, read back to be checked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qcompile.backends.torch_mlir.pack import unpack_groups
from qcompile.backends.torch_mlir.plan import Codes
from qcompile.backends.torch_mlir.weights import Stored, read
from qcompile.errors import ArtifactError
from qcompile.ir.program import Program
from qcompile.numerics.packing import from_unsigned, unpack

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 64
"""Bytes. IREE uses mapped memory as it is where it lies on this boundary, and copies it where it does not."""


def write_parameters(path: Path, program: Program, items: Sequence[Stored]) -> int:
    """Write weights; returns the bytes of the file. One weight is in memory at a time.

    The header is padded so that data starts on a boundary; what keeps the next one on it comes first.
    """
    order = sorted(items, key=lambda item: (item.nbytes % _ALIGNMENT != 0, -item.dtype.itemsize, item.key))
    header: dict[str, object] = {}
    at = 0
    for item in order:
        header[item.key] = {
            "dtype": _NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [at, at + item.nbytes],
        }
        at += item.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for item in order:
            tensor = read(program, item)
            if tuple(tensor.shape) != item.shape or tensor.dtype != item.dtype:
                raise RuntimeError(f"{item.key} is {tensor.dtype}{list(tensor.shape)}, declared {item}")
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return 8 + len(text) + at


def read_codes(directory: Path, codes: Codes) -> Tensor:
    """The codes of one weight as int8 or uint8 in the program's layout, put together from its pieces."""
    from safetensors import SafetensorError, safe_open

    *rows, inputs = codes.shape
    parts = []
    for piece in codes.pieces:
        try:
            with safe_open(directory / piece.file, framework="pt") as file:
                stored: Tensor = file.get_tensor(piece.key)
        except (SafetensorError, FileNotFoundError, OSError) as error:
            raise ArtifactError(f"{directory / piece.file}: {piece.key}: {error}; export the artifact again") from None
        if codes.offset:
            unsigned = unpack(stored, codes.bits, (rows[0], inputs), signed=False)
            parts.append((piece, from_unsigned(unsigned, codes.bits, codes.signed)))
            continue
        flat = stored.reshape(-1, *stored.shape[-2:])
        if codes.bits == 8:
            found = flat.flatten(1) if codes.signed else flat.flatten(1).view(torch.uint8)
        else:
            found = unpack_groups(flat.contiguous(), codes.bits, codes.signed)
        parts.append((piece, found))
    if len(parts) == 1 and parts[0][0].axis is None:
        whole = parts[0][1].reshape(*rows, inputs)
    else:
        whole = torch.empty(rows[0], inputs, dtype=parts[0][1].dtype)
        for piece, found in parts:
            index = torch.cat([torch.arange(a, b) for a, b in piece.runs])
            if piece.axis == 0:
                whole[index] = found
            else:
                whole[:, index] = found
    return whole.T.contiguous() if codes.transposed else whole
