"""Programs on disk: `program.qir` (text), `program.json` (what the text does not say), `weights-*.safetensors`.

Everything is streamed: writing and loading hold one tensor at a time, and a loaded program reads its weights from the
files, when they are touched.
"""

from __future__ import annotations

import json
from pathlib import Path

import sympy
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from qcompile.capture.files import read_json, tokenizer_path
from qcompile.capture.shards import read_store, write_store
from qcompile.errors import ArtifactError, CaptureError, VerifyError
from qcompile.ir.program import Program

MAIN = "program.qir"
_DETAILS = "program.json"
_SHARD_BYTES = 2 << 30


def save_program(program: Program, directory: str | Path, shard_bytes: int = _SHARD_BYTES) -> None:
    """Write `program` and all its weights, recorded edits applied, into `directory` (made where absent).

    Args:
        shard_bytes: upper bound of a weight file's data; a larger tensor has a file of its own.

    Raises:
        ArtifactError: the directory holds a saved program already.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / MAIN).exists():
        raise ArtifactError(f"{directory} holds a program already; choose another directory")
    keys = [program.key(node) for node in program.weight_nodes]
    details = {
        "info": program.info,
        "weights": write_store(program.weights, keys, directory, shard_bytes),
        "ranges": _ranges(program),
        "calling_convention": _convention(program),
    }
    (directory / _DETAILS).write_text(json.dumps(details, indent=1), encoding="utf-8")
    (directory / MAIN).write_text(str(program) + "\n", encoding="utf-8")  # last: with it, the program is there


def load_program(directory: str | Path) -> Program:
    """The program that `save_program` wrote; weights are read from its files when touched, bit for bit.

    Raises CaptureError where a file is missing, truncated, or does not belong to the others.
    """
    directory = Path(directory)
    if not (directory / MAIN).is_file():
        raise CaptureError(f"{directory} holds no {MAIN}; give a directory that a program was saved to")
    details = read_json(directory / _DETAILS) if (directory / _DETAILS).is_file() else None
    if details is None:
        raise CaptureError(f"{directory} lacks {_DETAILS}; save the program again")
    try:
        store = read_store(directory, details["weights"])
        program = Program.parse((directory / MAIN).read_text(encoding="utf-8"), store)
        program.info = dict(details["info"])
        _restore_ranges(program, details["ranges"])
        convention = details["calling_convention"]
        if convention is not None:
            program.calling_convention = (pytree.treespec_loads(convention[0]), pytree.treespec_loads(convention[1]))
    except (VerifyError, KeyError, TypeError) as error:
        raise CaptureError(f"{directory} is not a program that this version saved: {error}") from error
    program.info["tokenizer"] = tokenizer_path(directory) or program.info.get("tokenizer")
    return program


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
