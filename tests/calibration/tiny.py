"""Programs of a few nodes, written as text, and rounding them layer by layer on the whole program to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.calibration.settings import Settings
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import run
from qcompile.pass_base import Report
from qcompile.passes.quantize.plain import without_rounding
from qcompile.passes.quantize.sites import store_codes, weight_qdq
from qcompile.rounding import Method, Statistics, Stored, round_matrix

WIDTH, HIDDEN, VOCABULARY = 16, 24, 32

_LAYER = """\
    n{i} = aten.rms_norm.default({x}, [16], g{i}, 1e-3)
    q{i} = aten.linear.default(n{i}, wq{i})  # {i}.q
    k{i} = aten.linear.default(n{i}, wk{i})  # {i}.k
    v{i} = aten.linear.default(n{i}, wv{i})  # {i}.v
    qh{i} = aten.unsqueeze.default(q{i}, 1)
    kh{i} = aten.unsqueeze.default(k{i}, 1)
    vh{i} = aten.unsqueeze.default(v{i}, 1)
    a{i} = aten.scaled_dot_product_attention.default(qh{i}, kh{i}, vh{i}, None, 0.0, True)
    s{i} = aten.squeeze.dim(a{i}, 1)
    o{i} = aten.linear.default(s{i}, wo{i})  # {i}.o
    x{i} = aten.add.Tensor({x}, o{i})
    m{i} = aten.rms_norm.default(x{i}, [16], h{i}, 1e-2)
    t{i} = aten.linear.default(m{i}, wt{i})  # {i}.gate
    u{i} = aten.linear.default(m{i}, wu{i})  # {i}.up
    c{i} = aten.silu.default(t{i})
    p{i} = aten.mul.Tensor(c{i}, u{i})
    d{i} = aten.linear.default(p{i}, wd{i})  # {i}.down
    y{i} = aten.add.Tensor(x{i}, d{i})"""
_LAYER_WEIGHTS = (
    "g{i}: {f}[16], wq{i}: {f}[16, 16], wk{i}: {f}[16, 16], wv{i}: {f}[16, 16], wo{i}: {f}[16, 16], h{i}: {f}[16], "
    "wt{i}: {f}[24, 16], wu{i}: {f}[24, 16], wd{i}: {f}[16, 24]"
)


def decoder(layers: int = 2, dtype: str = "f64") -> Program:
    """``input_ids → logits``: attention and a gated MLP a layer, gains away from 1; the head is called `head`."""
    names = ["x"] + [f"y{i}" for i in range(layers)]
    body = "\n".join(_LAYER.format(i=i, x=names[i]) for i in range(layers))
    weights = ", ".join(_LAYER_WEIGHTS.format(i=i, f=dtype) for i in range(layers))
    text = f"""def main(input_ids: i64[batch, sequence], *, e: {dtype}[32, 16], {weights}, wh: {dtype}[32, 16]):
    x = aten.embedding.default(e, input_ids)  # embed
{body}
    z = aten.linear.default({names[-1]}, wh)  # head
    return {{"logits": z}}"""
    return tempered(Program.parse(text))


def experts() -> Program:
    """Two layers of a mixture: a router picks a matrix of each stack for every token."""
    layer = """\
    n{i} = aten.rms_norm.default({x}, [16], g{i}, 1e-3)
    r{i} = aten.linear.default(n{i}, wr{i})  # {i}.router
    i{i} = aten.argmax.default(r{i}, -1)
    f{i} = aten.view.default(i{i}, [-1])
    c{i} = aten.view.default(n{i}, [-1, 16, 1])
    u{i} = aten.index.Tensor(wu{i}, [f{i}])
    h{i} = aten.bmm.default(u{i}, c{i})  # {i}.up
    d{i} = aten.index.Tensor(wd{i}, [f{i}])
    a{i} = aten.relu.default(h{i})
    o{i} = aten.bmm.default(d{i}, a{i})  # {i}.down
    v{i} = aten.view.default(o{i}, [b, s, 16])
    y{i} = aten.add.Tensor({x}, v{i})"""
    body = "\n".join(layer.format(i=i, x=x) for i, x in enumerate(("x", "y0")))
    shapes = "g{i}: f64[16], wr{i}: f64[3, 16], wu{i}: f64[3, 24, 16], wd{i}: f64[3, 16, 24]"
    weights = ", ".join(shapes.format(i=i) for i in range(2))
    return tempered(
        Program.parse(f"""def main(input_ids: i64[batch, sequence], *, e: f64[32, 16], {weights}, wh: f64[32, 16]):
    b = aten.sym_size.int(input_ids, 0)
    s = aten.sym_size.int(input_ids, 1)
    x = aten.embedding.default(e, input_ids)
{body}
    z = aten.linear.default(y1, wh)
    return {{"logits": z}}""")
    )


def tempered(program: Program) -> Program:
    """Weights that pass on their input's size; columns of tables that differ in size."""
    for key in list(program.weights):
        weight = program.weights[key]
        if weight.ndim > 1 and key.startswith("w"):
            program.weights[key] = weight * weight.shape[-1] ** -0.5
        elif weight.ndim > 1:
            program.weights[key] = weight * torch.linspace(0.3, 3, weight.shape[-1], dtype=weight.dtype)
    return program


