"""Where an artifact and its program part: the first output, in program order, that is not the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, fx

from qcompile.backends.torch_mlir.runtime import IreeRunner
from qcompile.ir.program import Program


def first_difference(program: Program, directory: Path, feeds: Mapping[str, Tensor], tolerance: float) -> str:
    """Name of the output and of the node and module that it comes from; "unknown" where all are the same."""
    ours, expected = IreeRunner(directory).run(feeds), program.run(feeds)
    for name, node in sorted(program.outputs.items(), key=lambda item: item[1]._sort_key):
        if not isinstance(node, fx.Node) or name not in ours or not expected[name].is_floating_point():
            continue
        error = (ours[name].double() - expected[name].double()).abs().max()
        if not error <= tolerance * expected[name].double().abs().max():
            return f"{name}, which {node.name} of module {program.module_of(node) or 'top'} computes"
    return "unknown"
