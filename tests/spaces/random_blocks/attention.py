"""Attention: projections separate and fused, rotary embeddings, grouped queries, spelled out or as one operator."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from .graph import END, Dice, Graph
from .linears import linear
from .norms import head_norm, norm
from .scores import attend


@dataclass(frozen=True)
class Heads:
    """Numbers of query and key heads, and widths of a head of q and k, and of v."""

    queries: int
    keys: int
    width: int
    values: int

    @property
    def fused(self) -> int:
        """Channels of q, k and v together."""
        return (self.queries + self.keys) * self.width + self.keys * self.values


def attention(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Self-attention over x ``[b, s, width]``."""
    queries, keys = dice.pick((2, 2), (2, 2), (4, 2), (2, 1), (4, 1), (3, 3), (4, 4))
    width = dice.pick(4, 4, 8, 2, 6)
    heads = Heads(queries, keys, width, width)
    project = dice.pick(_separate, _separate, _split, _thirds, _interleaved, _grouped, _latent, _one_for_all)
    if project in (_separate, _latent) and dice.rarely():
        heads = Heads(queries, keys, width, dice.pick(6, 2, 5))
    q, k, v = project(g, dice, x, name, heads)
    if dice.rarely():
        q, k = head_norm(g, dice, q, f"{name}.q_norm", width), head_norm(g, dice, k, f"{name}.k_norm", width)
    if dice.rarely(2):
        q, k = _rotary(g, dice, q, k, name, width)
    out = attend(g, dice, q, k, v, name, (heads.queries, heads.keys, width))
    if dice.rarely(8):
        g.output(f"{name}.keys", k)
    return _finish(g, dice, out, x, name, heads)


def cross_attention(g: Graph, dice: Dice, x: str, name: str) -> str:
    """Queries from x, keys and values from an input ``memory[b, m, 6]``, maybe projected and normalised."""
    memory, inside, sizes = g.input("memory", "f64", "b", "m", 6), 6, [g.b, g.size("m")]
    if dice.rarely(2):
        memory, inside = g.call("linear", memory, g.weight(f"{name}.memory", [8, 6])), 8
    if dice.rarely(2):
        memory = head_norm(g, dice, memory, f"{name}.memory_norm", inside)
    heads = Heads(2, 2, 4, dice.pick(4, 6))
    q = _heads(g, linear(g, dice, x, g.width, 8, f"{name}.q"), [g.b, g.s], 2, 4)
    k_bias = g.shift(f"{name}.k.bias", 8) if dice.rarely() else None
    k = _heads(g, g.call("linear", memory, g.weight(f"{name}.k.weight", [8, inside]), k_bias), sizes, 2, 4)
    v_weight = g.weight(f"{name}.v.weight", [2 * heads.values, inside])
    v_bias = g.shift(f"{name}.v.bias", 2 * heads.values) if dice.rarely() else None
    v = _heads(g, g.call("linear", memory, v_weight, v_bias), sizes, 2, heads.values)
    out = attend(g, dice, q, k, v, name, (2, 2, 4), crossed=True)
    return _finish(g, dice, out, x, name, heads)


def _finish(g: Graph, dice: Dice, out: str, x: str, name: str, heads: Heads) -> str:
    """[b, heads, s, d] ⟶ the stream: normalised, gated, merged, projected."""
    if dice.rarely(6):
        out = head_norm(g, dice, out, f"{name}.head_norm", heads.values)
    if dice.rarely(6):
        gate = g.call("sigmoid", linear(g, dice, x, g.width, heads.queries, f"{name}.head_gate"))
        out = g.mul(out, g.call("unsqueeze", g.swap(gate, 1, 2), -1))
    inner = heads.queries * heads.values
    tokens = g.swap(out, 1, 2)
    merged = g.view(g.call("clone", tokens) if dice.rarely() else tokens, g.b, g.s, inner, op="reshape")
    if dice.rarely(6):
        merged = norm(g, dice, merged, f"{name}.out_norm", inner) if inner % 2 == 0 else merged
    if dice.rarely(5):
        merged = g.mul(merged, g.call("sigmoid", linear(g, dice, x, g.width, inner, f"{name}.gate")))
    return linear(g, dice, merged, inner, g.width, f"{name}.o")


