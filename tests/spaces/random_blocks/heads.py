"""Where a stream ends: logits, tied or not, a pooled token, the stream itself."""

from __future__ import annotations

from .graph import VOCABULARY, Dice, Graph
from .linears import linear
from .norms import norm


def head(g: Graph, dice: Dice, x: str) -> None:
    """Return what becomes of the stream under the name ``logits``, and other things sometimes."""
    g.scope = "head"
    y = norm(g, dice, x, "norm") if dice.often() else x
    if dice.rarely(5):
        g.output("hidden", y)
    if dice.rarely(6):
        g.output("stream", x)
    which = dice.roll(8)
    if which == 6:
        y = g.call("select.int", y, 1, dice.pick(0, -1)) if dice.often() else g.call("mean.dim", y, [1])
        pooled = g.call(
            "tanh", g.call("linear", y, g.weight("pool.weight", [g.width, g.width]), g.shift("pb", g.width))
        )
        g.output("logits", g.call("linear", pooled, g.weight("classes.weight", [3, g.width])))
        return
    if which == 7:
        g.output("logits", y)
        return
    if which in (4, 5):
        y = linear(g, dice, y, g.width, g.width, "transform")
        y = norm(g, dice, g.call("gelu", y), "transform_norm") if which == 4 else y
    y = g.part(y, 1, -1) if dice.rarely(6) else y
    if g.table and dice.rarely(2):
        logits = g.call("linear", y, g.table, *([g.shift("bias", VOCABULARY)] if dice.rarely(3) else []))
    else:
        bias = [g.shift("logits.bias", VOCABULARY)] if dice.rarely(3) else []
        logits = g.call("linear", y, g.weight("logits.weight", [VOCABULARY, g.width]), *bias)
    if dice.rarely(4):
        logits = g.mul(g.call("tanh", g.call("div.Tensor", logits, 3.0)), 3.0)
    g.output("logits", g.mul(logits, 0.25) if dice.rarely(5) else logits)
