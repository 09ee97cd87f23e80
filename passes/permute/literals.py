"""Operators on a tensor that gets wider: which may see new channels of zeros, and the sizes among their arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qcompile.ir.program import Program
from qcompile.passes.permute.growth import Grown

aten = torch.ops.aten

KEEP_ZERO = {  # a channel of zeros stays one, and no other channel notices
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.neg.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.dropout.default,
    aten.relu.default,
    aten.relu6.default,
    aten.leaky_relu.default,
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.elu.default,
    aten.mish.default,
    aten.hardswish.default,
    aten.erf.default,
    aten.sin.default,
    aten.sqrt.default,
    aten.abs.default,
    aten.square.default,
    aten.pow.Tensor_Scalar,
    aten.log1p.default,
    aten.expm1.default,
    aten.rms_norm.default,
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
}
FINITE = {  # a channel of zeros becomes finite numbers, and no other channel notices
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.sigmoid.default,
    aten.exp.default,
    aten.softplus.default,
    aten.log_sigmoid.default,
    aten.hardsigmoid.default,
    aten.cos.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    aten.nan_to_num.default,
    aten.where.self,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
}
_SHAPED = {  # operators whose result has the shape that an argument says
    aten.view.default: "size",
    aten.reshape.default: "shape",
    aten._unsafe_view.default: "size",
    aten.expand.default: "size",
    aten.broadcast_to.default: "size",
}
AS_THEY_ARE = {  # elements go elsewhere
    *_SHAPED,
    aten.flatten.using_ints,
    aten.transpose.int,
    aten.t.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.cat.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.index_add.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.sum.dim_IntList,
    aten.mean.dim,
    operator.getitem,
}


def rewritten(program: Program, node: fx.Node, grown: list[Grown | None], source: Grown | None) -> dict[str, Any] | str:
    """The arguments of a call that say a size which grows, by name; or why none will do.

    Args:
        grown: how each result grows.
        source: how the tensor that it reads grows.
    """
    own = grown[0]
    if node.target in _SHAPED and own is not None:
        name = _SHAPED[node.target]
        size = list(program.arg(node, name))
        if isinstance(size[own[0]], int) and size[own[0]] != -1:
            size[own[0]] = own[1].new_size
            return {name: size}
    elif node.target is aten.rms_norm.default and own is not None:
        axis, growth = own
        if axis != node.meta["val"].ndim - 1 or growth.starts != (0,) or growth.size != growth.width:
            return "normalises other channels too"
        return {"normalized_shape": [growth.new_size]}
    elif node.target is aten.pow.Tensor_Scalar:
        return {} if node.args[1] > 0 else "raises zeros to a power that is not positive"  # type: ignore[operator]
    elif node.target is aten.slice.Tensor and source is not None:
        return _sliced(program, node, source)
    elif node.target in (aten.split.Tensor, aten.split_with_sizes.default) and source is not None:
        return _parts(program, node, grown, source)
    return {}


def _on(program: Program, node: fx.Node, source: Grown) -> bool:
    """Whether a call takes the axis apart that grows."""
    rank = program.arg(node, "self").meta["val"].ndim
    return bool(int(program.arg(node, "dim")) % rank == source[0])


def _sliced(program: Program, node: fx.Node, source: Grown) -> dict[str, Any]:
    if not _on(program, node, source):
        return {}
    size, changed = source[1].size, {}
    for name in ("start", "end"):
        place = program.arg(node, name)
        if place is None or (isinstance(place, int) and place >= size):
            continue  # up to the end, wherever that is
        changed[name] = source[1].moved(place if place >= 0 else place + size)
    return changed


def _parts(program: Program, node: fx.Node, grown: list[Grown | None], source: Grown) -> dict[str, Any] | str:
    if not _on(program, node, source):
        return {}
    old = [value.shape[source[0]] for value in node.meta["val"]]
    new = [size if g is None else g[1].new_size for size, g in zip(old, grown, strict=True)]
    if node.target is aten.split_with_sizes.default:
        return {"split_sizes": new}
    return {"split_size": new[0]} if len({*new[:-1]}) <= 1 and new[-1] <= new[0] else "splits into parts of one size"
