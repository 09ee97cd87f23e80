"""Where an artifact's values leave the Program's: its named intermediate values, computed by onnxruntime, compared."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq.names import public_name
from qcompile.backends.onnx_qcdq.runtime import open_session
from qcompile.ir.program import Program
from qcompile.ir.run import run


def first_difference(program: Program, directory: Path, feeds: Mapping[str, Tensor], tolerance: float) -> str:
    """The first node of `program` whose value differs by more than `tolerance` of its maximum, as ``module (node)``.

    Values become outputs for this, which keeps onnxruntime from fusing across them: where only a fused kernel is
    wrong, nothing differs here, and the answer says so.
    """
    import onnx

    model = onnx.load(str(directory / "model.onnx"), load_external_data=False)
    nodes = {node.name for node in program.nodes if isinstance(node.meta["val"], Tensor)}
    computed = [name for node in model.graph.node for name in node.output if name in nodes]
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in computed if name not in known)
    with tempfile.NamedTemporaryFile(dir=directory, suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        session = open_session(Path(file.name))
        arrays = {public_name(name): tensor.numpy() for name, tensor in feeds.items()}
        results = dict(zip(computed, session.run(computed, arrays), strict=True))
    found: list[str] = []

    def compare(node: fx.Node, value: Any) -> None:
        if not found and node.name in results and isinstance(value, Tensor) and value.is_floating_point():
            other = torch.from_numpy(results[node.name])
            scale = value.abs().max().clamp(min=1e-30) if value.numel() else 1.0
            if other.shape != value.shape or not bool(((other - value).abs() <= tolerance * scale).all()):
                found.append(f"{program.module_of(node) or 'top'} ({node.name})")

    run(program, feeds, compare)
    return found[0] if found else "in a fused kernel: no value differs while all are outputs"
