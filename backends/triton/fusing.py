"""What stands in front of a quantization becomes part of it, and transforms become kernels.

    quantize_rows(rms_norm(x, gain, eps))     ⟶   quantize_rows(x, gain, eps)
    quantize_rows(hadamard(x))                ⟶   hadamard_quantize(x)         where a run is a row
    hadamard(x)                               ⟶   the kernel's hadamard(x)

Only where nothing else reads the value in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.backends.onnx_qcdq.recognise import shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter
from qcompile.backends.triton.matching import FLOATS
from qcompile.backends.triton.ops.hadamard import TRANSFORM, TRANSFORM_QUANTIZE, factors
from qcompile.backends.triton.ops.quantize_rows import QUANTIZE_ROWS
from qcompile.hadamard.op import HADAMARD
from qcompile.ir.program import Program
from qcompile.numerics.granularity import PerToken
from qcompile.ops import parse_spec

aten = torch.ops.aten


def fuse(rewriter: Rewriter) -> dict[str, int]:
    """Do it; how often, by what was done."""
    program, done = rewriter.program, {"norms": 0, "transforms with codes": 0, "transforms": 0}
    for node in program.calls(QUANTIZE_ROWS):
        source = program.arg(node, "x")
        if not _alone(source, node):
            continue
        if source.target is aten.rms_norm.default and _fuses_norm(program, source):
            eps = program.arg(source, "eps")
            eps = torch.finfo(node.args[0].meta["val"].dtype).eps if eps is None else eps  # type: ignore[union-attr]
            inputs = (program.arg(source, "input"), program.arg(source, "weight"), float(eps))
            rewriter.replace(node, rewriter.call(node, QUANTIZE_ROWS, *inputs, program.arg(node, "spec")))
            done["norms"] += 1
        elif source.target is HADAMARD and _fuses_transform(program, source, node):
            arguments = _arguments(program, source)
            rewriter.replace(node, rewriter.call(node, TRANSFORM_QUANTIZE, *arguments, program.arg(node, "spec")))
            done["transforms with codes"] += 1
    program.refresh()
    for node in program.calls(HADAMARD):
        if _has_kernel(program, node):
            rewriter.replace(node, rewriter.call(node, TRANSFORM, *_arguments(program, node)))
            done["transforms"] += 1
    return {what: count for what, count in done.items() if count}


def _alone(source: Any, reader: fx.Node) -> bool:
    return isinstance(source, fx.Node) and source.op == "call_function" and set(source.users) == {reader}


def _fuses_norm(program: Program, norm: fx.Node) -> bool:
    """Over the last axis, with a gain that is a weight."""
    gain, shape = program.arg(norm, "weight"), program.arg(norm, "normalized_shape")
    return len(shape) == 1 and gain is not None and program.is_weight(gain)


def _has_kernel(program: Program, node: fx.Node) -> bool:
    split = factors(int(program.arg(node, "order")), int(program.arg(node, "block")))
    return split is not None and node.meta["val"].dtype in FLOATS


def _fuses_transform(program: Program, transform: fx.Node, reader: fx.Node) -> bool:
    spec = parse_spec(str(program.arg(reader, "spec")))
    row = shape_of(transform)[-1] == program.arg(transform, "block")
    return row and isinstance(spec.granularity, PerToken) and _has_kernel(program, transform)


def _arguments(program: Program, node: fx.Node) -> tuple[Any, ...]:
    return tuple(program.arg(node, name) for name in ("x", "order", "block", "inverse"))
