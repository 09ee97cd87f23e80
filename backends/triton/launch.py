"""A kernel call as data: what is run just in time, compiled ahead, looked up in a bundle or only looked at.

    operator(x, …) ── plan ──▶ [Launch, …] ── Dispatcher.launch ──▶ JIT · cubin · interpreter

A launch names its kernel, its arguments in the kernel's order and its compile-time constants. `variant` is what one
compiled binary is good for: the constants, and the types of the arguments with what is known of their alignment.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from qcompile.errors import LoweringError

Argument: TypeAlias = Tensor | int
Constant: TypeAlias = int | float | bool | str

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
ALIGNMENT = 16
VARYING = frozenset(
    {"M", "MN", "runs", "runs_a_part", "steps", "steps_a_part", "parts", "tokens_a_part", "R", "S", "T", "ROWS"}
)
"""Integers that differ from call to call or from layer to layer: nothing is assumed of them."""


@dataclass(frozen=True)
class Config:
    """Tile sizes and resources of a kernel: what tuning chooses between. `parts` cuts K, and is no constant; `runs` of
    packed codes make a step.

    >>> str(Config(16, 64, parts=4)), str(Config(16, 64))
    ('m16_n64_w4_s3_partial', 'm16_n64_w4_s3')
    """

    block_m: int
    block_n: int
    warps: int = 4
    stages: int = 3
    parts: int = 1
    runs: int = 1

    @property
    def label(self) -> str:
        """All of it, as tuning writes it down."""
        return f"{self} parts={self.parts}"

    def __str__(self) -> str:
        """The name of the binary: parts differ by whether there are several."""
        end = ("_partial" if self.parts > 1 else "") + (f"_r{self.runs}" if self.runs > 1 else "")
        return f"m{self.block_m}_n{self.block_n}_w{self.warps}_s{self.stages}{end}"


@dataclass(frozen=True)
class Variant:
    """What one binary is compiled for.

    Args:
        kernel: `family.function`.
        signature: (argument, Triton type, whether it is a multiple of 16 bytes or of 16), in order.
        constants: compile-time values.
        warps, stages: as Triton takes them.
    """

    kernel: str
    signature: tuple[tuple[str, str, bool], ...]
    constants: tuple[tuple[str, Constant], ...]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        """Sixteen hexadecimal digits that differ where anything here does."""
        text = json.dumps([self.kernel, self.signature, self.constants, self.warps, self.stages])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of a kernel."""

    kernel: str
    arguments: Mapping[str, Argument]
    constants: Mapping[str, Constant]
    grid: tuple[int, int, int]
    config: Config

    @property
    def variant(self) -> Variant:
        """What the binary for this call must have been compiled for."""
        signature = tuple((name, *_type(name, value)) for name, value in self.arguments.items())
        return Variant(self.kernel, signature, tuple(self.constants.items()), self.config.warps, self.config.stages)


def _type(name: str, value: Argument) -> tuple[str, bool]:
    if isinstance(value, Tensor):
        aligned = value.device.type == "meta" or value.data_ptr() % ALIGNMENT == 0
        return POINTERS[value.dtype], aligned
    return "i32", name not in VARYING and value % ALIGNMENT == 0


EXACT, NATIVE, EMULATE = "exact", "native", "emulate"
"""Constants that stand for what a chip has: the precise product of float32 on tensor cores; whether it multiplies fp8;
what it computes block-scaled products in where its Triton knows no fp8."""


@dataclass(frozen=True)
class Chip:
    """What decides how kernels are compiled: Triton's backend (``cuda``, ``hip``; ``cpu`` for the interpreter), whether
    it multiplies OCP's e4m3, and whether Triton has that type there."""

    backend: str
    fp8: bool
    knows_fp8: bool = True


def for_chip(constants: Mapping[str, Constant], chip: Chip) -> dict[str, Constant]:
    """The constants with `EXACT`, `NATIVE` and `EMULATE` said in a chip's words."""
    words: dict[Constant, Constant] = {
        EXACT: "tf32x3" if chip.backend == "cuda" else "ieee",
        NATIVE: chip.fp8,
        EMULATE: "none" if chip.knows_fp8 else "bf16",
    }
    return {name: words.get(v, v) if isinstance(v, str) else v for name, v in constants.items()}


