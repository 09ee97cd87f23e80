"""Text that the model writes itself: calibration data that needs no data (as in LLM-QAT, Liu et al. 2023)."""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.generate import Decoding, ProgramStepper, Sampling, held_weights
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr
from qcompile.progress import track

_FORMAT = "1"  # of the files kept; a change of how text is written must change it
_CACHE_BYTES = 256 << 20  # of keys and values held while writing: sets how many rows are written at a time
_LOGIT_BYTES = 64 << 20
_ROWS = 64


def generated_tokens(program: Program, samples: int, length: int, seed: int, folder: Path | None = None) -> Tensor:
    """Sequences ``[samples, length]`` (int64) that `program` writes, sampled at temperature 1.

    Each begins with the token that begins a text (a random token where the model has none) and, after a token that
    ends one, begins again. What was written is kept in `folder` (`cache_folder()` if None) and read from there when the
    same program is asked the same again.

    Raises QCompileError where the program does not return the logits of a causal language model.
    """
    where = (folder or cache_folder()) / "generated"
    file = where / f"{_key(program, samples, length, seed)}.safetensors"
    tokens = _load(file, (samples, length))
    if tokens is None:
        tokens = write_tokens(program, samples, length, seed)
        _save(file, tokens)
    return tokens


@torch.no_grad()
def write_tokens(program: Program, samples: int, length: int, seed: int, rows: int | None = None) -> Tensor:
    """As `generated_tokens`, without the file. Rows do not depend on how many are written at a time (`rows`)."""
    if "logits" not in program.output_names or all(node.name != "input_ids" for node in program.inputs):
        raise QCompileError(
            f"a program of {[n.name for n in program.inputs]} → {list(program.output_names)[:3]} writes no text; "
            "give data= (token rows, a text file, a dataset)"
        )
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(samples, length, generator=generator, dtype=torch.float64)
    step, sampling = ProgramStepper(program), Sampling(temperature=1.0)
    bos, eos = program.info.get("bos_token_id"), program.info.get("eos_token_id")
    ends = torch.tensor(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos], dtype=torch.int64)
    if isinstance(bos, (list, tuple)):
        bos = bos[0] if bos else None
    first = (noise[:, 0] * _vocabulary(program)).long() if bos is None else torch.full((samples,), int(bos))
    if rows is None:
        rows = _rows_at_once(program, length)
    parts = torch.split(noise, rows)
    columns: list[list[Tensor]] = [[start] for start in torch.split(first, rows)]
    steps = ((part, index) for part in range(len(parts)) for index in range(1, length))
    decoding = None
    with held_weights(program):
        for part, index in track(steps, "writing calibration text", len(parts) * (length - 1)):
            written = columns[part]
            if index == 1:
                decoding = Decoding(step, written[0][:, None])
            else:
                assert decoding is not None
                decoding.append(written[-1])
            chosen = sampling.choose(decoding.logits(), parts[part][:, index])
            if bos is not None:  # a new text after the end of one
                chosen = torch.where(torch.isin(written[-1], ends), int(bos), chosen)
            written.append(chosen)
    return torch.cat([torch.stack(written, dim=1) for written in columns])


def cache_folder() -> Path:
    """Where things are kept that can be made again: the platform's folder of the user's caches."""
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named) / "qcompile"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "qcompile"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "qcompile" / "Cache"
    return Path.home() / ".cache" / "qcompile"


def program_fingerprint(program: Program, probes: int = 16) -> str:
    """SHA-256 of the graph and of `probes` evenly spaced elements of every weight: cheap where weights are mapped."""
    digest = hashlib.sha256(str(program).encode())
    for key in sorted(program.weights):
        tensor = program.weights[key].flatten()
        places = torch.linspace(0, max(0, tensor.numel() - 1), min(probes, tensor.numel()), dtype=torch.float64).long()
        values = tensor[places].to(torch.float64).numpy() if tensor.numel() else b""
        digest.update(f"{key} {program.weights.meta(key)}".encode())
        digest.update(values if isinstance(values, bytes) else values.tobytes())
    return digest.hexdigest()


def _key(program: Program, samples: int, length: int, seed: int) -> str:
    ends = (program.info.get("bos_token_id"), program.info.get("eos_token_id"))
    text = f"{_FORMAT} {program_fingerprint(program)} {samples} {length} {seed} {ends}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _vocabulary(program: Program) -> int:
    size = program.info.get("vocab_size")
    if size is None:
        size = dim_expr(program.outputs["logits"].meta["val"].shape[-1])
    if not isinstance(size, int):
        raise QCompileError("the program has no bos_token_id and does not say its vocab_size; give data=")
    return size


def _rows_at_once(program: Program, length: int) -> int:
    """Rows whose keys, values and logits stay within the bounds above."""
    row = 0
    for node in program.inputs:
        if node.name.startswith("past_key_values_"):
            fixed = [d for d in map(dim_expr, node.meta["val"].shape) if isinstance(d, int)]
            row += math.prod(fixed) * length * node.meta["val"].dtype.itemsize
    vocabulary = program.info.get("vocab_size") or 0
    tokens = 1 if row else length  # without a cache, all of the text so far goes through at every step
    most = min(_CACHE_BYTES // max(1, row), _LOGIT_BYTES // max(1, int(vocabulary) * 8 * tokens), _ROWS)
    return max(1, most)


def _load(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """What is kept, or None where nothing is or it does not read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        return None
    try:
        tokens = load_file(file).get("tokens")
    except (OSError, SafetensorError):
        return None  # cut short or damaged: written again
    return tokens.to(torch.int64) if tokens is not None and tuple(tokens.shape) == shape else None


def _save(file: Path, tokens: Tensor) -> None:
    """Written beside and renamed, so that there is never half of it; a folder that cannot be written is no failure."""
    from safetensors.torch import save

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            part.write(save({"tokens": tokens.to(torch.int32)}))
        os.replace(part.name, file)
    except OSError as error:
        warnings.warn(f"the generated text is not kept for the next time: {error}", stacklevel=2)
