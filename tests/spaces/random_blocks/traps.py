"""Operators that tie channels to their places: nothing but a look at them tells what may act on their input."""

from __future__ import annotations

from collections.abc import Callable

from .graph import END, Dice, Graph
from .linears import linear

Trap = Callable[[Graph, Dice, str, str], str]


def trap(g: Graph, dice: Dice, x: str, name: str) -> str:
    """One of `TRAPS`, of x or of a map of x, mapped once more sometimes."""
    kind = TRAPS[dice.roll(len(TRAPS))]
    y = linear(g, dice, x, g.width, g.width, f"{name}.in") if dice.often() else x
    y = kind(g, dice, y, name)
    return linear(g, dice, y, g.width, g.width, f"{name}.out") if dice.often() else y


def _along_channels(g: Graph, dice: Dice, x: str, name: str) -> str:
    which = dice.roll(7)
    if which == 0:
        return g.mul(g.call("cumsum", x, -1), 0.4)
    if which == 1:
        return g.call("cumprod", g.call("tanh", x), -1)
    if which == 2:
        return g.item(g.call("sort", x, -1), 0)
    if which == 3:
        return g.call("softmax.int", x, -1)
    if which == 4:
        return g.call("roll", x, [3], [-1])
    if which == 5:
        return g.call("flip", x, [-1])
    return g.mul(g.call("logcumsumexp", x, -1), 0.5)


def _reduced(g: Graph, dice: Dice, x: str, name: str) -> str:
    """A number for each token, made from its channels, put back: the mean, the largest, the sum of squares."""
    which = dice.roll(5)
    if which == 0:
        value = g.call("mean.dim", x, [-1], True)
    elif which == 1:
        value = g.call("amax", x, [-1], True)
    elif which == 2:
        value = g.call("tanh", g.call("sum.dim_IntList", g.call("square", x), [-1], True))
    elif which == 3:
        value = g.call("std.correction", x, [-1], named={"correction": 1, "keepdim": True})
    else:
        value = g.call("unsqueeze", g.call("select.int", x, -1, 2), -1)
    return g.add(x, value) if dice.often() else g.call("sub.Tensor", x, value)


def _shuffled(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Channels in another order: by index, by a view turned, by halves exchanged."""
    which = dice.roll(4)
    if which == 0:
        return g.call("index_select", x, -1, g.shuffle(f"{name}.order", g.width))
    if which == 1:
        return g.call("index.Tensor", x, [None, None, g.shuffle(f"{name}.order", g.width)])
    if which == 2:
        parts = g.swap(g.view(x, g.b, g.s, 2, g.width // 2), 2, 3)
        return g.view(parts, g.b, g.s, g.width, op="reshape")
    cut = dice.pick(g.width // 2, 3)
    return g.call("cat", [g.part(x, -1, cut), g.part(x, -1, 0, cut)], -1)


def _some(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Some channels go another way than the rest."""
    cut, which = dice.pick(g.width // 2, 3), dice.roll(4)
    first, rest = g.part(x, -1, 0, cut), g.part(x, -1, cut)
    if which == 0:
        return g.call("cat", [g.call("relu", first), rest], -1)
    if which == 1:
        return g.call("cat", [g.mul(first, 2.0), g.call("tanh", rest)], -1)
    if which == 2:
        return g.call("slice_scatter", x, g.call("sigmoid", first), -1, 0, cut)
    return g.call("constant_pad_nd", rest, [cut, 0], 0.3)


def _elementwise(g: Graph, dice: Dice, x: str, name: str) -> str:
    which = dice.roll(9)
    if which == 0:
        return g.call("abs", x)
    if which == 1:
        return g.call("clamp", x, -0.7, 0.9)
    if which == 2:
        return g.swap(g.call("prelu", g.swap(x, 1, 2), g.weight(f"{name}.slopes", [g.width], 0.3, 0.2)), 1, 2)
    if which == 3:
        return g.mul(x, x)
    if which == 4:
        return g.call("where.self", g.call("gt.Scalar", x, 0.0), x, g.mul(x, 0.1))
    if which == 5:
        return g.call("maximum", x, g.shift(f"{name}.floor", g.width))
    if which == 6:
        return g.call("pow.Tensor_Scalar", g.call("tanh", x), 3)
    if which == 7:
        return g.call("addcmul", x, g.call("tanh", x), g.shift(f"{name}.by", g.width), named={"value": 0.5})
    return g.call("lerp.Scalar", x, g.call("sin", x), 0.4)


def _reshaped(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Channels become tokens for a while, or a part of them is a matrix."""
    half, which = g.width // 2, dice.roll(4)
    if which == 0:  # halves of the channels as tokens
        parts = g.view(x, g.b, -1, half, op="reshape")
        return g.view(g.call("linear", parts, g.weight(f"{name}.half", [half, half])), g.b, g.s, g.width, op="reshape")
    if which == 1:
        parts = g.view(x, g.b, g.s, 2, half)
        return g.view(g.call("softmax.int", parts, -2), g.b, g.s, g.width, op="reshape")
    if which == 2:
        parts = g.view(x, g.b, g.s, half, 2)
        y = g.call("linear", parts, g.weight(f"{name}.pair", [2, 2]), g.shift(f"{name}.pair_bias", 2))
        return g.view(y, g.b, g.s, g.width, op="reshape")
    left = g.view(x, g.b, g.s, 2, half)
    squared = g.call("matmul", g.swap(left, 2, 3), left)  # [b, s, half, half]
    flat = g.call("flatten.using_ints", squared, -2)
    return g.call("linear", flat, g.weight(f"{name}.square", [g.width, half * half]))


def _fourier(g: Graph, dice: Dice, x: str, name: str) -> str:
    """The real part of a discrete Fourier transform over channels or tokens."""
    return g.mul(g.call("real", g.call("fft_fft", x, None, dice.pick(-1, 1))), 0.3)


def _against_itself(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Similarities of tokens or of channels."""
    if dice.often():
        weights = g.call("softmax.int", g.mul(g.call("matmul", x, g.swap(x, 1, 2)), 0.3), -1)
        return g.call("matmul", weights, x)
    gram = g.call("softmax.int", g.mul(g.call("matmul", g.swap(x, 1, 2), x), 0.3), -1)
    return g.call("matmul", x, gram)


def _scattered(g: Graph, dice: Dice, x: str, name: str) -> str:
    """The three largest channels of each token, the others 0; or only they, back in place by a map."""
    values, where = g.items(g.call("topk", x, 3), 2)
    if dice.often():
        return g.call("scatter.src", g.call("zeros_like", x), -1, where, values)
    return g.call("linear", values, g.weight(f"{name}.three", [g.width, 3]))


def _looked_up(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Rows of a table, chosen by the largest channel, added."""
    table = g.weight(f"{name}.rows", [g.width, g.width], 0.0, 1.0)
    return g.add(x, g.call("embedding", table, g.call("argmax", x, -1)))


def _every_other(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Even and odd channels change places, or are added."""
    even, odd = g.part(x, -1, 0, END, 2), g.part(x, -1, 1, END, 2)
    if dice.often():
        return g.call("flatten.using_ints", g.call("stack", [odd, even], -1), -2)
    return g.call("cat", [g.add(even, odd), g.call("sub.Tensor", even, odd)], -1)


TRAPS: tuple[Trap, ...] = (
    _along_channels,
    _reduced,
    _shuffled,
    _some,
    _elementwise,
    _reshaped,
    _fourier,
    _against_itself,
    _scattered,
    _looked_up,
    _every_other,
)
