"""Recognise a normalisation that is spelled out in elementary operators.

    c = x                     or   x − mean(x)       (then it is a layer norm)
    v = mean(c², -1) + ε      or   var(x, -1, correction=0) + ε      or   sum(c², -1) + ε (then it is an l2 norm)
    y = c · v^(-1/2) [· γ] [+ β, a layer norm's]

An l2 norm over n channels is a root-mean-square norm with ε/n, divided by √n.

Everything keeps the last axis; γ and β depend on weights alone; casts between floating-point types may stand anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.passes.cleanup.constants import Constants

aten = torch.ops.aten


@dataclass(frozen=True)
class SpelledNorm:
    """A normalisation of `x` over its last axis: every reader of `result` may read one operator instead."""

    centred: bool  # a layer norm; else a root-mean-square norm
    x: fx.Node
    width: int
    eps: float
    weight: fx.Node | None  # γ[width], a weight or what is computed from weights
    bias: fx.Node | None
    product: fx.Node  # c · v^(-1/2)
    result: fx.Node
    scale: float = 1.0  # what the operator's normalised value is to be multiplied by


class _No(Exception):
    """Looks like a norm and is none; says why."""


def roots(program: Program) -> list[fx.Node]:
    """The calls at which a norm may be recognised: square roots and their inverses."""
    calls = program.calls(aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)
    return [n for n in calls if _power(n) in (0.5, -0.5)]


def recognise(program: Program, root: fx.Node, constants: Constants) -> SpelledNorm | str | None:
    """The norm around a square root; the reason why it is none; or None where it takes no mean of squares at all."""
    statistic = _statistic(program, root)
    if statistic is None:
        return None
    try:
        return _norm(program, root, statistic, constants)
    except _No as reason:
        return str(reason)


@dataclass(frozen=True)
class _Statistic:
    """v = mean(operand²) + ε, and the calls that make it."""

    reduction: fx.Node
    axes: Any
    operand: fx.Node  # what is squared, or whose variance it is
    variance: bool
    total: bool  # a sum where a mean would be
    eps: float | None
    inner: tuple[fx.Node, ...]  # calls whose only reader must be the next one


def _statistic(program: Program, root: fx.Node) -> _Statistic | None:
    under, casts = strip_casts(root.args[0])
    inner, eps = [*casts], None
    if under.target is aten.add.Tensor and program.arg(under, "alpha") == 1:
        for a, b in (under.args[:2], under.args[1::-1]):
            eps = _scalar(program, b)
            if eps is not None and isinstance(a, fx.Node):
                inner.append(under)
                under, casts = strip_casts(a)
                inner += casts
                break
    found = _mean(program, under)
    if found is None:
        return None
    reduction, operand, scaled = found
    total = reduction is under and reduction.target is aten.sum.dim_IntList
    if total and eps is None:
        return None  # a length, and no norm
    inner += scaled
    axes = program.arg(reduction, "dim")
    if reduction.target is aten.var.correction:
        return _Statistic(reduction, axes, strip_casts(operand)[0], True, False, eps, tuple(inner))
    square, casts = strip_casts(operand)
    base = _squared(square)
    return (
        None
        if base is None
        else _Statistic(reduction, axes, strip_casts(base)[0], False, total, eps, (*inner, *casts, square))
    )


def _mean(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node, list[fx.Node]] | None:
    """The reduction, its operand, and the calls from the mean back to it. A sum that nothing divides counts too."""
    if node.target in (aten.mean.dim, aten.sum.dim_IntList):
        return node, program.arg(node, "self"), [node]
    if node.target is aten.var.correction and program.arg(node, "correction") == 0:
        return node, program.arg(node, "self"), [node]
    if node.target in (aten.div.Tensor, aten.mul.Tensor) and isinstance(node.args[0], fx.Node):
        total, casts = strip_casts(node.args[0])
        factor = node.args[1]
        if total.target is aten.sum.dim_IntList and isinstance(factor, (int, float)) and factor:
            count = factor if node.target is aten.div.Tensor else 1 / factor
            operand = program.arg(total, "self")
            size = operand.meta["val"].shape[-1]
            if isinstance(size, int) and abs(count - size) <= 1e-12 * size:
                return total, operand, [node, *casts, total]
    return None


def _norm(program: Program, root: fx.Node, found: _Statistic, constants: Constants) -> SpelledNorm:
    value = found.operand.meta["val"]
    if found.axes is None or [axis % value.ndim for axis in found.axes] != [value.ndim - 1]:
        raise _No(f"{found.reduction.name} runs over axes {found.axes}, not over the last")
    if not program.arg(found.reduction, "keepdim"):
        raise _No(f"{found.reduction.name} does not keep the axis it reduces")
    if not isinstance(value.shape[-1], int):
        raise _No(f"the last axis of {found.operand.name} has no fixed size")
    if found.eps is None:
        raise _No("nothing, no eps, is added to the mean of squares")
    for node in found.inner:
        if len(node.users) > 1:
            raise _No(f"the statistic {node.name} is also read by {_others(node)}")
    product, operand = _product(root)
    x, centred = _uncentred(program, operand)
    if found.variance:
        if not centred or x is not found.operand:
            raise _No(f"{product.name} scales {operand.name}, the variance is that of {found.operand.name}")
    elif operand is not found.operand and (not centred or _uncentred(program, found.operand) != (x, True)):
        raise _No(f"{product.name} scales {operand.name}, the mean is over the squares of {found.operand.name}")
    width = value.shape[-1]
    if found.total:
        end = _past_casts(product, x)
        return SpelledNorm(centred, x, width, found.eps / width, None, None, product, end, width**-0.5)
    weight, bias, result = _affine(program, product, x, centred, constants)
    return SpelledNorm(centred, x, width, found.eps, weight, bias, product, result)


def _product(root: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The product c · v^(-1/2), and c without casts."""
    factor = root
    inverse = _power(root) == -0.5
    while True:
        if len(factor.users) != 1:
            raise _No(f"the statistic {factor.name} is read by {_others(factor) or 'nothing'}")
        (user,) = factor.users
        if _is_cast(user):
            factor = user
        elif not inverse and user.target is aten.reciprocal.default:
            factor, inverse = user, True
        else:
            break
    wanted = aten.mul.Tensor if inverse else aten.div.Tensor
    sides = [a for a in user.args[:2] if a is not factor]
    fits = user.target is wanted and (inverse or user.args[1] is factor) and user.kwargs == {}
    if not fits or len(sides) != 1 or not isinstance(sides[0], fx.Node):
        raise _No(f"the statistic {factor.name} is read by {user.name} ({user.target}), which scales no tensor by it")
    return user, strip_casts(sides[0])[0]


