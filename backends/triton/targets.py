"""The GPUs that binaries are compiled for, and what limits how many programs one of their multiprocessors holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qcompile.backends.triton.launch import Chip
from qcompile.errors import RecipeError, nearest


@dataclass(frozen=True)
class GPU:
    """A compilation target.

    Limits are those of one multiprocessor (NVIDIA, CUDA C++ Programming Guide, table of compute capabilities) or
    compute unit (AMD, CDNA 3 and 4 white papers): 32-bit registers (per lane of a SIMD for AMD), bytes of shared
    memory, also the most for one program, and threads.
    """

    name: str
    backend: str  # as Triton calls it: cuda or hip
    warp: int
    registers: int
    shared: int
    shared_a_program: int
    threads: int
    fp8: bool  # multiplies OCP e4m3fn
    scaled: bool  # multiplies microscaling formats

    @property
    def arch(self) -> int | str:
        """As Triton's GPUTarget takes it."""
        return int(self.name.removeprefix("sm_")) if self.backend == "cuda" else self.name

    @property
    def chip(self) -> Chip:
        """What decides how kernels are compiled for it."""
        return Chip(self.backend, self.fp8, self.fp8 or self.backend == "hip")

    @property
    def binary(self) -> str:
        """Ending of its binaries."""
        return "cubin" if self.backend == "cuda" else "hsaco"


_KB = 1024

GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("sm_80", "cuda", 32, 65536, 164 * _KB, 163 * _KB, 2048, False, False),
        GPU("sm_89", "cuda", 32, 65536, 100 * _KB, 99 * _KB, 1536, True, False),
        GPU("sm_90", "cuda", 32, 65536, 228 * _KB, 227 * _KB, 2048, True, False),
        GPU("sm_100", "cuda", 32, 65536, 228 * _KB, 227 * _KB, 2048, True, True),
        GPU("sm_120", "cuda", 32, 65536, 100 * _KB, 99 * _KB, 1536, True, True),
        GPU("gfx942", "hip", 64, 512, 64 * _KB, 64 * _KB, 2048, False, False),
        GPU("gfx950", "hip", 64, 512, 160 * _KB, 160 * _KB, 2048, True, True),
    )
}

DEFAULT = "sm_80,sm_90,sm_100,sm_120,gfx942,gfx950"


def parse_gpus(text: str | Sequence[str] | None) -> tuple[GPU, ...]:
    """The targets that `sm_90,gfx942` names; none for "" or "none". Raises RecipeError for an unknown one."""
    words: Iterable[str] = text.split(",") if isinstance(text, str) else text or ()
    names = [word.strip() for word in words if word.strip() not in ("", "none")]
    for name in names:
        if name not in GPUS:
            raise RecipeError(f"gpu {name!r} is unknown{nearest(name, GPUS)}; known: {', '.join(GPUS)}")
    return tuple(GPUS[name] for name in dict.fromkeys(names))


def occupancy(gpu: GPU, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's threads that can be resident, estimated from what a program uses.

    NVIDIA hands registers out to warps in units of 256, shared memory in units of 1 KB and 1 KB more a program. An AMD
    wave's vector registers come in units of 8 of a SIMD's 512 a lane; a compute unit has four SIMDs.

    >>> occupancy(GPUS["sm_90"], 4, 128, 48 << 10)
    0.25
    """
    threads = warps * gpu.warp
    if gpu.backend == "cuda":
        by_registers = gpu.registers // (warps * -(-registers * 32 // 256) * 256) if registers else gpu.threads
        by_shared = gpu.shared // (-(-shared // _KB) * _KB + _KB)
    else:
        waves = min(8, gpu.registers // (-(-max(1, registers) // 8) * 8))
        by_registers = 4 * waves // warps
        by_shared = gpu.shared // shared if shared else gpu.threads
    programs = min(by_registers, by_shared, gpu.threads // threads, 32)
    return programs * threads / gpu.threads