@cache
def current_chip() -> Chip:
    """The GPU at hand; the interpreter's where there is none."""
    if not torch.cuda.is_available():
        return Chip("cpu", False)
    if torch.version.hip:
        return Chip("hip", str(torch.cuda.get_device_properties(0).gcnArchName).startswith("gfx95"))
    fp8 = torch.cuda.get_device_capability() >= (8, 9)
    return Chip("cuda", fp8, fp8)


class Dispatcher(Protocol):
    """Who chooses configurations and runs kernels."""

    def choose(self, site: str, candidates: Sequence[Config]) -> Config:
        """One of `candidates` for a call that `site` describes; the first is the one to take where nothing is known."""
        ...

    def launch(self, launches: Sequence[Launch]) -> None:
        """Run kernels one after the other."""
        ...


class JustInTime:
    """Triton compiles what it meets. `package` is where the kernels are: this one's, or the copies of a bundle."""

    def __init__(self, package: str = "qcompile.backends.triton.kernels") -> None:
        self.package = package

    def choose(self, site: str, candidates: Sequence[Config]) -> Config:
        return candidates[0]

    def launch(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            kernel = wrapped(kernel_function(launch.kernel, self.package))
            options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages}
            constants = for_chip(launch.constants, current_chip())
            kernel[launch.grid](**launch.arguments, **constants, **options)


def wrapped(kernel: Any) -> Any:
    """The kernel as `torch.compile` and `torch.export` see into it; as it is where it is only interpreted."""
    from triton.runtime import JITFunction

    return torch.library.wrap_triton(kernel) if isinstance(kernel, JITFunction) else kernel


def kernel_function(name: str, package: str = "qcompile.backends.triton.kernels") -> Any:
    """The Triton function `family.function`. Raises LoweringError where Triton is not installed."""
    require_triton()
    family, _, function = name.partition(".")
    return getattr(importlib.import_module(f"{package}.{family}"), function)


def require_triton() -> None:
    """Raise LoweringError unless Triton can be imported."""
    if importlib.util.find_spec("triton") is None:
        raise LoweringError("triton is not installed; run on Linux: pip install triton")


_DISPATCHER: ContextVar[Dispatcher | None] = ContextVar("qcompile_triton_dispatcher", default=None)


def dispatcher() -> Dispatcher:
    """The dispatcher in use: that of `dispatching`, else just-in-time compilation."""
    return _DISPATCHER.get() or JustInTime()


@contextmanager
def dispatching(chosen: Dispatcher) -> Iterator[None]:
    """Let operators choose and launch through `chosen` until the block ends."""
    token = _DISPATCHER.set(chosen)
    try:
        yield
    finally:
        _DISPATCHER.reset(token)


Plan = Callable[..., tuple[Any, list[Launch]]]
"""From an operator's arguments to its (unwritten) results and the launches that write them."""


def bucket(rows: int) -> int:
    """The number of rows that stands for `rows` where configurations are chosen.

    >>> [bucket(rows) for rows in (1, 2, 16, 17, 200, 5000)]
    [1, 16, 16, 64, 256, 2048]
    """
    return next((size for size in BUCKETS if rows <= size), BUCKETS[-1])


BUCKETS = (1, 16, 64, 256, 2048)


def only_shapes(x: Tensor) -> bool:
    """Whether there is nothing to launch: sizes are symbols of a graph that is traced, or there is no row."""
    return any(not isinstance(size, int) for size in x.shape) or x.numel() == 0


def as_rows(x: Tensor, width: int) -> Tensor:
    """`x` as rows [M, width], copied where neighbours of a row are apart, or where a row starts at an address that
    binaries compiled for rows in a row do not expect."""
    rows = x.reshape(-1, width)
    aligned = rows.stride(0) % ALIGNMENT == 0 or width % ALIGNMENT != 0
    return rows if rows.stride(1) == 1 and aligned else rows.contiguous()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