def _affine(
    program: Program, product: fx.Node, x: fx.Node, centred: bool, constants: Constants
) -> tuple[fx.Node | None, fx.Node | None, fx.Node]:
    """γ and β where the product meets them next, and the last node that belongs to the norm."""
    end = _past_casts(product, x)
    weight = bias = None
    if (scaled := _meets(end, aten.mul.Tensor, x, constants)) is not None:
        weight, end = scaled[1], _past_casts(scaled[0], x)
    if centred and (shifted := _meets(end, aten.add.Tensor, x, constants)) is not None:
        bias, end = shifted[1], _past_casts(shifted[0], x)
    return weight, bias, end


def _meets(end: fx.Node, target: Any, x: fx.Node, constants: Constants) -> tuple[fx.Node, fx.Node] | None:
    """The only reader of `end` where it is `target` with a constant vector, and that vector."""
    if len(end.users) != 1:
        return None
    (user,) = end.users
    sides = [a for a in user.args[:2] if a is not end]
    if user.target is not target or user.kwargs or len(sides) != 1 or sides[0] not in constants:
        return None
    (vector,) = sides
    assert isinstance(vector, fx.Node)
    shape = vector.meta["val"].shape
    return (user, vector) if tuple(shape) == (x.meta["val"].shape[-1],) else None


def _past_casts(node: fx.Node, x: fx.Node) -> fx.Node:
    """Through casts back to the input's dtype, or to a narrower one: they are the norm's own.

    A cast that widens belongs to the reader (a router that computes in float32).
    """
    while len(node.users) == 1:
        (user,) = node.users
        if not _is_cast(user):
            break
        dtype = user.meta["val"].dtype
        if dtype != x.meta["val"].dtype and dtype.itemsize >= node.meta["val"].dtype.itemsize:
            break
        node = user
    return node


def _uncentred(program: Program, node: fx.Node) -> tuple[fx.Node, bool]:
    """x and True where `node` is x − mean(x) over the last axis; else `node` itself and False."""
    sides = node.args[:2]
    if node.target is not aten.sub.Tensor or node.kwargs or not all(isinstance(s, fx.Node) for s in sides):
        return node, False
    (x, _), (mean, _) = map(strip_casts, sides)
    if mean.target is not aten.mean.dim or strip_casts(program.arg(mean, "self"))[0] is not x:
        return node, False
    axes, rank = program.arg(mean, "dim"), x.meta["val"].ndim
    over_last = axes is not None and [axis % rank for axis in axes] == [rank - 1]
    return (x, True) if over_last and program.arg(mean, "keepdim") else (node, False)


def _power(root: fx.Node) -> Any:
    """The power that a root raises its operand to."""
    if root.target is aten.pow.Tensor_Scalar:
        return root.args[1]
    return -0.5 if root.target is aten.rsqrt.default else 0.5


def _squared(node: fx.Node) -> fx.Node | None:
    base = node.args[0] if node.args else None
    if not isinstance(base, fx.Node):
        return None
    if node.target is aten.square.default or (node.target is aten.pow.Tensor_Scalar and node.args[1] == 2):
        return base
    if node.target is aten.mul.Tensor and isinstance(other := node.args[1], fx.Node):
        return base if strip_casts(base)[0] is strip_casts(other)[0] else None
    return None


def _scalar(program: Program, value: Any) -> float | None:
    """A number, or the one element of a weight."""
    if isinstance(value, (int, float)):
        return float(value)
    if program.is_weight(value) and value.meta["val"].numel() == 1:
        return float(program.weight(value))
    if isinstance(value, fx.Node) and value.target in (aten.full.default, aten.scalar_tensor.default):
        number = value.args[-1]
        return float(number) if isinstance(number, (int, float)) and value.meta["val"].numel() == 1 else None
    return None


def _is_cast(node: fx.Node) -> bool:
    """Between floating-point types."""
    if node.target is not aten.to.dtype or not isinstance(node.args[0], fx.Node):
        return False
    values = node.meta["val"], node.args[0].meta["val"]
    return all(isinstance(v, Tensor) and v.dtype.is_floating_point and v.dtype.itemsize > 1 for v in values)


def strip_casts(node: Any) -> tuple[fx.Node, list[fx.Node]]:
    """What stands before the casts that end in `node`, and those casts."""
    casts: list[fx.Node] = []
    while _is_cast(node):
        casts.append(node)
        node = node.args[0]
    return node, casts


def _others(node: fx.Node) -> str:
    return " and ".join(user.name for user in node.users)
