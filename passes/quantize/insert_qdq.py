"""Put quantize and dequantize where a recipe says so. Not exact: from here on the program computes with rounded values.

    linear(x, W)  ⟶  p = choose_qparams(W, spec)
                     s, z = p                                    # z where the spec is asymmetric
                     linear(x′, dequantize(quantize(W, s, z), s, z))

x′ is x, or x through the same three operators where activations are quantized; all readers of one x with one spec share
them. Where results are quantized, they go through the three operators before anything else reads them; a reader whose
input has the same spec takes them as they are. A weight keeps its stored layout: the spec in the graph says on which of
its axes groups run. What weights, tables of embeddings among them, get is round-to-nearest until a pass that rounds
weights stores codes at the same place.

A weight that several contractions and embeddings read is quantized once for each spec they have. One that is left float
and shares it keeps reading the float weight, and the report says what that costs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile.ir.contractions import Contraction, Embedding
from qcompile.ir.program import Program
from qcompile.numerics.parameters import outer_names
from qcompile.numerics.quantize import value_dtype
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Pass, Report, register
from qcompile.recipe.model import Rule
from qcompile.recipe.plan import Site
from qcompile.recipe.resolution import resolve, stays_float

codes_ops = torch.ops.qcompile
_MARKS = (codes_ops.choose_qparams.default, codes_ops.quantize.default)


@register
@dataclass(frozen=True)
class InsertQDQ(Pass):
    """Quantize weights, inputs and results of contractions, and tables of embeddings; options as a recipe's fields.

    Raises RecipeError as `qcompile.recipe.resolve` does.
    """

    name: ClassVar[str] = "insert-qdq"
    preserves_function: ClassVar[bool] = False

    weights: str | None = None
    activations: str | None = None
    outputs: str | None = None
    head: str | None = None
    router: str | None = None
    embeddings: str | None = None
    rules: tuple[Rule, ...] = ()

    def run(self, program: Program) -> Report:
        report = Report()
        plan = resolve(program, self)
        for obstacle in plan.obstacles:
            report.skip(obstacle.node, obstacle.reason)
        for site in plan.sites:
            if site.weights is None and site.activations is None and site.outputs is None:
                report.skip(site.name, f"stays float ({site.why})")
        for key in dict.fromkeys(site.key for site in plan.sites):
            _weights(program, [site for site in plan.sites if site.key == key], report)
        _activations(program, plan.sites, _outputs(program, plan.sites, report), report)
        program.refresh()
        return report


def quantize_value(
    program: Program, x: fx.Node, spec: QuantSpec, before: fx.Node, module: str, called: str = ""
) -> fx.Node:
    """Insert the three operators on `x` before a node; returns the dequantized value, of the dtype of `x`.

    `called` says what the value is to `module`, ``output`` or ``keys``, say: the calls' names begin with it, and where
    `calibrate` stores its scales they are ``<module>.<called>.scale``. Without it, it is an input.
    """
    text, prefix = str(spec), f"{called}_" if called else ""

    def call(target: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(target, args, kwargs, before=before, name=f"{prefix}{name}", module=module)

    params = call(codes_ops.choose_qparams.default, "qparams", x, text)
    scale = call(operator.getitem, "scale", params, 0)
    zero = None if spec.symmetric else call(operator.getitem, "zero_point", params, 1)
    first = 1 if zero is None else 2
    outer = [call(operator.getitem, name, params, first + i) for i, name in enumerate(outer_names(spec))]
    more = {"outer": outer} if outer else {}
    codes = call(codes_ops.quantize.default, "quantize", x, scale, zero, text, **more)
    dtype = x.meta["val"].dtype
    wanted = {} if dtype == value_dtype(spec.scale_dtype) else {"dtype": dtype}
    return call(codes_ops.dequantize.default, "dequantize", codes, scale, zero, text, **wanted, **more)


def _weights(program: Program, sites: Sequence[Site], report: Report) -> None:
    """Quantize one weight for its readers, once for each spec."""
    kept = stays_float(sites)
    specs = dict.fromkeys(site.weights for site in sites if site.weights is not None)
    for spec in specs:
        readers = [site for site in sites if site.weights == spec]
        _read_quantized(program, [site.reader for site in readers], spec)
        for site in readers:
            report.rewrote(site.name, f"{site.key}: {spec} ({site.why})")
    if specs and kept:
        names = ", ".join(program.module_of(node) or node.name for node in kept)
        size = sites[0].float_bytes / 1e6
        report.note(f"{sites[0].key} stays float as well, for {names}: {size:.2f} MB beside its codes")
    if len(specs) > 1:
        report.note(f"{sites[0].key} is stored {len(specs)} times, its readers having as many specs")


def _read_quantized(program: Program, readers: Sequence[Contraction | Embedding], spec: QuantSpec) -> None:
    """Let `readers`, all of one weight, read it quantized; what else reads it, or shares their moves, does not."""
    weight, mine = readers[0].weight, {n for r in readers for n in (*r.path, r.node)}
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    first = min((r.path[0] if r.path else r.node for r in readers), key=order.__getitem__)
    dequantized = quantize_value(program, weight, spec, first, program.module_of(first))
    moves = {node for r in readers for node in r.path}
    if all(user in mine for node in moves for user in node.users):
        for node in {r.path[0] if r.path else r.node for r in readers}:
            node.replace_input_with(weight, dequantized)
        return
    copies: dict[fx.Node, fx.Node] = {weight: dequantized}
    for r in readers:
        for node in r.path:
            if node not in copies:
                args = fx.map_arg(node.args, lambda n: copies.get(n, n))
                copies[node] = program.call(node.target, args, dict(node.kwargs), after=node)  # type: ignore[arg-type]
        read = r.path[-1] if r.path else weight
        r.node.replace_input_with(read, copies[read])


Quantized = tuple[fx.Node, QuantSpec]
"""A value as it was, and the spec it is quantized with."""


def _outputs(program: Program, sites: Sequence[Site], report: Report) -> dict[Quantized, fx.Node]:
    """Quantize results, bias included; returns the dequantized values."""
    done: dict[Quantized, fx.Node] = {}
    for site in sites:
        if (spec := site.outputs) is None:
            continue
        node, readers = site.reader.node, list(site.reader.node.users)
        if all(user.target in _MARKS for user in readers):
            report.skip(site.name, "its result is quantized already by all that read it")
            continue
        done[node, spec] = quantize_value(program, node, spec, node.next, site.module, "output")
        for reader in readers:
            reader.replace_input_with(node, done[node, spec])
        report.rewrote(site.name, f"result {node.name}: {spec} ({site.why})")
    return done


def _activations(program: Program, sites: Sequence[Site], results: dict[Quantized, fx.Node], report: Report) -> None:
    """Quantize inputs, one time for all readers of one value with one spec; a result that has it serves as it is."""
    done = dict(results)
    as_read = {node: dequantized for (node, _), dequantized in results.items()}
    for site in sites:
        c, spec = site.reader, site.activations
        if spec is None or not isinstance(c, Contraction):
            continue
        if c.input.target is codes_ops.dequantize.default:
            report.skip(site.name, f"its input is quantized already: {c.input.args[3]}")
            continue
        value = as_read.get(c.input, c.input)
        if (c.input, spec) not in done:
            done[c.input, spec] = quantize_value(program, value, spec, c.node, site.module)
        c.node.replace_input_with(value, done[c.input, spec])
        report.rewrote(site.name, f"input {c.input.name}: {spec} ({site.why})")
