"""Other targets than the CPU: GPUs that a module is compiled for beside it, and not run.

    cuda:sm_80, vulkan    ⟶    model.cuda.vmfb, model.vulkan.vmfb

A target that the compiler fails on costs a note, not the export: the CPU's module is what an artifact is checked with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.backends.torch_mlir import toolchain
from qcompile.errors import RecipeError, nearest

ARCHES = {
    "cuda": ("sm_80", "sm_70", "sm_75", "sm_86", "sm_89", "sm_90"),
    "rocm": ("gfx942", "gfx90a", "gfx950", "gfx1100", "gfx1201"),
    "vulkan": ("rdna3", "rdna4", "ampere", "turing", "adreno", "valhall4"),
}
"""Families and their chips, the default first. iree-compile 3.13 refuses sm_90; PTX for sm_80 is forward compatible."""

_DEVICES = {"cuda": "cuda", "rocm": "hip", "vulkan": "vulkan"}


@dataclass(frozen=True)
class GPU:
    """A family of IREE's and a chip of it.

    >>> str(GPU("cuda", "sm_80"))
    'cuda:sm_80'
    """

    family: str
    arch: str

    def __str__(self) -> str:
        return f"{self.family}:{self.arch}"

    def flags(self, devices: int) -> list[str]:
        """Flags of iree-compile for so many of them."""
        device = _DEVICES[self.family]
        place = [f"--iree-hal-target-device={device}"]
        if devices > 1:
            place = [f"--iree-hal-target-device=__device_{i}={device}[{i}]" for i in range(devices)]
        return ["--iree-input-type=torch", *place, f"--iree-{self.family}-target={self.arch}"]


@dataclass(frozen=True)
class Built:
    """A run of the compiler for a GPU; `attempt.error` is None where it wrote `file`."""

    gpu: GPU
    file: str
    attempt: toolchain.Attempt

    def entry(self) -> dict[str, Any]:
        """For a manifest."""
        return {"target": str(self.gpu), "file": self.file, **self.attempt.entry()}


def parse_gpus(text: str) -> tuple[GPU, ...]:
    """What ``cuda:sm_80,vulkan`` names, a family alone standing for its default chip; nothing for ``none``.

    Raises RecipeError for a name that is unknown, and for two chips of one family: they would share a file.
    """
    known = {family: GPU(family, arches[0]) for family, arches in ARCHES.items()}
    known |= {f"{family}:{arch}": GPU(family, arch) for family, arches in ARCHES.items() for arch in arches}
    found: dict[str, GPU] = {}
    for name in (word.strip() for word in text.split(",")):
        if name in ("", "none"):
            continue
        if name not in known:
            raise RecipeError(f"also={name!r} is unknown{nearest(name, known)}; known: {', '.join(known)}")
        gpu = known[name]
        if found.setdefault(gpu.family, gpu) != gpu:
            raise RecipeError(f"also={text!r} names two chips of {gpu.family}, whose file is one; give one of them")
    return tuple(found.values())


def build(gpus: Iterable[GPU], mlir: Path, devices: int, level: str, flags: Iterable[str]) -> Iterator[Built]:
    """Compile a file of MLIR for each of them, beside it; a file is left only by a run that worked."""
    more = [*flags, f"--iree-opt-level={level}"]
    for gpu in gpus:
        out = mlir.with_suffix(f".{gpu.family}.vmfb")
        attempt = toolchain.attempt(mlir, out, [*gpu.flags(devices), *more])
        if attempt.error is not None:
            out.unlink(missing_ok=True)
        yield Built(gpu, out.name, attempt)


def notes(built: Iterable[Built]) -> Iterator[str]:
    """What became of each, a line each."""
    for one in built:
        if one.attempt.error is None:
            yield f"{one.gpu}: {one.file} was compiled, not run"
        else:
            yield f"{one.gpu}: iree-compile refuses {one.attempt.module}, no {one.file}: {one.attempt.error}"
