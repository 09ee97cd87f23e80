"""The torch_mlir target: its options and its verbs. What they do is in the files beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from qcompile.backend_base import Backend, LoweredFiles, Obstacle, register_backend
from qcompile.backends.torch_mlir.weights import Packing
from qcompile.errors import RecipeError
from qcompile.ir.program import Program

if TYPE_CHECKING:
    from qcompile.backends.torch_mlir.runtime import IreeRunner


@register_backend
@dataclass(frozen=True)
class TorchMlirBackend(Backend):
    """MLIR in the torch dialect, weights in safetensors files that are the runtime's parameters, compiled by IREE.

    - `packing`: ``packed`` stores codes of 4 and 2 bits two and four a byte (3 bits take 4), ``unpacked`` one a byte.
    - `shards`: ``none``; ``layers:N``, N modules with a file each, of ranges of segments; ``tensor:N``, one module
      whose products are dealt out over N devices.
    - `dialect`: ``iree``; ``brevitas`` writes products as `quant.matmul_rhs_group_quant`, text that nothing compiles.
    - `cpu`: what to compile for: ``host``, ``x86-64-v3``, ``znver4``, … (what iree-compile knows).
    - `opt_level`: of iree-compile, ``O0`` to ``O3``.
    - `data_tiling`: lay operands of products out in tiles; a module that fails with it is compiled again without.
    - `flags`: more flags for iree-compile.
    - `also`: GPUs to compile for beside the CPU, separated by commas (see `gpus`): compiled, not run.
    """

    packing: Packing = "packed"
    shards: str = "none"
    dialect: Literal["iree", "brevitas"] = "iree"
    cpu: str = "host"
    opt_level: str = "O3"
    data_tiling: bool = True
    flags: tuple[str, ...] = ()
    also: str = "none"

    name: ClassVar[str] = "torch_mlir"
    runtime: ClassVar[str] = "iree-runtime"

    def __post_init__(self) -> None:
        from qcompile.backends.torch_mlir.gpus import parse_gpus
        from qcompile.backends.torch_mlir.shards import Shards

        if self.packing not in ("packed", "unpacked"):
            raise RecipeError(f"torch_mlir has no packing={self.packing!r}; use packing=packed or packing=unpacked")
        if self.dialect not in ("iree", "brevitas"):
            raise RecipeError(f"torch_mlir has no dialect={self.dialect!r}; use dialect=iree or dialect=brevitas")
        if self.dialect == "brevitas" and self.shards != "none":
            raise RecipeError(f"dialect=brevitas is one function, not shards={self.shards}; use shards=none")
        if parse_gpus(self.also) and self.dialect == "brevitas":
            raise RecipeError(f"dialect=brevitas is compiled for nothing, not for also={self.also}; use dialect=iree")
        if self.opt_level not in ("O0", "O1", "O2", "O3"):
            raise RecipeError(f"opt_level={self.opt_level!r} is none of iree-compile's; use O0, O1, O2 or O3")
        Shards.parse(self.shards)
        object.__setattr__(self, "flags", tuple(self.flags))  # a manifest gives a list

    def obstacles(self, program: Program) -> list[Obstacle]:
        """Every operator, dtype and spec that this target cannot take; nothing is changed, no weight is read."""
        from qcompile.backends.torch_mlir.obstacles import obstacles

        return obstacles(program)

    def lower(self, program: Program, directory: Path) -> LoweredFiles:
        """Write MLIR, parameter files and, where iree-compile is installed, modules into `directory`.

        Raises LoweringError for an obstacle, and where iree-compile refuses; weights are read one at a time.
        """
        from qcompile.backends.torch_mlir.lower import lower

        return lower(self, program, Path(directory))

    def cannot_run(self) -> str | None:
        """Why nothing can be run: IREE is not installed, or the dialect is one that nothing compiles."""
        from qcompile.backends.torch_mlir.toolchain import missing

        if self.dialect == "brevitas":
            return f"no compiler lowers {self.dialect}'s operator; export with dialect=iree for an artifact that runs"
        return missing()

    def load(self, directory: Path) -> IreeRunner:
        """The artifact in iree-runtime, on the CPU's local devices."""
        from qcompile.backends.torch_mlir.runtime import IreeRunner

        return IreeRunner(directory)

    def stored_codes(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """(weight name, codes as int8 or uint8 in the program's layout), read back from the files one at a time."""
        from qcompile.backends.torch_mlir.params import read_codes
        from qcompile.backends.torch_mlir.plan import Plan

        for name, codes in Plan.read(Path(directory)).codes.items():
            yield name, read_codes(Path(directory), codes)

    def first_difference(self, program: Program, directory: Path, feeds: Mapping[str, Tensor], tolerance: float) -> str:
        """The first output that differs, in program order: a cache names the layer that it belongs to."""
        from qcompile.backends.torch_mlir.probe import first_difference

        return first_difference(program, Path(directory), feeds, tolerance)
