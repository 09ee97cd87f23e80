"""What the Triton target cannot take, said before anything is done. Operators without a kernel run in torch."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from qcompile.backend_base import Obstacle
from qcompile.backends.onnx_qcdq.recognise import CHOOSE, QUANTIZE, parse_spec
from qcompile.backends.triton.formats import MIN_BLOCK_K, block_of
from qcompile.backends.triton.matching import quantized_weights
from qcompile.errors import SpecError
from qcompile.ir.program import Program
from qcompile.numerics.granularity import PerBlock, PerGroup


def obstacles(program: Program) -> list[Obstacle]:
    """Weights that are not rounded yet, and groups that are smaller than a step of a kernel."""
    found = [*_unrounded(program), *_small_groups(program)]
    return [Obstacle(node.name, program.module_of(node), reason) for node, reason in found]


def _unrounded(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for node in program.calls(CHOOSE, QUANTIZE):
        operand = program.arg(node, "x")
        try:
            spec = parse_spec(str(program.arg(node, "spec")))
        except SpecError as error:
            yield node, str(error)
            continue
        if program.is_weight(operand) and node.target is CHOOSE:
            key = program.key(operand)
            yield node, f"the weight {key!r} is not rounded yet ({spec}); run a pass that rounds weights, such as rtn"


def _small_groups(program: Program) -> Iterator[tuple[fx.Node, str]]:
    for weight in quantized_weights(program):
        granularity = weight.spec.granularity
        size = {PerGroup: "size", PerBlock: "columns"}.get(type(granularity))
        group = 0 if size is None else int(getattr(granularity, size))
        if group and block_of(group) is None:
            yield (
                weight.node,
                f"{weight.spec}: groups of {group} are not made of whole steps of a kernel (BLOCK_K is at least "
                f"{MIN_BLOCK_K}); use a multiple of {MIN_BLOCK_K}, or channel",
            )
