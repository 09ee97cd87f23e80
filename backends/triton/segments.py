"""Which segment of the model each weight belongs to: the files of a bundle follow the residual stream."""

from __future__ import annotations

import torch

from qcompile.backends.triton.ops.registration import PLANS
from qcompile.calibration.chain import Target, cut
from qcompile.ir.program import Program

aten = torch.ops.aten


def segments_of(program: Program) -> dict[str, int]:
    """Key of each weight → the segment of its first reader; all of them 0 where the graph has no stream to cut at."""
    products = [n for n in program.nodes if n.target in PLANS or n.target is aten.linear.default]
    targets = [Target(node, node.args[0], changes=False) for node in products]  # type: ignore[arg-type]
    stages = cut(program, targets, sequential=False).stages
    order = {node: i for i, node in enumerate(program.nodes)}
    starts = sorted((min(order[target.at] for target in stage.targets), stage.segment) for stage in stages)
    found = {}
    for weight in program.weight_nodes:
        first = min((order[user] for user in weight.users if user in order), default=0)
        passed = [segment for position, segment in starts if position <= first]
        found[program.key(weight)] = passed[-1] if passed else 0
    return found
