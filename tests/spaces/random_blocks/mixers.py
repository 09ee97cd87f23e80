"""Layers that mix along tokens: convolutions, shifts, recurrences without a loop; and gates."""

from __future__ import annotations

from .graph import Dice, Graph
from .linears import linear


def convolution(g: Graph, dice: Dice, x: str, name: str) -> str:
    """A conv1d over tokens: depthwise and causal, grouped, or dense; gated by a map of x sometimes."""
    wide = g.width
    if dice.rarely(2):
        wide = 12
    y = x if wide == g.width and dice.rarely(3) else linear(g, dice, x, g.width, wide, f"{name}.in")
    gate = linear(g, dice, x, g.width, wide, f"{name}.gate") if dice.rarely(2) else ""
    groups = dice.pick(wide, 1, 2)
    weight = g.weight(f"{name}.kernel", [wide, wide // groups, 3])
    bias = g.shift(f"{name}.bias", wide) if dice.often() else None
    turned = g.swap(y, 1, 2) if dice.often() else g.call("permute", y, [0, 2, 1])
    if dice.often():  # causal: padded on both sides, cut on the right
        y = g.part(g.call("conv1d", turned, weight, bias, [1], [2], [1], groups), 2, 0, -2)
    else:
        y = g.call("conv1d", turned, weight, bias, [1], [1], [1], groups)
    y = g.call("silu", y) if dice.often() else y
    y = g.swap(y, 1, 2)
    y = g.mul(y, g.call("silu", gate)) if gate else y
    return y if wide == g.width and dice.rarely(3) else linear(g, dice, y, wide, g.width, f"{name}.out")


def shift(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Some channels, or some share of all, come from the token before."""
    first = g.mul(g.part(x, 1, 0, 1), 0.0)
    before = g.call("cat", [first, g.part(x, 1, 0, -1)], 1)
    which = dice.roll(3)
    if which == 0:
        half = g.width // 2
        mixed = g.call("cat", [g.part(before, -1, 0, half), g.part(x, -1, half)], -1)
    else:
        share = g.weight(f"{name}.share", [g.width], 0.5, 0.3)
        difference = g.call("sub.Tensor", before, x)
        mixed = g.add(x, g.mul(difference, share) if which == 1 else g.call("tanh", difference))
    return linear(g, dice, mixed, g.width, g.width, f"{name}.out")


def over_tokens(g: Graph, dice: Dice, x: str, name: str) -> str:
    """What is linear along tokens and leaves channels apart: cumsum, mean, a triangular average."""
    y = linear(g, dice, x, g.width, 12, f"{name}.in")
    which = dice.roll(4)
    if which == 0:
        y = g.mul(g.call("cumsum", y, 1), 0.3)
    elif which == 1:
        y = g.add(y, g.call("mean.dim", y, [1], True))
    elif which == 2:
        y = g.call("flip", y, [1])
    else:
        rows = {"dtype": "torch.float64", "device": 'torch.device("cpu")'}
        y = g.call("matmul", g.call("tril", g.mul(g.call("ones", [g.s, g.s], named=rows), 0.3)), y)
    if dice.rarely(2):
        y = g.mul(y, g.call("sigmoid", linear(g, dice, x, g.width, 12, f"{name}.gate")))
    return linear(g, dice, y, 12, g.width, f"{name}.out")


def token_gate(g: Graph, dice: Dice, x: str, name: str) -> str:
    """One number for each token: sigmoid(linear(x) → 1), times a map of x."""
    gate = g.call("sigmoid", linear(g, dice, x, g.width, 1, f"{name}.gate"))
    y = linear(g, dice, x, g.width, g.width, f"{name}.value")
    y = g.call("relu", y) if dice.often() else y
    return g.mul(gate, g.call("expand", y, [g.b, g.s, g.width]) if dice.rarely() else y)


def channel_gate(g: Graph, dice: Dice, x: str, name: str) -> str:
    """glu, or a gate on both of two maps: z·a + (1 − z)·b."""
    if dice.often():
        both = linear(g, dice, x, g.width, 2 * g.width, f"{name}.both")
        return g.call("glu", both, -1)
    z = g.call("sigmoid", linear(g, dice, x, g.width, g.width, f"{name}.z"))
    a = g.call("tanh", linear(g, dice, x, g.width, g.width, f"{name}.a"))
    b = linear(g, dice, x, g.width, g.width, f"{name}.b")
    return g.add(g.mul(z, a), g.mul(g.call("rsub.Scalar", z, 1.0), b))


def squeeze(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Squeeze and excite: channels scaled by a function of their means over tokens."""
    mean = g.call("mean.dim", x, [1], True)
    low = g.call("relu", g.call("linear", mean, g.weight(f"{name}.down", [4, g.width]), g.shift(f"{name}.db", 4)))
    gate = g.call(
        "sigmoid", g.call("linear", low, g.weight(f"{name}.up", [g.width, 4]), g.shift(f"{name}.ub", g.width))
    )
    return g.mul(linear(g, dice, x, g.width, g.width, f"{name}.value") if dice.often() else x, gate)
