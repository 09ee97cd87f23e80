"""Operators that passes put into a program: what they do to channels when it runs is fixed."""

from __future__ import annotations

import torch
from torch import fx

import qcompile.ops  # noqa: F401  registers them
from qcompile.spaces.layout import Layout
from qcompile.spaces.registry import rule
from qcompile.spaces.walk import Walk, no_wires


@rule(torch.ops.qcompile.hadamard.default, says="a rotation when the model runs: nothing passes")
def hadamard(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    return _stop(walk, node, "rotates its channels when the model runs")


@rule(torch.ops.qcompile.quantize.default, torch.ops.qcompile.dequantize.default, says="codes: nothing passes")
def quantize(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    return _stop(walk, node, "rounds its values to codes")


def _stop(walk: Walk, node: fx.Node, reason: str) -> Layout | list[Layout]:
    return walk.barrier(node, reason) if walk.wired(node) else no_wires(node)
