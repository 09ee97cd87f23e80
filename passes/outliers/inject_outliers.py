"""Give a model activation outliers without changing its function.

    n = rms_norm(x, [d], γ, ε)                n = rms_norm(x, [d], γ·s, ε)
    y = linear(n, W)                   ⟶      y = linear(n, W·diag(1/s))         s = gain at a few channels, else 1

Exact in real arithmetic, and to rounding in floating point. A norm without a gain gets one. Large models grow such
channels by themselves; a small one with injected ones shows what they do to quantization, and what the passes that
remove them are worth. Folding the gains removes these; inject-stream-outliers and inject-input-outliers make others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.ir.contractions import Contraction, find_contractions
from qcompile.ir.moves import axis_back, moved, rank
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class InjectOutliers(Pass):
    """Scale a few channels of every norm up, and the columns of the weights that read it down.

    The channels are the same in all norms of one width, as they are in real models.

    Args:
        channels: how many channels of each norm.
        gain: their factor.
        seed: which channels.
    """

    name: ClassVar[str] = "inject-outliers"
    channels: int = 4
    gain: float = 30.0
    seed: int = 0

    def run(self, program: Program) -> Report:
        """Inject behind every norm whose readers are all multiplications with weights.

        Raises RecipeError for a gain that is zero or not finite, or fewer than one channel.
        """
        if self.channels < 1 or not 0 < abs(self.gain) < float("inf"):
            raise RecipeError(f"pass {self}: give at least one channel and a finite gain other than 0")
        report = Report()
        by_node: dict[fx.Node, list[Contraction]] = {}
        for contraction in find_contractions(program):
            by_node.setdefault(contraction.node, []).append(contraction)
        for norm in program.calls(aten.rms_norm.default, aten.layer_norm.default):
            sinks = _sinks(program, norm, by_node)
            if isinstance(sinks, str):
                report.skip(norm, sinks)
                continue
            scale = self._scale(int(program.arg(norm, "normalized_shape")[-1]))
            self._inject(program, norm, sinks, scale)
            chosen = scale.ne(1).nonzero().flatten().tolist()
            report.rewrote(norm, f"channels {chosen} times {self.gain:g}, read by {len(sinks)} weights")
        return report

    def _scale(self, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        scale = torch.ones(width, dtype=torch.float64)
        scale[torch.randperm(width, generator=generator)[: self.channels]] = self.gain
        return scale

    def _inject(self, program: Program, norm: fx.Node, sinks: dict[fx.Node, int], scale: Tensor) -> None:
        if program.arg(norm, "weight") is None:
            key = f"{program.module_of(norm) or norm.name}.outliers"
            if key in program.weights:  # a module that runs twice
                key = f"{key}.{norm.name}"
            gain = program.add_weight(key, scale.to(norm.meta["val"].dtype), program.module_of(norm))
            program.set_arg(norm, "weight", gain)
        else:
            _multiply(program, program.arg(norm, "weight"), scale, 0)
        if norm.target is aten.layer_norm.default and program.arg(norm, "bias") is not None:
            _multiply(program, program.arg(norm, "bias"), scale, 0)
        for weight, axis in sinks.items():
            _multiply(program, weight, scale.reciprocal(), axis)


def _multiply(program: Program, weight: fx.Node, scale: Tensor, axis: int) -> None:
    """Record that `weight` is multiplied along `axis` when it is read."""
    shape = [1] * weight.meta["val"].ndim
    shape[axis] = -1
    program.weights.edit(program.key(weight), lambda tensor: (tensor.double() * scale.view(shape)).to(tensor.dtype))


def _sinks(program: Program, norm: fx.Node, by_node: dict[fx.Node, list[Contraction]]) -> dict[fx.Node, int] | str:
    """Each weight that reads `norm`'s output and its contracted axis; or the reason why it must be left alone."""
    if len(program.arg(norm, "normalized_shape")) != 1:
        return "it normalises more than one axis"
    for name in ("weight", "bias") if norm.target is aten.layer_norm.default else ("weight",):
        source = program.arg(norm, name)
        if source is None:
            continue
        if not program.is_weight(source):
            return f"its {name} is computed, so no gain can be scaled"
        if len(source.users) > 1:
            others = _names(user for user in source.users if user is not norm)
            return f"its {name} {program.key(source)!r} is shared with {others}"
    reading: list[Contraction] = []
    for value, user in _readers(program, norm):
        here = [c for c in by_node.get(user, ()) if c.input is value and c.input_axis == rank(value) - 1]
        if not here:
            return f"it is read by {user.name} ({user.target}), which is no multiplication with a weight"
        reading += here
    sinks: dict[fx.Node, int] = {}
    for contraction in reading:
        if sinks.setdefault(contraction.weight, contraction.axis_in) != contraction.axis_in:
            return f"weight {program.key(contraction.weight)!r} is contracted over two different axes"
    return _foreign(program, reading) or sinks


def _readers(program: Program, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(value, reader) for all that reads `node`, looking through calls that keep its last axis as it is."""
    for user in node.users:
        if _keeps_last_axis(program, user, node):
            yield from _readers(program, user)
        else:
            yield node, user


def _keeps_last_axis(program: Program, call: fx.Node, operand: fx.Node) -> bool:
    """Whether every row of `call` along its last axis is a row of `operand`, its elements as they were."""
    if moved(program, call) is not operand or not isinstance(call.meta["val"], Tensor) or rank(call) == 0:
        return False
    if str(call.target).startswith("qcompile.") or call.meta["val"].shape[-1] != operand.meta["val"].shape[-1]:
        return False
    return axis_back(program, call, rank(call) - 1) == rank(operand) - 1


def _foreign(program: Program, reading: list[Contraction]) -> str | None:
    """A reader of one of the weights that is not among `reading`."""
    for contraction in reading:
        name = repr(program.key(contraction.weight))
        if decoded := [node for node in contraction.path if str(node.target).startswith("qcompile.")]:
            return f"weight {name} is quantized already ({decoded[0].name})"
        inside = {n for c in reading if c.weight is contraction.weight for n in (*c.path, c.node)}
        for node in (contraction.weight, *contraction.path):
            if others := [user for user in node.users if user not in inside]:
                return f"weight {name} is also read by {_names(others)}"
    return None


def _names(nodes: Iterable[fx.Node]) -> str:
    return " and ".join(node.name for node in nodes)
