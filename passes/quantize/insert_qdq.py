"""Put quantize and dequantize where a recipe says so. Not exact: from here on the program computes with rounded values.

    linear(x, W)  ⟶  p = choose_qparams(W, spec)
                     s, z = p                                    # z where the spec is asymmetric
                     linear(x′, dequantize(quantize(W, s, z), s, z))

x′ is x, or x through the same three operators where activations are quantized; all readers of one x with one spec share
them. A weight keeps its stored layout: the spec in the graph says on which of its axes groups run. What weights get is
round-to-nearest until a pass that rounds weights stores codes at the same place.

A weight that several contractions read is quantized once for each spec they have. An embedding, or a contraction left
float, that shares it keeps reading the float weight, and the report says what that costs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile.ir.contractions import Contraction
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Pass, Report, register
from qcompile.recipe.model import Rule
from qcompile.recipe.plan import Site
from qcompile.recipe.resolution import resolve, stays_float

codes_ops = torch.ops.qcompile


@register
@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Quantize weights and activations of contractions; options as the fields of a recipe.

    Raises RecipeError as `qcompile.recipe.resolve` does.
    """

    name: ClassVar[str] = "insert-qdq"
    preserves_function: ClassVar[bool] = False

    weights: str | None = None
    activations: str | None = None
    head: str | None = None
    router: str | None = None
    rules: tuple[Rule, ...] = ()

    def run(self, program: Program) -> Report:
        report = Report()
        plan = resolve(program, self)
        for obstacle in plan.obstacles:
            report.skip(obstacle.node, obstacle.reason)
        for site in plan.sites:
            if site.weights is None and site.activations is None:
                report.skip(site.name, f"stays float ({site.why})")
        for key in dict.fromkeys(site.key for site in plan.sites):
            _weights(program, [site for site in plan.sites if site.key == key], report)
        _activations(program, plan.sites, report)
        program.refresh()
        return report


def quantize_value(program: Program, x: fx.Node, spec: QuantSpec, before: fx.Node, module: str) -> fx.Node:
    """Insert the three operators on `x` before a node; returns the dequantized value, of the dtype of `x`."""
    text = str(spec)

    def call(target: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(target, args, kwargs, before=before, name=name, module=module)

    params = call(codes_ops.choose_qparams.default, "qparams", x, text)
    scale = call(operator.getitem, "scale", params, 0)
    zero = None if spec.symmetric else call(operator.getitem, "zero_point", params, 1)
    codes = call(codes_ops.quantize.default, "quantize", x, scale, zero, text)
    dtype = x.meta["val"].dtype
    wanted = {} if dtype == spec.scale_dtype else {"dtype": dtype}
    return call(codes_ops.dequantize.default, "dequantize", codes, scale, zero, text, **wanted)


def _weights(program: Program, sites: Sequence[Site], report: Report) -> None:
    """Quantize one weight for its readers, once for each spec."""
    kept = stays_float(sites)
    specs = dict.fromkeys(site.weights for site in sites if site.weights is not None)
    for spec in specs:
        readers = [site for site in sites if site.weights == spec]
        _read_quantized(program, [site.contraction for site in readers], spec)
        for site in readers:
            report.rewrote(site.name, f"{site.key}: {spec} ({site.why})")
    if specs and kept:
        names = ", ".join(program.module_of(node) or node.name for node in kept)
        size = sites[0].float_bytes / 1e6
        report.note(f"{sites[0].key} stays float as well, for {names}: {size:.2f} MB beside its codes")
    if len(specs) > 1:
        report.note(f"{sites[0].key} is stored {len(specs)} times, its readers having as many specs")


def _read_quantized(program: Program, readers: Sequence[Contraction], spec: QuantSpec) -> None:
    """Let `readers`, all of one weight, read it quantized; what else reads it, or shares their moves, does not."""
    weight, mine = readers[0].weight, {n for c in readers for n in (*c.path, c.node)}
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    first = min((c.path[0] if c.path else c.node for c in readers), key=order.__getitem__)
    dequantized = quantize_value(program, weight, spec, first, program.module_of(first))
    moves = {node for c in readers for node in c.path}
    if all(user in mine for node in moves for user in node.users):
        for node in {c.path[0] if c.path else c.node for c in readers}:
            node.replace_input_with(weight, dequantized)
        return
    copies: dict[fx.Node, fx.Node] = {weight: dequantized}
    for c in readers:
        for node in c.path:
            if node not in copies:
                args = fx.map_arg(node.args, lambda n: copies.get(n, n))
                copies[node] = program.call(node.target, args, dict(node.kwargs), after=node)  # type: ignore[arg-type]
        program.set_arg(c.node, c.operand, copies[c.path[-1] if c.path else weight])


def _activations(program: Program, sites: Sequence[Site], report: Report) -> None:
    """Quantize inputs, one time for all readers of one value with one spec."""
    done: dict[tuple[fx.Node, QuantSpec], fx.Node] = {}
    for site in sites:
        c, spec = site.contraction, site.activations
        if spec is None:
            continue
        if c.input.target is codes_ops.dequantize.default:
            report.skip(site.name, f"its input is quantized already: {c.input.args[3]}")
            continue
        if (c.input, spec) not in done:
            done[c.input, spec] = quantize_value(program, c.input, spec, c.node, site.module)
        c.node.replace_input_with(c.input, done[c.input, spec])
        report.rewrote(site.name, f"input {c.input.name}: {spec} ({site.why})")
