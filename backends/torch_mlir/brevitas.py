"""The dialect that Brevitas once wrote: products as `quant.matmul_rhs_group_quant`, and the operands of that.

    %y = torch.operator "quant.matmul_rhs_group_quant"(%x, %rhs, %scale, %zero_point, %bit_width, %group_size)

Text for tools that know the operator; no compiler of today lowers it, so nothing is run. A product is written so where
its weight is of integers with float scales; any other stays what it is otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq.rewriting import Derived, Rewriter
from qcompile.backends.torch_mlir import ops
from qcompile.backends.torch_mlir.kernels import CONTAINER
from qcompile.backends.torch_mlir.pack import MatmulRhs, pack_matmul_rhs, unpack_matmul_rhs
from qcompile.errors import LoweringError
from qcompile.ir.program import Program

OPERATOR = "quant.matmul_rhs_group_quant"
RHS, SCALE, ZERO = "@rhs", "@rhs_scale", "@rhs_zero_point"
OFFSET = "offset"
"""Key in the meta of a weight that holds packed codes: (bits, whether half their range was added to them)."""


def _matmul(x: Tensor, rhs: Tensor, scale: Tensor, zero_point: Tensor, bit_width: int, group_size: int) -> Tensor:
    codes, steps, zeros = unpack_matmul_rhs(MatmulRhs(rhs, scale, zero_point, bit_width, group_size), signed=False)
    values = codes.view(len(codes), -1, group_size).float() - zeros.float()[..., None]
    weight: Tensor = (values * steps.float()[..., None]).flatten(-2)
    return x @ weight.T


def _fake(x: Tensor, rhs: Tensor, scale: Tensor, zero_point: Tensor, bit_width: int, group_size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rhs.shape[0]))


torch.library.define(
    "qcompile_mlir::matmul_rhs_group_quant",
    "(Tensor x, Tensor rhs, Tensor rhs_scale, Tensor rhs_zero_point, int bit_width, int group_size) -> Tensor",
)
torch.library.impl("qcompile_mlir::matmul_rhs_group_quant", "CompositeExplicitAutograd", _matmul)
torch.library.register_fake("qcompile_mlir::matmul_rhs_group_quant", _fake)
MATMUL = torch.ops.qcompile_mlir.matmul_rhs_group_quant.default


@dataclass(frozen=True)
class _Part:
    """One operand of the operator, packed when it is read."""

    name: str
    bits: int

    def __call__(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
        packed = pack_matmul_rhs(codes, scale, zero_point, self.bits)
        found: Tensor = getattr(packed, self.name)
        return found


def to_brevitas(program: Program) -> tuple[Program, int]:
    """A prelowered program with its products as the operator, and how many. A copy is rewritten.

    Raises LoweringError where something else reads a quantized weight: the torch dialect alone has no form for that.
    """
    rewriter = Rewriter(program)
    count = 0
    for node in rewriter.program.calls(ops.LINEAR, ops.INTEGER_LINEAR, ops.ROWS, ops.UNPACK):
        made = _product(rewriter, program, node) if node.target is ops.LINEAR else None
        if made is None:
            raise LoweringError(
                f"{node.name} (module {program.module_of(node) or 'top'}) is no {OPERATOR} of integers with float "
                "scales; use dialect=iree, or leave that weight float"
            )
        rewriter.replace(node, made)
        count += 1
    rewriter.program.refresh()
    return rewriter.program, count


def _product(rewriter: Rewriter, source: Program, node: fx.Node) -> fx.Node | None:
    program = rewriter.program
    codes, scale, zero, table, steps = node.args[1:]
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    width = codes.meta[CONTAINER][0]
    outputs, inputs = (int(s) for s in codes.meta["val"].shape)
    if table is not None or steps is not None or inputs * width % 8:
        return None
    groups, kind = int(scale.meta["val"].shape[-1]), scale.meta["val"].dtype
    keys = tuple(program.key(n) for n in (codes, scale, zero) if isinstance(n, fx.Node))
    shapes = {RHS: (outputs, inputs * width // 8), SCALE: (outputs, groups, 1), ZERO: (outputs, groups, 1)}
    parts = []
    for suffix, name in ((RHS, "rhs"), (SCALE, "scale"), (ZERO, "zero_point")):
        dtype = torch.uint8 if suffix == RHS else kind
        derived = Derived(source.weights, keys, _Part(name, width), shapes[suffix], dtype)
        made = program.add_weight(f"{keys[0]}{suffix}", derived, program.module_of(codes))
        if suffix == RHS:
            made.meta[OFFSET] = (width, codes.meta["val"].dtype == torch.int8)
        parts.append(made)
    return rewriter.call(node, MATMUL, node.args[0], *parts, width, inputs // groups)