def _heads(g: Graph, x: str, sizes: list[str], count: int, width: int) -> str:
    return g.swap(g.view(x, *sizes, count, width), 1, 2)


def _separate(g: Graph, dice: Dice, x: str, name: str, h: Heads) -> tuple[str, str, str]:
    q = linear(g, dice, x, g.width, h.queries * h.width, f"{name}.q")
    k = linear(g, dice, x, g.width, h.keys * h.width, f"{name}.k")
    v = linear(g, dice, x, g.width, h.keys * h.values, f"{name}.v")
    if dice.rarely(5):  # over all heads at once
        q = g.call("rms_norm", q, [h.queries * h.width], g.gain(f"{name}.q_gain", h.queries * h.width), 1e-5)
        k = g.call("rms_norm", k, [h.keys * h.width], g.gain(f"{name}.k_gain", h.keys * h.width), 1e-5)
    return _each(g, q, k, v, h)


def _each(g: Graph, q: str, k: str, v: str, h: Heads) -> tuple[str, str, str]:
    sizes = [g.b, g.s]
    return (
        _heads(g, q, sizes, h.queries, h.width),
        _heads(g, k, sizes, h.keys, h.width),
        _heads(g, v, sizes, h.keys, h.values),
    )


def _split(g: Graph, dice: Dice, x: str, name: str, h: Heads) -> tuple[str, str, str]:
    """One projection, cut into q, k and v."""
    whole = linear(g, dice, x, g.width, h.fused, f"{name}.qkv")
    widths = [h.queries * h.width, h.keys * h.width, h.keys * h.values]
    if dice.often():
        return _each(g, *_three(g, g.call("split_with_sizes", whole, widths, -1)), h)
    ends = [0, widths[0], sum(widths[:2]), END]
    q, k, v = (g.part(whole, -1, start, end) for start, end in pairwise(ends))
    return _each(g, q, k, v, h)


def _three(g: Graph, parts: str) -> tuple[str, str, str]:
    q, k, v = g.items(parts, 3)
    return q, k, v


def _thirds(g: Graph, dice: Dice, x: str, name: str, h: Heads) -> tuple[str, str, str]:
    """One projection of which q, k and v are equal thirds, by chunk or by an axis of three."""
    if h.queries != h.keys:
        return _split(g, dice, x, name, h)
    whole = linear(g, dice, x, g.width, h.fused, f"{name}.qkv")
    which = dice.roll(3)
    if which == 0:
        return _each(g, *_three(g, g.call("chunk", whole, 3, -1)), h)
    parts = g.view(whole, g.b, g.s, 3, h.queries, h.width)
    if which == 1:
        return _three(g, g.call("unbind.int", g.call("permute", parts, [2, 0, 3, 1, 4])))
    q, k, v = (g.swap(g.call("select.int", parts, 2, i), 1, 2) for i in range(3))
    return q, k, v


def _interleaved(g: Graph, dice: Dice, x: str, name: str, h: Heads) -> tuple[str, str, str]:
    """q, k and v of one head stand together: [heads, 3·d] by chunk, [heads, 3, d] or [heads, d, 3] by select."""
    if h.queries != h.keys:
        return _grouped(g, dice, x, name, h)
    whole = linear(g, dice, x, g.width, h.fused, f"{name}.qkv")
    which = dice.roll(3)
    if which == 0:
        parts = g.swap(g.view(whole, g.b, g.s, h.queries, 3 * h.width), 1, 2)
        return _three(g, g.call("chunk", parts, 3, -1))
    shape, axis = ((h.queries, 3, h.width), 3) if which == 1 else ((h.queries, h.width, 3), 4)
    parts = g.view(whole, g.b, g.s, *shape)
    q, k, v = (g.swap(g.call("select.int", parts, axis, i), 1, 2) for i in range(3))
    return q, k, v


def _grouped(g: Graph, dice: Dice, x: str, name: str, h: Heads) -> tuple[str, str, str]:
    """The queries of a group, then its key, then its value."""
    share = h.queries // h.keys
    whole = linear(g, dice, x, g.width, h.fused, f"{name}.qkv")
    parts = g.view(whole, g.b, g.s, h.keys, share + 2, h.width)
    q = g.view(g.part(parts, 3, 0, share), g.b, g.s, h.queries, h.width, op="reshape")
    k, v = g.call("select.int", parts, 3, -2), g.call("select.int", parts, 3, -1)
    return g.swap(q, 1, 2), g.swap(k, 1, 2), g.swap(v, 1, 2)


