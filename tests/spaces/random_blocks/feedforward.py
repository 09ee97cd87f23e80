"""Feed-forward layers: plain, gated with the gate's channels anywhere, and many experts."""

from __future__ import annotations

from .graph import END, Dice, Graph
from .linears import linear


def mlp(g: Graph, dice: Dice, x: str, name: str) -> str:
    """linear, function, linear; sometimes deeper, with a multiplication or a bias between."""
    wide = dice.pick(16, 12, 20, 14, 24, 8)
    y = linear(g, dice, x, g.width, wide, f"{name}.up")
    y = _function(g, dice, y)
    if dice.rarely(5):
        y = g.mul(y, g.weight(f"{name}.scale", [wide], 1.0, 0.5))
    if dice.rarely(5):
        y = g.call("relu", linear(g, dice, y, wide, wide, f"{name}.middle"))
    if dice.rarely(6):
        y = g.call("layer_norm", y, [wide], g.gain(f"{name}.gain", wide), g.shift(f"{name}.beta", wide), 1e-5)
    return linear(g, dice, g.call("dropout", y, 0.1, False) if dice.rarely(4) else y, wide, g.width, f"{name}.down")


def _function(g: Graph, dice: Dice, y: str) -> str:
    which = dice.roll(7)
    if which == 3:
        return g.call("square", g.call("relu", y))
    if which == 4:
        return g.call("gelu", y, named={"approximate": '"tanh"'})
    if which == 5:
        return g.mul(y, g.call("sigmoid", g.mul(y, 1.702)))
    return g.call("relu", y) if which < 2 else g.activation(dice, y)


