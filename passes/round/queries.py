"""Products whose results become queries or keys, found through the graph.

linear(x, W) ─▶ norm, rotary positions, views ─▶ query or key of an attention
"""

from __future__ import annotations

from torch import fx

from qcompile.ir.attention import find_attention
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program


def made_for_scores(program: Program) -> set[fx.Node]:
    """The products that queries or keys are computed from, with no other product of a weight between."""
    products = {c.node for c in find_contractions(program)}
    waiting = [operand.node for found in find_attention(program) for operand in (found.query, found.key)]
    seen, reached = set[fx.Node](), set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in products:
            reached.add(node)
        else:
            waiting += node.all_input_nodes
    return reached
