"""The onnx_qcdq target: its options and its verbs. What they do is in the files beside this one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

from torch import Tensor

from qcompile.backend_base import Backend, LoweredFiles, Obstacle, register_backend
from qcompile.errors import RecipeError
from qcompile.ir.program import Program

if TYPE_CHECKING:
    from qcompile.backends.onnx_qcdq.runtime import OnnxRunner

Style: TypeAlias = Literal["fused", "qcdq"]

OPSETS = range(21, 26)
"""int4 and blocked scales came with opset 21; 25 brought two-bit integers."""


@register_backend
@dataclass(frozen=True)
class OnnxQcdqBackend(Backend):
    """ONNX files with quantized weights as DequantizeLinear and quantized activations as Quantize-, DequantizeLinear.

    - `opset`: 21 to 25. From 25 on, codes of 2 bits or fewer are stored in 2 bits instead of 4.
    - `style`: ``fused`` writes quantized activations in the forms that onnxruntime turns into integer kernels;
      ``qcdq`` writes every one as QuantizeLinear, Clip, DequantizeLinear with its own scale, for tools that look for
      that pattern (onnxruntime runs it in floating point, much slower).
    - `external_data_threshold`: tensors of more bytes than this go to ``model.onnx.data``, the others into
      ``model.onnx``.
    """

    opset: int = 21
    style: Style = "fused"
    external_data_threshold: int = 256

    name: ClassVar[str] = "onnx_qcdq"
    runtime: ClassVar[str] = "onnxruntime"

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise RecipeError(
                f"onnx_qcdq writes opset {OPSETS[0]} to {OPSETS[-1]}, not opset={self.opset}; use opset=21"
            )
        if self.style not in ("fused", "qcdq"):
            raise RecipeError(f"onnx_qcdq has no style={self.style!r}; use style=fused or style=qcdq")
        if self.external_data_threshold < 0:
            raise RecipeError(f"external_data_threshold={self.external_data_threshold} is negative; use 256")

    def obstacles(self, program: Program) -> list[Obstacle]:
        """Every operator, dtype and spec that this target cannot take; nothing is changed, no weight is read."""
        from qcompile.backends.onnx_qcdq.obstacles import obstacles

        return obstacles(program)

    def lower(self, program: Program, directory: Path) -> LoweredFiles:
        """Write ``model.onnx`` and ``model.onnx.data`` (and ``genai_config.json`` for a decoder) into `directory`.

        Raises LoweringError for an obstacle, and where ONNX conversion fails; weights are read one at a time.
        """
        from qcompile.backends.onnx_qcdq.lower import lower

        return lower(self, program, Path(directory))

    def load(self, directory: Path) -> OnnxRunner:
        """The artifact in onnxruntime, computing weights exactly (``OnnxRunner(directory, fast=True)`` does not)."""
        from qcompile.backends.onnx_qcdq.runtime import OnnxRunner

        return OnnxRunner(directory)

    def stored_codes(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """(weight name, codes as int8 or uint8 in the program's layout), read back from the files one at a time."""
        from qcompile.backends.onnx_qcdq.pack import stored_codes

        return stored_codes(Path(directory))

    def first_difference(self, program: Program, directory: Path, feeds: Mapping[str, Tensor], tolerance: float) -> str:
        """The first node whose value onnxruntime computes otherwise; see `probe.first_difference`."""
        from qcompile.backends.onnx_qcdq.probe import first_difference

        return first_difference(program, Path(directory), feeds, tolerance)