def chain(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Linear maps with nothing, a number or a vector between."""
    y = linear(g, dice, x, g.width, 12, f"{name}.first")
    which = dice.roll(5)
    if which == 1:
        y = g.mul(y, g.weight(f"{name}.scale", [12], 1.0, 0.5))
    if which == 2:
        y = g.add(g.mul(y, 0.5), g.shift(f"{name}.shift", 12))
    if which == 3:
        y = g.call("neg", g.call("cat", [g.part(y, -1, 8), g.part(y, -1, 0, 8)], -1))
    if which == 4:
        y = g.add(y, g.call("relu", y))
    return linear(g, dice, y, 12, g.width, f"{name}.second")


def gated(g: Graph, dice: Dice, x: str, name: str) -> str:
    """function(gate) · up, from two maps or from one whose channels are halves or alternate."""
    wide = dice.pick(16, 12, 20, 14, 24, 10)
    gate, up = _gate_and_up(g, dice, x, name, wide)
    if dice.rarely(6):
        gate, up = g.call("clamp", gate, None, 3.0), g.call("clamp", up, -3.0, 3.0)
    if dice.rarely(6):
        up = g.add(up, 1.0)
    active = g.call(dice.pick("silu", "gelu", "sigmoid", "relu", "tanh"), gate)
    y = g.mul(active, up) if dice.often() else g.mul(up, active)
    if dice.rarely(6):
        y = g.call("rms_norm", y, [wide], g.gain(f"{name}.gain", wide), 1e-5)
    return linear(g, dice, y, wide, g.width, f"{name}.down")


def _gate_and_up(g: Graph, dice: Dice, x: str, name: str, wide: int) -> tuple[str, str]:
    which = dice.roll(8)
    if which < 3:
        gate = linear(g, dice, x, g.width, wide, f"{name}.gate")
        return gate, gate if dice.rarely(6) else linear(g, dice, x, g.width, wide, f"{name}.up")
    both = linear(g, dice, x, g.width, 2 * wide, f"{name}.gate_up")
    return _halves(g, both, which - 3, wide)


def _halves(g: Graph, both: str, which: int, wide: int) -> tuple[str, str]:
    """The two halves of the last axis: by chunk, split or slice; in turns, by steps of two or an axis of two."""
    if which == 0:
        first, second = g.items(g.call("chunk", both, 2, -1), 2)
    elif which == 1:
        first, second = g.items(g.call("split.Tensor", both, wide, -1), 2)
    elif which == 2:
        second, first = g.part(both, -1, 0, wide), g.part(both, -1, wide)
    elif which == 3:
        first, second = g.part(both, -1, 0, END, 2), g.part(both, -1, 1, END, 2)
    else:
        parts = g.call("unflatten.int", both, -1, [wide, 2])
        first, second = g.items(g.call("unbind.int", parts, -1), 2)
    return first, second


def experts(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Experts chosen for each token: their weights one stack, or one after the other; routing soft or by the best."""
    count, wide = dice.pick(3, 4, 2), dice.pick(8, 12, 6)
    shares = _routing(g, dice, x, name, count)
    y = dice.pick(_batched, _unrolled, _everything)(g, dice, x, name, count, wide, shares)
    if dice.rarely(4):
        y = g.add(y, mlp(g, dice, x, f"{name}.shared"))
    return y


def _routing(g: Graph, dice: Dice, x: str, name: str, count: int) -> str:
    """[b, s, count]: how much of each expert a token gets."""
    logits = linear(g, dice, x, g.width, count, f"{name}.router")
    which = dice.roll(4)
    if which == 0:
        return g.call("softmax.int", logits, -1)
    if which == 1:
        return g.call("sigmoid", g.add(logits, g.shift(f"{name}.preference", count)))
    scores = g.call("softmax.int", logits, -1) if which == 2 else logits
    best = g.call("topk", scores, 2)
    values, where = g.items(best, 2)
    if which == 3:
        values = g.call("softmax.int", values, -1)
    else:
        values = g.call("div.Tensor", values, g.call("sum.dim_IntList", values, [-1], True))
    return g.call("scatter.src", g.call("zeros_like", scores), -1, where, values)


def _batched(g: Graph, dice: Dice, x: str, name: str, count: int, wide: int, shares: str) -> str:
    """bmm over stacks [count, in, out], or [count, out, in] turned."""
    tokens = g.call("expand", g.call("unsqueeze", g.view(x, -1, g.width, op="reshape"), 0), [count, -1, -1])
    form, bias = dice.roll(3), dice.rarely(3)
    up = 2 * wide if form else wide
    y = _stack(g, dice, tokens, f"{name}.up", count, g.width, up, bias)
    if form:
        first, second = _halves(g, y, dice.roll(5), wide)
        y = g.mul(g.call("silu", first), second)
    else:
        y = g.call("relu", y)
    y = _stack(g, dice, y, f"{name}.down", count, wide, g.width, bias)
    weights = g.call("unsqueeze", g.swap(g.view(shares, -1, count, op="reshape"), 0, 1), -1)
    return g.view(g.call("sum.dim_IntList", g.mul(y, weights), [0]), g.b, g.s, g.width)


def _stack(g: Graph, dice: Dice, x: str, name: str, count: int, n_in: int, n_out: int, bias: bool) -> str:
    scale = n_in**-0.5
    if dice.often():
        weight = g.weight(f"{name}.weight", [count, n_in, n_out], 0.0, scale)
    else:
        weight = g.swap(g.weight(f"{name}.weight", [count, n_out, n_in], 0.0, scale), 1, 2)
    offset = g.weight(f"{name}.bias", [count, 1, n_out], 0.0, 0.4) if bias else ""
    if bias and dice.often():
        return g.call("baddbmm", offset, x, weight)
    y = g.call("bmm", x, weight)
    return g.add(y, offset) if bias else y


def _unrolled(g: Graph, dice: Dice, x: str, name: str, count: int, wide: int, shares: str) -> str:
    """A linear of each slice of the stack; a token's share scales what goes in or what comes out."""
    up = g.weight(f"{name}.up", [count, wide, g.width], 0.0, g.width**-0.5)
    down, before, total = g.weight(f"{name}.down", [count, g.width, wide], 0.0, wide**-0.5), dice.rarely(3), ""
    for e in range(count):
        share = g.part(shares, -1, e, e + 1)
        y = g.call("linear", g.mul(x, share) if before else x, g.call("select.int", up, 0, e))
        y = g.call("linear", g.call("relu", y), g.call("select.int", down, 0, e))
        y = y if before else g.mul(y, share)
        total = g.add(total, y) if total else y
    return total


def _everything(g: Graph, dice: Dice, x: str, name: str, count: int, wide: int, shares: str) -> str:
    """One einsum for all experts."""
    up = g.weight(f"{name}.up", [count, wide, g.width], 0.0, g.width**-0.5)
    down = g.weight(f"{name}.down", [count, g.width, wide], 0.0, wide**-0.5)
    y = g.call("relu", g.call("einsum", '"bsh,efh->bsef"', [x, up]))
    if dice.often():
        return g.call("einsum", '"bsef,ehf,bse->bsh"', [y, down, shares])
    return g.call(
        "sum.dim_IntList", g.call("einsum", '"bsef,ehf->bseh"', [g.mul(y, g.call("unsqueeze", shares, -1)), down]), [2]
    )
