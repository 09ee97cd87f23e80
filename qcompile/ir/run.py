"""Running a program node by node, reading each weight when it is touched and letting it go after its last use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import QCompileError
from qcompile.ir.gathered import Gathered, call
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr


@dataclass(frozen=True)
class InputType:
    """What an input must be; sizes that vary are None."""

    dtype: torch.dtype
    sizes: tuple[int | None, ...]


def run(
    program: Program, feeds: Mapping[str, Tensor], observe: Callable[[fx.Node, Any], None] | None = None
) -> dict[str, Tensor]:
    """Run `program` on inputs by name; returns outputs by name. `observe` is shown every input and every result.

    Raises QCompileError for an input that is missing, unknown, or of another rank or dtype than declared.
    """
    _check(program, feeds)
    last_use = _last_uses(program.graph)
    values: dict[fx.Node, Any] = {node: feeds[node.name] for node in program.inputs}

    def value(node: fx.Node) -> Any:
        return program.weights[node.meta["weight"]] if "weight" in node.meta else values[node]

    with torch.no_grad():
        if observe is not None:
            for node in program.inputs:
                observe(node, values[node])
        for node in program.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
                try:
                    values[node] = call(node, args, kwargs)
                except Exception as error:
                    error.add_note(f"in {node.format_node()} of module {program.module_of(node)!r}")
                    raise
                if observe is not None:
                    found = values[node]
                    observe(node, found.whole if isinstance(found, Gathered) else found)
            elif node.op == "output":
                returned = fx.map_arg(node.args[0], value)
            for dead in last_use.get(node, ()):
                values.pop(dead, None)
    return dict(zip(program.output_names, returned, strict=True))


def fill(program: Program, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete the inputs of a decoder; see `fill_inputs`."""
    return fill_inputs(signature(program), given)


def signature(program: Program) -> dict[str, InputType]:
    """Input name → its type; sizes that vary are None."""
    return {
        node.name: InputType(
            node.meta["val"].dtype,
            tuple(d if isinstance(d, int) else None for d in map(dim_expr, node.meta["val"].shape)),
        )
        for node in program.inputs
        if isinstance(node.meta["val"], Tensor)
    }


def fill_inputs(declared: Mapping[str, InputType], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete the inputs of a decoder: an empty cache, a mask of ones, positions that count the mask's ones.

    All inputs called ``past_key_values_…`` are the cache, ``[batch, …, past, …]``, codes and their scales alike.

    Raises QCompileError for an empty prompt.
    """
    feeds = dict(given)
    ids = feeds.get("input_ids")
    if ids is None:
        return feeds
    if ids.ndim != 2 or ids.numel() == 0:
        raise QCompileError(f"input_ids has shape {list(ids.shape)}; give at least one token as [batch, sequence]")
    batch, length = ids.shape
    past = 0
    for name, kind in declared.items():
        if name.startswith("past_key_values_"):
            if name not in feeds:
                sizes = [batch, *(0 if d is None else d for d in kind.sizes[1:])]
                feeds[name] = torch.zeros(sizes, dtype=kind.dtype, device=ids.device)
            past = max(past, feeds[name].shape[2])
    mask = feeds.get("attention_mask")
    if mask is None:
        mask = torch.ones(batch, past + length, dtype=torch.int64, device=ids.device)
    if "attention_mask" in declared:
        feeds["attention_mask"] = mask
    if "position_ids" in declared and "position_ids" not in feeds:
        feeds["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -length:]
    return feeds


def _check(program: Program, feeds: Mapping[str, Tensor]) -> None:
    names = [node.name for node in program.inputs]
    if missing := [name for name in names if name not in feeds]:
        raise QCompileError(f"input {missing[0]!r} is missing; the program takes {names}")
    if unknown := [name for name in feeds if name not in names]:
        raise QCompileError(f"input {unknown[0]!r} is unknown; the program takes {names}")
    for node in program.inputs:
        fake, tensor = node.meta["val"], feeds[node.name]
        if isinstance(fake, Tensor) and (tensor.ndim != fake.ndim or tensor.dtype != fake.dtype):
            raise QCompileError(
                f"input {node.name!r} is {tensor.dtype}{list(tensor.shape)}; the program takes {program.type_of(node)}"
            )


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node → the nodes whose values nothing reads after it."""
    seen: set[fx.Node] = set()
    table: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                table.setdefault(node, []).append(source)
    return table
