"""Packed weights as tensors of the lowered program, computed from the codes when they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq.recognise import shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter
from qcompile.backends.triton.formats import WeightFormat
from qcompile.backends.triton.matching import Site, outer_of, weight_name


@dataclass(frozen=True)
class PackedWeight:
    """Where the codes of a weight lie: outputs `start` to `stop` of `columns` in the planes; [K, N] in the program if
    `transposed`.

    `stored` are the keys of all that is stored for it and those it is merged with, planes first.
    """

    name: str
    format: str
    planes: tuple[str, ...]
    stored: tuple[str, ...]
    start: int
    stop: int
    columns: int
    transposed: bool = False
    stacked: int = 0  # how many such weights are stacked; 0 for none


@dataclass(frozen=True, eq=False)
class Operands:
    """The nodes that an operator reads of one packed weight, or of several side by side."""

    planes: list[fx.Node]
    scale: fx.Node
    zero: fx.Node | None
    factor: fx.Node | None
    table: fx.Node | None
    bias: fx.Node | None
    format: str

    def arguments(self) -> tuple[object, ...]:
        """In the order of an operator's schema."""
        return (self.planes, self.scale, self.zero, self.factor, self.table, self.bias, self.format)


def store(rewriter: Rewriter, sites: Sequence[Site], index: list[PackedWeight]) -> Operands:
    """Bind the packed form of the weights of `sites`, side by side, to new keys; `index` is told where each lies."""
    program, form = rewriter.program, sites[0].form
    names = [weight_name(program, site.product.weight) for site in sites]
    base = merged_name(names)
    turned = [not site.product.out_first for site in sites]
    outputs = [outputs_of(site) for site in sites]
    columns = sum(outputs)
    codes = tuple(program.key(site.product.weight.codes) for site in sites)
    planes = [
        rewriter.derive(
            f"{base}.plane{i}",
            codes,
            partial(_plane, form, i, turned),
            shape,
            dtype,
        )
        for i, (shape, dtype) in enumerate(form.plane_shapes(columns))
    ]
    scale = _parameter(rewriter, f"{base}.step", [s.product.weight.scale for s in sites], turned, form.scale)
    zeros = [site.product.weight.zero for site in sites if site.product.weight.zero is not None]
    zero = _parameter(rewriter, f"{base}.zero", zeros, turned, "float") if zeros else None
    outers = [outer_of(program, site.product.weight) for site in sites]
    factor = _flat(rewriter, f"{base}.factor", [outers[0][0]]) if form.outer else None
    biases = [site.product.bias for site in sites if site.product.bias is not None]
    bias = biases[0] if len(biases) == 1 else _flat(rewriter, f"{base}.bias", biases) if biases else None
    start = 0
    shared = [node for node in (*planes, scale, zero, factor) if node is not None]
    for name, count, turn in zip(names, outputs, turned, strict=True):
        keys = tuple(program.key(node) for node in planes)
        stored = tuple(program.key(node) for node in shared)
        index.append(PackedWeight(name, str(form), keys, stored, start, start + count, columns, turn))
        start += count
    return Operands(planes, scale, zero, factor, value_table(rewriter, form), bias, str(form))


def outputs_of(site: Site) -> int:
    """N of a weight."""
    shape = site.product.weight.shape
    return int(shape[0] if site.product.out_first else shape[1])


def merged_name(names: Sequence[str]) -> str:
    """One name for several: what differs stands side by side.

    >>> merged_name(["layers.0.q_proj.weight", "layers.0.k_proj.weight"])
    'layers.0.q_proj+k_proj.weight'
    """
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    if len({len(part) for part in parts}) > 1:
        return "+".join(names)
    return ".".join("+".join(dict.fromkeys(words)) for words in zip(*parts, strict=True))


def _plane(form: WeightFormat, plane: int, turned: Sequence[bool], *codes: Tensor) -> Tensor:
    """One plane of several weights side by side."""
    packed = [form.pack(c.t().contiguous() if turn else c)[plane] for c, turn in zip(codes, turned, strict=True)]
    return torch.cat(packed, form.output_axis)


def _parameter(rewriter: Rewriter, key: str, parts: Sequence[fx.Node], turned: Sequence[bool], kind: str) -> fx.Node:
    """Scales or zero-points [N / rows, G] of several weights as [G, Σ N / rows]; bytes where they are no plain
    floats."""
    shapes = [shape_of(p)[::-1] if turn else shape_of(p) for p, turn in zip(parts, turned, strict=True)]
    shape = (int(shapes[0][1]), sum(int(s[0]) for s in shapes))
    keys = tuple(rewriter.program.key(part) for part in parts)
    dtype = torch.uint8 if kind != "float" else parts[0].meta["val"].dtype

    def compute(*stored: Tensor) -> Tensor:
        flipped = [s if turn else s.t() for s, turn in zip(stored, turned, strict=True)]
        return torch.cat([s.contiguous().view(dtype) for s in flipped], 1).contiguous()

    return rewriter.derive(key, keys, compute, shape, dtype)


def _flat(rewriter: Rewriter, key: str, parts: Sequence[fx.Node]) -> fx.Node:
    """Tensors one behind the other in one axis."""
    keys = tuple(rewriter.program.key(part) for part in parts)
    size = sum(part.meta["val"].numel() for part in parts)

    def compute(*stored: Tensor) -> Tensor:
        return torch.cat([s.reshape(-1) for s in stored])

    return rewriter.derive(key, keys, compute, (size,), parts[0].meta["val"].dtype)


def value_table(rewriter: Rewriter, form: WeightFormat) -> fx.Node | None:
    """The values of codes that no shift decodes, one tensor for all weights of an element."""
    values = code_values(form)
    if values is None:
        return None
    key = f"qcompile.values.{form.element}"
    return rewriter.shared(key, lambda: rewriter.constant(key, values))


def code_values(form: WeightFormat) -> Tensor | None:
    """float32 [2^bits]: the value of every code; None where kernels compute it."""
    if form.integer or form.half_float is not None:
        return None
    codes = torch.arange(1 << form.bits).clamp(max=(1 << form.spec_element.bits) - 1)
    return form.values(codes.to(torch.uint8)).to(torch.float32)


def unpacked(weight: PackedWeight, planes: Sequence[Tensor]) -> Tensor:
    """The codes of a weight in the program's layout, out of planes that are read back."""
    form = WeightFormat.parse(weight.format)
    if weight.stacked:
        return torch.stack([_codes(weight, form, [p[i] for p in planes]) for i in range(weight.stacked)])
    return _codes(weight, form, planes)


def _codes(weight: PackedWeight, form: WeightFormat, planes: Sequence[Tensor]) -> Tensor:
    count = weight.stop - weight.start
    codes = form.unpack([plane.narrow(form.output_axis, weight.start, count).contiguous() for plane in planes])
    return codes.t().contiguous() if weight.transposed else codes
