"""How an operator multiplies: which argument of a call is the weight, and what each of its axes is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.ir.moves import rank
from qcompile.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """A call that multiplies an activation by a weight; axes are counted from 0, those of the weight as it is read."""

    activation: fx.Node
    weight: fx.Node
    operand: str  # schema name of the argument that holds the weight
    summed: int  # axis of the weight that is summed over with the activation's
    out: int  # axis of the weight that becomes output features
    activation_summed: int
    result_out: int  # axis of the result that is output features
    kernel: tuple[int, ...] = ()  # axes of the weight that a window slides along
    groups: int = 1  # runs of output features, each of which reads its own run of input features


@dataclass(frozen=True)
class _Matmul:
    """Which argument may be the activation and which the weight, by schema name, and their axes from the end."""

    activation: str
    weight: str
    summed: int
    out: int
    activation_summed: int
    result_out: int


def _sides(left: str, right: str) -> tuple[_Matmul, ...]:
    """``left @ right``: the weight may stand on either side."""
    return (_Matmul(left, right, -2, -1, -1, -1), _Matmul(right, left, -1, -2, -2, -2))


_MATMULS: dict[Any, tuple[_Matmul, ...]] = {
    "aten.linear.default": (_Matmul("input", "weight", -1, -2, -1, -1),),
    "aten.addmm.default": _sides("mat1", "mat2"),
    "aten.mm.default": _sides("self", "mat2"),
    "aten.matmul.default": _sides("self", "other"),
    "aten.bmm.default": _sides("self", "mat2"),
    "aten.baddbmm.default": _sides("batch1", "batch2"),
    "aten._grouped_mm.default": _sides("self", "mat2")[:1],
    "transformers.grouped_mm_fallback.default": _sides("input", "weight")[:1],
}
_CONVOLUTIONS = {
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    *(aten.conv3d.default, aten.conv3d.padding, aten.convolution.default),
}
_TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
_UNREAD = {
    *(aten.mv.default, aten.tensordot.default, aten.bilinear.default, aten.embedding_bag.default),
    *(aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input),
}


def read_product(program: Program, node: fx.Node, constant: set[fx.Node]) -> Product | str | None:
    """The product that `node` is; why it cannot be read as one; None where it multiplies nothing by a weight.

    `constant` are the nodes whose elements come from weights alone.
    """
    if (matmuls := _MATMULS.get(str(node.target))) is not None:
        return _matmul(program, node, matmuls, constant)
    if node.target in _CONVOLUTIONS or node.target in _TRANSPOSED:
        return _convolution(program, node, constant)
    if node.target is aten.einsum.default:
        return _einsum(program, node, constant)
    if node.target in _UNREAD and any(n in constant and rank(n) > 1 for n in node.all_input_nodes):
        return f"{node.target} with a weight is not taken apart"
    return None


def _matmul(program: Program, node: fx.Node, matmuls: tuple[_Matmul, ...], constant: set[fx.Node]) -> Product | None:
    for m in matmuls:
        x, weight = program.arg(node, m.activation), program.arg(node, m.weight)
        if weight not in constant or x in constant or rank(weight) < 2:
            continue
        axes, vector = rank(weight), rank(x) == 1  # a vector has one axis to sum over and leaves the result none
        return Product(
            x,
            weight,
            m.weight,
            m.summed % axes,
            m.out % axes,
            m.activation_summed % rank(x),
            (-1 if vector else m.result_out) % rank(node),
        )
    return None


def _convolution(program: Program, node: fx.Node, constant: set[fx.Node]) -> Product | str | None:
    """A weight [out, in / groups, *kernel], transposed [in, out / groups, *kernel]; channels lie before the window."""
    x, weight = program.arg(node, "input"), program.arg(node, "weight")
    if weight not in constant or x in constant:
        return None
    transposed = node.target in _TRANSPOSED or (
        node.target is aten.convolution.default and bool(program.arg(node, "transposed"))
    )
    groups, window = int(program.arg(node, "groups")), rank(weight) - 2
    if transposed and groups > 1:
        return f"in a transposed convolution of {groups} groups no axis of the weight is its output features"
    summed, out = (0, 1) if transposed else (1, 0)
    kernel = tuple(range(2, 2 + window))
    return Product(x, weight, "weight", summed, out, rank(x) - window - 1, rank(node) - window - 1, kernel, groups)


def _einsum(program: Program, node: fx.Node, constant: set[fx.Node]) -> Product | str | None:
    tensors = list(program.arg(node, "tensors"))
    weights = [t for t in tensors if t in constant and rank(t) > 1]
    if not weights or all(t in constant for t in tensors):
        return None
    equation = str(program.arg(node, "equation")).replace(" ", "")
    if len(tensors) != 2:
        return f"einsum {equation!r} multiplies {len(tensors)} tensors, not an activation and a weight"
    weight, index = weights[0], tensors.index(weights[0])
    x = tensors[1 - index]
    labels = labels_of(equation, [rank(t) for t in tensors])
    if isinstance(labels, str):
        return labels
    of_weight, of_x, result = labels[index], labels[1 - index], labels[2]
    if lost := [a for a in (*of_weight, *of_x) if (a in of_weight) != (a in of_x) and a not in result]:
        return f"einsum {equation!r} sums over {lost[0]!r}, which only one of its operands has"
    summed = [a for a in of_weight if a not in result]
    out = [a for a in of_weight if a not in of_x]
    if len(summed) != 1 or len(out) != 1 or len(of_weight) > 3:
        counts = f"{len(summed)} summed, {len(out)} output and {len(of_weight) - len(summed) - len(out)} stacked axes"
        return f"in einsum {equation!r} the weight has {counts}: no matrix and no stack of them"
    return Product(
        x,
        weight,
        "tensors",
        of_weight.index(summed[0]),
        of_weight.index(out[0]),
        of_x.index(summed[0]),
        result.index(out[0]),
    )


def labels_of(equation: str, ranks: list[int]) -> tuple[list[str], list[str], list[str]] | str:
    """Labels of every axis of two operands and of the result; those under an ellipsis are numbered from the last."""
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    widths = [
        axes - len(term.replace("...", "")) if "..." in term else 0 for term, axes in zip(terms, ranks, strict=True)
    ]
    hidden = [str(i) for i in reversed(range(max(widths)))]
    if not arrow:  # by definition: what the ellipsis stands for, then what occurs once, in alphabetical order
        result = "..." + "".join(sorted(a for a in inputs if a.isalpha() and inputs.count(a) == 1))

    def spelled(term: str, width: int) -> list[str]:
        before, _, after = term.partition("...")
        return [*before, *hidden[len(hidden) - width :], *after] if "..." in term else list(term)

    first, second = (spelled(term, width) for term, width in zip(terms, widths, strict=True))
    for term, axes in zip(terms, (first, second), strict=True):
        if len(set(axes)) < len(axes):
            return f"einsum {equation!r} takes the diagonal of {term!r}"
    return first, second, spelled(result, len(hidden))
