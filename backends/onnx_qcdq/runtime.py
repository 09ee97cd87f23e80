"""An artifact in onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.backends.onnx_qcdq.names import MAX_POSITIONS, program_name
from qcompile.errors import ArtifactError, QCompileError
from qcompile.generate import generate
from qcompile.ir.run import InputType, fill_inputs

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


class OnnxRunner:
    """A session over ``model.onnx``.

    Args:
        directory: the artifact.
        fast: let onnxruntime quantize the activations of products with 4- and 8-bit weights to int8 (its
            ``accuracy_level`` 4): faster, and off by some 5e-3 of the logits. Without it, they are exact to 1e-6.
        threads: threads of one operator; None leaves the choice to onnxruntime.

    Raises:
        QCompileError: onnxruntime is not installed.
        ArtifactError: there is no model, or onnxruntime does not load it.
    """

    def __init__(self, directory: str | Path, fast: bool = False, threads: int | None = None) -> None:
        self.directory = Path(directory)
        path = self.directory / "model.onnx"
        if not path.is_file():
            raise ArtifactError(f"{directory} has no model.onnx; give a directory exported with --target onnx_qcdq")
        self.session = open_session(path, fast, threads)
        self.inputs = {
            program_name(i.name): InputType(_DTYPES[i.type], tuple(d if isinstance(d, int) else None for d in i.shape))
            for i in self.session.get_inputs()
        }
        self.outputs = [program_name(output.name) for output in self.session.get_outputs()]
        self._names = {program_name(i.name): i.name for i in self.session.get_inputs()}

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; inputs by name, as the program calls them (``past_key_values_0_key``) or as the file does.

        Raises QCompileError for an input that is missing, unknown or of another rank or dtype than declared.
        """
        given = {program_name(name): tensor for name, tensor in feeds.items()}
        self._check(given)
        arrays = {self._names[name]: tensor.detach().cpu().contiguous().numpy() for name, tensor in given.items()}
        results = self.session.run(None, arrays)
        return {name: torch.from_numpy(np.asarray(r)) for name, r in zip(self.outputs, results, strict=True)}

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits ``[batch, sequence, vocabulary]`` for token ids int64 ``[batch, sequence]``."""
        return self({"input_ids": input_ids})["logits"]

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step of generation: what is not given is filled in, what the model does not take is left out."""
        taken = {name: tensor for name, tensor in feeds.items() if name in self.inputs}
        return self.run(fill_inputs(self.inputs, taken))

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for; None where it does not say."""
        told = self.session.get_modelmeta().custom_metadata_map.get(MAX_POSITIONS)
        return None if told is None else int(told)

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 32, eos_token_id: int | Sequence[int] | None = None
    ) -> Tensor:
        """Continue prompts int64 ``[batch, prompt]`` greedily with the cache; int64 ``[batch, prompt + new]``."""
        return generate(self, input_ids, max_new_tokens, eos_token_id=eos_token_id)

    def _check(self, feeds: Mapping[str, Tensor]) -> None:
        if missing := [name for name in self.inputs if name not in feeds]:
            raise QCompileError(f"input {missing[0]!r} is missing; the model takes {list(self.inputs)}")
        for name, tensor in feeds.items():
            if name not in self.inputs:
                raise QCompileError(f"input {name!r} is unknown; the model takes {list(self.inputs)}")
            kind = self.inputs[name]
            if tensor.dtype != kind.dtype or tensor.ndim != len(kind.sizes):
                wanted = f"{kind.dtype} of rank {len(kind.sizes)}"
                raise QCompileError(f"input {name!r} is {tensor.dtype}{list(tensor.shape)}; the model takes {wanted}")


def open_session(path: Path, fast: bool = False, threads: int | None = None, optimized: Path | None = None) -> Any:
    """An onnxruntime session on the CPU; `optimized` is where to leave the graph as onnxruntime rewrote it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise QCompileError("onnxruntime is not installed; run: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4" if fast else "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions share no base but this
        reason = " ".join(str(error).split())
        raise ArtifactError(f"onnxruntime {onnxruntime.__version__} does not load {path}: {reason[:300]}") from error
