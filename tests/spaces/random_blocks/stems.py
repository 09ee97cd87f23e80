"""Where a stream begins: token ids, an image, a signal, or vectors as they come."""

from __future__ import annotations

from .graph import POSITIONS, VOCABULARY, Dice, Graph
from .norms import norm


def stem(g: Graph, dice: Dice) -> str:
    """The stream ``[b, s, width]`` of a program's inputs; chooses the width."""
    g.width, g.scope = dice.pick(8, 12, 16, 24, 8), "stem"
    begin = dice.pick(_tokens, _tokens, _tokens, _tokens, _pixels, _signal, _vectors)
    x = begin(g, dice)
    if dice.rarely(4):
        x = norm(g, dice, x, "norm")
    return x


def _tokens(g: Graph, dice: Dice) -> str:
    ids = g.input("ids", "i64", "b", "s")
    if dice.rarely(6):  # a narrow table, then a map
        narrow = g.call("embedding", g.weight("table", [VOCABULARY, 6], 0.0, 1.0), ids)
        x = g.call("linear", narrow, g.weight("project.weight", [g.width, 6]))
    else:
        g.table = g.weight("table", [VOCABULARY, g.width], 0.0, 1.0)
        x = g.call("embedding", g.table, ids)
    if dice.rarely(4):
        x = g.mul(x, dice.pick(g.width**0.5, 0.7, g.weight("multiplier", [], 1.7, 0.1)))
    if dice.rarely(3):
        x = _with_positions(g, dice, x)
    if dice.rarely(6):
        kinds = g.call("embedding", g.weight("kinds", [2, g.width], 0.0, 0.5), g.input("kind_ids", "i64", "b", "s"))
        x = g.add(x, kinds)
    return g.call("dropout", x, 0.1, False) if dice.rarely(6) else x


def _with_positions(g: Graph, dice: Dice, x: str) -> str:
    table, which = g.weight("positions", [POSITIONS, g.width], 0.0, 0.5), dice.roll(3)
    if which == 0:
        rows = {"device": 'torch.device("cpu")'}
        return g.add(x, g.call("embedding", table, g.call("add.Tensor", g.call("arange", g.s, named=rows), 2)))
    if which == 1:
        return g.add(x, g.call("embedding", table, g.input("places", "i64", "b", "s")))
    return g.add(x, g.call("slice.Tensor", table, 0, 0, g.s))


def _pixels(g: Graph, dice: Dice) -> str:
    """Patches of an image, or a small convolutional network."""
    image = g.input("pixels", "f64", "b", 3, 4, 4)
    x = _network(g, dice, image) if dice.rarely(2) else _conv(g, image, "patches", 3, g.width, 2, stride=2)
    x = g.swap(g.call("flatten.using_ints", x, 2), 1, 2)
    g.set_length(4)
    if dice.rarely(2):
        first = g.call("expand", g.weight("first", [1, 1, g.width], 0.0, 1.0), [g.b, -1, -1])
        x = g.call("cat", [first, x], 1)
        g.set_length(5)
    return g.add(x, g.weight("positions", [1, int(g.s), g.width], 0.0, 0.5)) if dice.often() else x


def _network(g: Graph, dice: Dice, image: str) -> str:
    """[b, 3, 4, 4] ⟶ [b, width, 2, 2] through batch norms, a residual, a depthwise convolution and a pool."""
    wide = dice.pick(8, 6)
    x = g.call("relu", _batch_norm(g, _conv(g, image, "first", 3, wide, 3), "first_norm", wide))
    y = _batch_norm(g, _conv(g, x, "second", wide, wide, 3, groups=dice.pick(1, 2, wide)), "second_norm", wide)
    y = _conv(g, g.call("relu", y), "third", wide, wide, 1)
    x = g.call("relu", g.add(x, y)) if dice.often() else g.add(x, y)
    if dice.rarely(3):
        gate = g.call("mean.dim", x, [2, 3], True)
        x = g.mul(x, g.call("sigmoid", _conv(g, gate, "squeeze", wide, wide, 1)))
    if dice.rarely(3):
        x = g.call("group_norm", x, 2, g.gain("group.gain", wide), g.shift("group.bias", wide), 1e-5)
    if dice.often():
        return _conv(g, g.call("max_pool2d", x, [2, 2]), "last", wide, g.width, 1)
    return g.call("avg_pool2d", _conv(g, x, "last", wide, g.width, 3), [2, 2])


def _conv(g: Graph, x: str, name: str, n_in: int, n_out: int, size: int, stride: int = 1, groups: int = 1) -> str:
    weight = g.weight(f"{name}.weight", [n_out, n_in // groups, size, size])
    around = (size - 1) // 2 if stride == 1 else 0
    return g.call("conv2d", x, weight, g.shift(f"{name}.bias", n_out), [stride] * 2, [around] * 2, [1, 1], groups)


def _batch_norm(g: Graph, x: str, name: str, width: int) -> str:
    spread = g.call("add.Tensor", g.call("square", g.weight(f"{name}.spread", [width], 1.0, 0.5)), 0.2)
    values = [g.gain(f"{name}.gain", width), g.shift(f"{name}.bias", width), g.shift(f"{name}.mean", width), spread]
    return g.call("batch_norm", x, *values, False, 0.1, 1e-5, True)


def _signal(g: Graph, dice: Dice) -> str:
    """Two convolutions along time."""
    x = g.input("signal", "f64", "b", 4, "s")
    x = g.call("conv1d", x, g.weight("first.weight", [g.width, 4, 3]), g.shift("first.bias", g.width), [1], [1])
    x = g.activation(dice, x)
    bias = g.shift("second.bias", g.width) if dice.often() else None
    x = g.call("conv1d", x, g.weight("second.weight", [g.width, g.width, 3]), bias, [1], [1])
    return g.swap(x, 1, 2) if dice.often() else g.call("permute", g.call("gelu", x), [0, 2, 1])


def _vectors(g: Graph, dice: Dice) -> str:
    """An input, which nothing may act on, or a map of one."""
    if dice.often():
        x = g.input("vectors", "f64", "b", "s", 6)
        return g.call("linear", x, g.weight("project.weight", [g.width, 6]), g.shift("project.bias", g.width))
    return g.input("vectors", "f64", "b", "s", g.width)
