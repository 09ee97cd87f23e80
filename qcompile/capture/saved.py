"""Programs on disk: `program.qir` (text), `program.json` (what the text does not say), `weights-*.safetensors`.

Everything is streamed: writing and loading hold one tensor at a time, and a loaded program reads its weights from the
files, when they are touched. Codes of fewer than eight bits lie densely packed, 3 bits in 3 bits; `program.json` says
of which weight, how many bits, and of what shape. They are unpacked, and checked, as they are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from qcompile.capture.files import read_json, tokenizer_path
from qcompile.capture.packed import Packing, packings
from qcompile.capture.shards import read_store, write_store
from qcompile.errors import ArtifactError, CaptureError, SpecError, VerifyError
from qcompile.ir.program import Program
from qcompile.ir.weights import WeightStore

MAIN = "program.qir"
_DETAILS = "program.json"
_SHARD_BYTES = 2 << 30


def save_program(program: Program, directory: str | Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write `program` and all its weights, recorded edits applied, into `directory` (made where absent).

    Args:
        shard_bytes: upper bound of a weight file's data; a larger tensor has a file of its own.

    Raises:
        ArtifactError: the directory holds a saved program already.
        SpecError: codes lie outside the range of their spec.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / MAIN).exists():
        raise ArtifactError(f"{directory} holds a program already; choose another directory")
    keys = [program.key(node) for node in program.weight_nodes]
    packed = packings(program)
    details = {
        "info": program.info,
        "weights": write_store(_packed(program.weights, packed), keys, directory, shard_bytes),
        "packed": {key: asdict(packing) for key, packing in packed.items()},
        "ranges": _ranges(program),
        "calling_convention": _convention(program),
    }
    (directory / _DETAILS).write_text(json.dumps(details, indent=1), encoding="utf-8")
    (directory / MAIN).write_text(str(program) + "\n", encoding="utf-8")  # last: with it, the program is there


def load_program(directory: str | Path) -> Program:
    """The program that `save_program` wrote; weights are read from its files when touched, bit for bit.

    Raises CaptureError where a file is missing, truncated, or does not belong to the others; reading a weight whose
    codes were changed to what its spec has not raises it, too.
    """
    directory = Path(directory)
    if not (directory / MAIN).is_file():
        raise CaptureError(f"{directory} holds no {MAIN}; give a directory that a program was saved to")
    details = read_json(directory / _DETAILS) if (directory / _DETAILS).is_file() else None
    if details is None:
        raise CaptureError(f"{directory} lacks {_DETAILS}; save the program again")
    try:
        store = read_store(directory, details["weights"])
        packed = {key: Packing(**entry | {"shape": tuple(entry["shape"])}) for key, entry in details["packed"].items()}
        for key, packing in packed.items():
            _unpack(store, key, packing, directory)
        program = Program.parse((directory / MAIN).read_text(encoding="utf-8"), store)
        _check_packed(program, packed, directory)
        program.info = dict(details["info"])
        _restore_ranges(program, details["ranges"])
        convention = details["calling_convention"]
        if convention is not None:
            program.calling_convention = (pytree.treespec_loads(convention[0]), pytree.treespec_loads(convention[1]))
    except (VerifyError, KeyError, TypeError) as error:
        raise CaptureError(f"{directory} is not a program that this version saved: {error}") from error
    program.info["tokenizer"] = tokenizer_path(directory) or program.info.get("tokenizer")
    return program


def _packed(store: WeightStore, packed: Mapping[str, Packing]) -> WeightStore:
    """The same weights as they are written."""
    store = store.copy()
    for key, packing in packed.items():
        shape, dtype = ((packing.nbytes,), torch.uint8) if packing.dense else store.meta(key)
        store.edit(key, partial(packing.pack, name=key), shape, dtype)
    return store


def _unpack(store: WeightStore, key: str, packing: Packing, directory: Path) -> None:
    """Let `key` be read unpacked and checked."""

    def read(stored: Tensor) -> Tensor:
        try:
            return packing.unpack(stored)
        except SpecError as error:
            raise CaptureError(f"{directory}: weight {key!r}: {error}") from error

    if packing.dense and store.meta(key) != ((packing.nbytes,), torch.uint8):
        raise CaptureError(
            f"{directory}: weight {key!r} of {packing.bits} bits and shape {list(packing.shape)} takes "
            f"{packing.nbytes} bytes, not {store.nbytes(key)}; save the program again"
        )
    store.edit(key, read, packing.shape, torch.int8 if packing.signed else torch.uint8)


def _check_packed(program: Program, packed: Mapping[str, Packing], directory: Path) -> None:
    """CaptureError where the program's specs ask for another packing of a weight than its file has."""
    wanted = packings(program)
    if (key := next((k for k in wanted.keys() | packed.keys() if wanted.get(k) != packed.get(k)), None)) is not None:
        raise CaptureError(
            f"{directory}: weight {key!r} is stored as {packed.get(key) or 'plain codes'}, and the program reads "
            f"{wanted.get(key) or 'plain codes'}; save the program again"
        )


def _ranges(program: Program) -> dict[str, list[int | None]]:
    """Bounds of each named size; None is unbounded."""
    shape_env = program.fake_mode.shape_env
    if shape_env is None:
        return {}
    return {
        name: [_bound(shape_env.var_to_range[s].lower), _bound(shape_env.var_to_range[s].upper)]
        for s, name in program.symbols.items()
        if s in shape_env.var_to_range
    }


def _bound(value: sympy.Expr) -> int | None:
    return int(value) if value.is_Integer else None


def _restore_ranges(program: Program, ranges: dict[str, list[int | None]]) -> None:
    shape_env = program.fake_mode.shape_env
    for symbol, name in program.symbols.items():
        if shape_env is not None and name in ranges:
            low, high = ranges[name]
            shape_env.var_to_range[symbol] = ValueRanges(
                -int_oo if low is None else low, int_oo if high is None else high
            )


def _convention(program: Program) -> list[str] | None:
    """How the exported program is called, where torch can write that down."""
    if program.calling_convention is None:
        return None
    try:
        return [pytree.treespec_dumps(spec) for spec in program.calling_convention]
    except (NotImplementedError, TypeError):  # a container class of the model's own
        return None
