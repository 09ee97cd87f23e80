"""How a block stands in the stream: before or after a norm, beside another, scaled, repeated."""

from __future__ import annotations

from collections.abc import Callable

from .attention import attention, cross_attention
from .feedforward import chain, experts, gated, mlp
from .graph import Dice, Graph
from .linears import linear
from .mixers import channel_gate, convolution, over_tokens, shift, squeeze, token_gate
from .norms import norm
from .traps import trap

Layer = Callable[[Graph, Dice, str, str], str]

LAYERS: dict[str, Layer] = {
    "mlp": mlp,
    "gated": gated,
    "attention": attention,
    "chain": chain,
    "cross": cross_attention,
    "experts": experts,
    "convolution": convolution,
    "channel gate": channel_gate,
    "token gate": token_gate,
    "over tokens": over_tokens,
    "shift": shift,
    "squeeze": squeeze,
    "trap": trap,
}
"""The layers a block may hold, plainest first: x ``[b, s, width]`` ⟶ the same."""

WIRINGS = 12


def block(g: Graph, dice: Dice, kind: str, x: str, skipped: str) -> str:
    """The stream after one block. `skipped` is the stream as it began."""
    twice = dice.rarely(8)
    wiring, start = dice.roll(WIRINGS), dice.place
    y = _wired(g, dice, LAYERS[kind], x, skipped, wiring)
    if twice and y:  # the same weights once more
        dice.place = start
        y = _wired(g, dice, LAYERS[kind], y, skipped, wiring)
    if dice.rarely(10):
        g.output(f"{g.scope}.stream", y)
    return y


def _wired(g: Graph, dice: Dice, layer: Layer, x: str, skipped: str, wiring: int) -> str:
    if wiring == 4:  # after
        return norm(g, dice, _residual(g, dice, x, layer(g, dice, x, "layer")), "norm")
    if wiring == 5:  # before and after
        return _residual(g, dice, x, norm(g, dice, layer(g, dice, norm(g, dice, x, "norm"), "layer"), "after"))
    if wiring == 6:  # two layers on one norm
        other = LAYERS[dice.pick(*LAYERS)]
        y = norm(g, dice, x, "norm")
        both = layer(g, dice, y, "layer"), other(g, dice, y, "other")
        return g.add(g.add(both[0], both[1]), x) if dice.often() else g.add(_residual(g, dice, x, both[0]), both[1])
    if wiring == 7:  # a norm each
        other = LAYERS[dice.pick(*LAYERS)]
        first = layer(g, dice, norm(g, dice, x, "norm"), "layer")
        return g.add(_residual(g, dice, x, first), other(g, dice, norm(g, dice, x, "other_norm"), "other"))
    if wiring == 8:  # no norm
        return _residual(g, dice, x, layer(g, dice, x, "layer"))
    if wiring == 9:  # no residual
        return layer(g, dice, norm(g, dice, x, "norm"), "layer")
    if wiring == 10:  # the norm's result is the residual
        y = norm(g, dice, x, "norm")
        return _residual(g, dice, y, layer(g, dice, y, "layer"))
    if wiring == 11:  # beside the stream as it began
        joined = g.call("cat", [norm(g, dice, x, "norm"), skipped], -1)
        y = linear(g, dice, joined, 2 * g.width, g.width, "join")
        return _residual(g, dice, x, layer(g, dice, y, "layer"))
    return _residual(g, dice, x, layer(g, dice, norm(g, dice, x, "norm"), "layer"))


def _residual(g: Graph, dice: Dice, x: str, y: str) -> str:
    """x + y, in one of its many forms."""
    which = dice.roll(14)
    if which == 1:
        return g.add(y, x)
    if which == 2:
        return g.add(x, g.mul(y, 0.22))
    if which == 3:
        return g.add(x, g.mul(y, g.weight("residual_scale", [g.width], 0.6, 0.5)))
    if which == 4:
        return g.call("add.Tensor", x, y, named={"alpha": 0.5})
    if which == 5:
        gate = g.call("sigmoid", g.call("linear", x, g.weight("gate", [1, g.width])))
        return g.add(x, g.mul(y, gate))
    if which == 6:
        return g.call("sub.Tensor", x, g.call("dropout", y, 0.1, False))
    if which == 7:
        return g.add(g.mul(x, 1.3), y)
    if which == 8:
        return g.add(g.add(x, g.shift("constant", g.width)), y)
    if which == 9:
        return g.mul(g.add(x, y), g.weight("stream_scale", [g.width], 1.0, 0.4))
    if which == 10:
        return g.add(g.mul(x, g.weight("number", [1], 1.0, 0.3)), g.mul(y, g.weight("other_number", [], 1.0, 0.3)))
    return g.add(x, y)
