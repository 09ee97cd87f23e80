"""Which parts a program is written in: ``layers:N``, ranges of segments, or ``tensor:N``, ranks that share products.

A range of segments is a program of its own, from the residual stream to the residual stream; what inputs alone decide,
masks and rotary tables, is computed again in each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from qcompile.calibration.chain import Chain, Target, cut
from qcompile.errors import LoweringError, RecipeError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr


@dataclass(frozen=True)
class Shards:
    """Into how many parts.

    >>> Shards.parse("layers:2"), str(Shards.parse("none"))
    (Shards(layers=2, ranks=1), 'none')
    """

    layers: int = 1
    ranks: int = 1

    @classmethod
    def parse(cls, text: str) -> Shards:
        """``none``, ``layers:N`` or ``tensor:N``. Raises RecipeError for anything else."""
        found = re.fullmatch(r"(layers|tensor):([1-9][0-9]*)", text)
        if text == "none":
            return cls()
        if found is None:
            raise RecipeError(f"torch_mlir has no shards={text!r}; use shards=none, layers:2 or tensor:2")
        count = int(found[2])
        return cls(layers=count) if found[1] == "layers" else cls(ranks=count)

    def __str__(self) -> str:
        return f"layers:{self.layers}" if self.layers > 1 else f"tensor:{self.ranks}" if self.ranks > 1 else "none"


def segments_of(program: Program) -> Chain:
    """The program's segments, by its products with weights."""
    return cut(program, [Target(c.node, c.input) for c in find_contractions(program)], sequential=False)


def layer_ranges(program: Program, count: int) -> Iterator[Program]:
    """`program` in `count` parts, in order; the head goes with the last.

    Raises LoweringError where it has fewer segments.
    """
    if count == 1:
        yield program
        return
    chain = segments_of(program)
    starts = [stage.starts for stage in chain.stages]  # one stage a segment
    body = chain.segments - 1 if chain.segments > count else chain.segments
    if count > chain.segments:
        raise LoweringError(
            f"the program has {chain.segments} segments, which layers:{count} cannot part; use layers:{chain.segments}"
        )
    bounds = [0, *(round(i * body / count) for i in range(1, count)), chain.segments]
    carried = set(chain.carried)
    for first, last in pairwise(bounds):
        begin = starts[first] if first else ()
        end = starts[last] if last < len(starts) else ()
        yield part_of(program, begin, end, last == chain.segments, carried)


def part_of(program: Program, begin: tuple[str, ...], end: tuple[str, ...], last: bool, carried: set[str]) -> Program:
    """The part from the values `begin` to the values `end`, and every output of the program that is made between."""
    part = program.clone()
    named = {node.name: node for node in part.graph.nodes}
    outputs = dict(part.outputs)
    behind = _descends(part, [named[name] for name in begin])
    for name in begin:
        _become_input(part, named[name], f"from_{name}")
    ahead = _descends(part, [named[name] for name in end if name not in carried])
    kept = {
        name: node
        for name, node in outputs.items()
        if isinstance(node, fx.Node) and node.name in named and _inside(part, node, begin, behind, ahead, last)
    }
    passed = {f"from_{name}": _alive(part, name) for name in end}
    results = {**kept, **passed}
    part.output_node.args = (tuple(results.values()),)
    part.output_names = tuple(results)
    part.refresh()
    _settle_sizes(part)
    for node in part.inputs:
        if not node.users:
            part.graph.erase_node(node)
    part.info = dict(program.info)
    return part


def _settle_sizes(part: Program) -> None:
    """Let sizes be read off the first input that has them, the same one in parts that are alike."""
    sizes = torch.ops.aten.sym_size.int
    needed = [n for n in part.inputs if any(user.target is not sizes for user in n.users)]
    for node in part.calls(sizes):
        wanted = dim_expr(node.meta["val"])
        for source in needed:
            found = [axis for axis, size in enumerate(source.meta["val"].shape) if dim_expr(size) == wanted]
            if found:
                node.args = (source, found[0])
                break


def _alive(part: Program, name: str) -> fx.Node:
    """The value of that name, or the input that stands for it."""
    nodes = {node.name: node for node in part.graph.nodes}
    found: fx.Node = nodes.get(f"from_{name}") or nodes[name]
    return found


def _become_input(part: Program, node: fx.Node, name: str) -> None:
    anchor = part.placeholders[-1]
    with part.graph.inserting_after(anchor):
        new = part.graph.create_node("placeholder", name, name=name)
    new.meta.update(val=node.meta["val"], module="")
    node.replace_all_uses_with(new)


def _descends(part: Program, sources: list[fx.Node]) -> set[fx.Node]:
    found = set(sources)
    for node in part.graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _inside(
    part: Program, node: fx.Node, begin: tuple[str, ...], behind: set[fx.Node], ahead: set[fx.Node], last: bool
) -> bool:
    """Whether an output is made between: computed from what the part begins with and not from what it ends with."""
    after = not begin or node in behind
    return after and (last or node not in ahead)


def canonical(program: Program) -> dict[fx.Node, str]:
    """Keys for a part's weights that another part with the same layers at other places has too.

    The first number in a name counts from the least one in the part: ``model.layers.7.mlp`` ⟶ ``model.layers.+1.mlp``.
    Raises LoweringError where that makes two names one.
    """
    numbers: dict[str, int] = {}
    split = {node: re.fullmatch(r"([^0-9]*\.)([0-9]+)(\..*)?", program.key(node)) for node in program.weight_nodes}
    for found in split.values():
        if found is not None:
            numbers[found[1]] = min(numbers.get(found[1], 1 << 30), int(found[2]))
    keys = {
        node: program.key(node) if found is None else f"{found[1]}+{int(found[2]) - numbers[found[1]]}{found[3] or ''}"
        for node, found in split.items()
    }
    if len(set(keys.values())) < len(keys):
        raise LoweringError("two weights of one shard would have one name; use shards=none")
    return keys
