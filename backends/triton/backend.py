"""The triton target: its options and its verbs. What they do is in the files beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from qcompile.backend_base import Backend, LoweredFiles, Obstacle, register_backend
from qcompile.backends.triton.targets import DEFAULT, parse_gpus
from qcompile.ir.program import Program

if TYPE_CHECKING:
    from qcompile.backends.triton.runtime import TritonRunner


@register_backend
@dataclass(frozen=True)
class TritonBackend(Backend):
    """An executable: a graph whose quantized products are Triton kernels on packed weights, compiled ahead of time.

    - `gpu`: what to compile for, separated by commas; "none" leaves compiling to the machine that runs it.
    - `merge`: make products that read one value (q, k and v; gate and up) one product.
    """

    gpu: str = DEFAULT
    merge: bool = True

    name: ClassVar[str] = "triton"
    runtime: ClassVar[str] = "the Triton bundle"

    def __post_init__(self) -> None:
        parse_gpus(self.gpu)

    def require(self) -> None:
        """Raise LoweringError unless Triton is installed."""
        from qcompile.backends.triton.launch import require_triton

        require_triton()

    def obstacles(self, program: Program) -> list[Obstacle]:
        """Weights that are not rounded yet, and groups smaller than a kernel's step; no weight is read."""
        from qcompile.backends.triton.obstacles import obstacles

        return obstacles(program)

    def lower(self, program: Program, directory: Path) -> LoweredFiles:
        """Write the bundle's files (see `bundle`) into `directory`.

        Raises LoweringError for an obstacle, and where a kernel cannot be compiled; weights are read by segment.
        """
        from qcompile.backends.triton.lower import lower

        return lower(self, program, Path(directory))

    def load(self, directory: Path) -> TritonRunner:
        """The bundle on the GPU at hand, or on the CPU where there is none."""
        from qcompile.backends.triton.runtime import TritonRunner

        return TritonRunner(directory)

    def stored_codes(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """(weight name, codes as int8 or uint8 in the program's layout), unpacked from the files one at a time."""
        from qcompile.backends.triton.reading import stored_codes

        return stored_codes(Path(directory))

    def tune(self, directory: Path) -> list[str]:
        """Measure every configuration that has binaries on the GPU at hand; see `tune.tune`."""
        from qcompile.backends.triton.tune import tune

        return tune(Path(directory))

    def first_difference(self, program: Program, directory: Path, feeds: Mapping[str, Tensor], tolerance: float) -> str:
        """The first node whose value the bundle computes otherwise; see `reading.first_difference`."""
        from qcompile.backends.triton.reading import first_difference

        return first_difference(program, Path(directory), feeds, tolerance)
