"""Gains and biases of norms, and what a pass says of norms that it takes together."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from qcompile.ir.program import Program
from qcompile.pass_base import Report

aten = torch.ops.aten

NORMS = (aten.rms_norm.default, aten.layer_norm.default)


def vectors(norm: fx.Node) -> tuple[str, ...]:
    """The arguments of a norm that are a gain and a bias."""
    return ("weight", "bias") if norm.target is aten.layer_norm.default else ("weight",)


def affine(program: Program, norm: fx.Node) -> list[fx.Node]:
    """A norm's gain and bias, where they are weights."""
    return [v for name in vectors(norm) if program.is_weight(v := program.arg(norm, name))]


def computed(program: Program, norm: fx.Node) -> str | None:
    """That a norm's gain or bias is no weight; None where each is one, or is not there."""
    for name in vectors(norm):
        vector = program.arg(norm, name)
        if vector is not None and not program.is_weight(vector):
            return f"its {name} {vector.name} is computed; raise-norms stores it"
    return None


def tell(report: Report, norms: Iterable[fx.Node], reason: str | None, done: str) -> None:
    """Say of each norm what was done to it, or the reason why it was left alone."""
    for norm in norms:
        if reason is None:
            report.rewrote(norm, done)
        else:
            report.skip(norm, reason)