def tokens(samples: int = 8, length: int = 6, batch: int = 3, seed: int = 0) -> list[Tensor]:
    """Batches of random ids, the last one short."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(0, VOCABULARY, (samples, length), generator=generator).split(batch))


def codes(program: Program) -> dict[str, Tensor]:
    """All that was stored for quantized values: codes, scales and so on."""
    ends = (".codes", ".scale", ".zero_point")
    return {key: program.weights[key] for key in sorted(program.weights) if key.endswith(ends)}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return bool(one) and list(one) == list(other) and all(torch.equal(one[k], other[k]) for k in one)


def slowly(
    program: Program,
    batches: Sequence[Mapping[str, Tensor]],
    method: Method,
    propagate: str = "quantized",
    together: Sequence[Sequence[str]] = (),
) -> None:
    """Round every marked weight in program order, in place: for each, both whole programs are run over all batches.

    `together`: weights, by key, that are looked at before any of their group is rounded.
    """
    float_program = without_rounding(program)
    groups = list(together) or [[program.key(mark.source)] for mark in weight_qdq(program)]
    for group in groups:
        shown = _unrounded(program, group) if together else program
        found = [_statistics(shown, float_program, key, batches, method, propagate) for key in group]
        for key, statistics in zip(group, found, strict=True):
            mark = next(m for m in weight_qdq(program) if program.key(m.source) == key)
            weight = program.weights[key]
            stored = Stored(mark.spec, tuple(weight.shape), 0, 1)
            result = round_matrix(weight, stored, statistics, method).result
            store_codes(program, mark, weight, result, Report())


def _unrounded(program: Program, keys: Sequence[str]) -> Program:
    """A copy in which these weights are read as they are."""
    copy = program.clone()
    for mark in weight_qdq(copy):
        if copy.key(mark.source) in keys:
            for node in mark.dequantize:
                copy.replace(node, mark.source)
    copy.refresh()
    return copy


def _statistics(
    program: Program,
    float_program: Program,
    key: str,
    batches: Sequence[Mapping[str, Tensor]],
    method: Method,
    propagate: str,
) -> Statistics:
    products = [c.node.name for c in find_contractions(float_program) if float_program.key(c.weight) == key]
    x = torch.cat([_read(float_program, name, batches) for name in products])
    x_hat = torch.cat([_read(program, name, batches) for name in products]) if propagate == "quantized" else x
    cross = x_hat.t() @ x if method.follows_float and propagate == "quantized" else None
    return Statistics(x_hat.t() @ x_hat, cross, len(x))


def _read(program: Program, name: str, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """What the product `name` is given, [tokens, features], over all batches."""
    node = next(n for n in program.nodes if n.name == name)
    source = program.arg(node, "input")
    seen: list[Tensor] = []

    def observe(at: fx.Node, value: Any) -> None:
        if at is source:
            seen.append(value.reshape(-1, value.shape[-1]))

    for batch in batches:
        run(program, batch, observe)
    return torch.cat(seen).double()


SEQUENTIAL = Settings()
FLOAT = Settings(propagate="float")
TOGETHER = Settings(true_sequential=False)
SPILLED = Settings(memory=0)