def _latent(g: Graph, dice: Dice, x: str, name: str, h: Heads) -> tuple[str, str, str]:
    """Keys and values from one narrow vector, normalised; a part of each key is shared by all heads."""
    q = _heads(g, linear(g, dice, x, g.width, h.queries * h.width, f"{name}.q"), [g.b, g.s], h.queries, h.width)
    shared = h.width // 2
    down = linear(g, dice, x, g.width, 6 + shared, f"{name}.kv_down")
    low, common = g.items(g.call("split_with_sizes", down, [6, shared], -1), 2)
    low = norm(g, dice, low, f"{name}.kv_norm", 6)
    own = h.width - shared
    up = linear(g, dice, low, 6, h.keys * (own + h.values), f"{name}.kv_up")
    parts = _heads(g, up, [g.b, g.s], h.keys, own + h.values)
    k, v = g.items(g.call("split_with_sizes", parts, [own, h.values], -1), 2)
    common = g.call("expand", g.call("unsqueeze", common, 1), [-1, h.keys, -1, -1])
    return q, g.call("cat", [k, common], -1), v


def _one_for_all(g: Graph, dice: Dice, x: str, name: str, h: Heads) -> tuple[str, str, str]:
    """Keys serve as values too; or queries as keys."""
    q = linear(g, dice, x, g.width, h.queries * h.width, f"{name}.q")
    if h.queries == h.keys and dice.rarely(2):
        return _each(g, q, q, linear(g, dice, x, g.width, h.keys * h.width, f"{name}.v"), h)
    k = linear(g, dice, x, g.width, h.keys * h.width, f"{name}.k")
    return _each(g, q, k, k, h)


def _rotary(g: Graph, dice: Dice, q: str, k: str, name: str, width: int) -> tuple[str, str]:
    """Rotate pairs of channels by angles that grow with the position: all of them, or the first part."""
    part = width if width < 4 or not dice.rarely() else width // 4 * 2
    rows = {"device": 'torch.device("cpu")', "dtype": "torch.float64"}
    angles = g.mul(g.call("unsqueeze", g.call("arange", g.s, named=rows), 1), _frequencies(g, name, part))
    turn = dice.pick(_by_halves, _by_pairs, _as_complex)
    found = []
    for x in (q, k):
        turned = turn(g, x if part == width else g.part(x, -1, 0, part), angles, part)
        found.append(turned if part == width else g.call("cat", [turned, g.part(x, -1, part)], -1))
    return found[0], found[1]


def _frequencies(g: Graph, name: str, part: int) -> str:
    return g.weight(f"{name}.frequencies", [part // 2], 0.7, 0.3)


def _by_halves(g: Graph, x: str, angles: str, part: int) -> str:
    twice = g.call("cat", [angles, angles], -1)
    turned = g.call("cat", [g.call("neg", g.part(x, -1, part // 2)), g.part(x, -1, 0, part // 2)], -1)
    return g.add(g.mul(x, g.call("cos", twice)), g.mul(turned, g.call("sin", twice)))


def _by_pairs(g: Graph, x: str, angles: str, part: int) -> str:
    even, odd = g.part(x, -1, 0, END, 2), g.part(x, -1, 1, END, 2)
    cos, sin = g.call("cos", angles), g.call("sin", angles)
    first = g.call("sub.Tensor", g.mul(even, cos), g.mul(odd, sin))
    second = g.add(g.mul(odd, cos), g.mul(even, sin))
    return g.call("flatten.using_ints", g.call("stack", [first, second], -1), -2)


def _as_complex(g: Graph, x: str, angles: str, part: int) -> str:
    pairs = g.call("unflatten.int", x, -1, [part // 2, 2])
    numbers = g.call("view_as_complex", g.call("clone", pairs, named={"memory_format": "torch.contiguous_format"}))
    turned = g.mul(numbers, g.call("polar", g.call("ones_like", angles), angles))
    return g.call("flatten.using_ints", g.call("view_as_real", turned), -2)
