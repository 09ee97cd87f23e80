"""What attention does with q, k and v ``[b, heads, s, d]``: one operator, or spelled out."""

from __future__ import annotations

from .graph import Dice, Graph

CPU = 'torch.device("cpu")'


def attend(
    g: Graph, dice: Dice, q: str, k: str, v: str, name: str, sizes: tuple[int, int, int], crossed: bool = False
) -> str:
    """The values that each query collects. `sizes`: query heads, key heads, width of q. `crossed`: k, v are longer."""
    queries, keys, _ = sizes
    kind = dice.roll(8)
    if kind in (0, 1, 2):
        return _operator(g, dice, q, k, v, name, sizes, crossed)
    if kind == 3 and not crossed and not dice.rarely(2):
        k, v = (_repeat(g, dice, x, queries, keys) for x in (k, v))
        return _without_softmax(g, dice, q, k, v)
    if kind == 4 and not crossed and queries == keys:
        return _alibi(g, dice, q, k, v, name, queries)
    if keys > 1 or not dice.rarely(2):  # one key head broadcasts by itself
        k, v = (_repeat(g, dice, x, queries, keys) for x in (k, v))
    scores = _scores(g, dice, q, k, keys, queries)
    if dice.rarely(4):
        scores = g.mul(g.call("tanh", g.call("div.Tensor", scores, 2.0)), 2.0)
    if dice.rarely(4):
        scores = g.add(scores, g.weight(f"{name}.bias_of_heads", [queries, 1, 1], 0.0, 1.0))
    scores = scores if crossed else _masked(g, dice, scores)
    if dice.rarely(5):
        return _with_sinks(g, dice, scores, v, name, queries)
    return _weighted(g, dice, _softmax(g, dice, scores), v)


def _operator(
    g: Graph, dice: Dice, q: str, k: str, v: str, name: str, sizes: tuple[int, int, int], crossed: bool
) -> str:
    queries, keys, _ = sizes
    named = {"scale": dice.pick("None", "0.3", "1.0")} if dice.rarely(2) else {}
    if queries != keys and dice.rarely(4):
        named["enable_gqa"] = "True"
    else:
        k, v = (_repeat(g, dice, x, queries, keys) for x in (k, v))
    if crossed or dice.rarely(4):
        return g.call("scaled_dot_product_attention", q, k, v, named=named)
    which = dice.roll(3)
    if which == 0:
        return g.call("scaled_dot_product_attention", q, k, v, None, 0.0, True, named=named)
    mask = _allowed(g, dice)
    if which == 2:
        mask = g.add(_floating(g, mask), _slopes(g, name, queries))
    return g.call("scaled_dot_product_attention", q, k, v, mask, named=named)


def _floating(g: Graph, allowed: str) -> str:
    """A mask that is added: 0 where a key may be seen, -1e9 elsewhere."""
    return g.mul(g.call("rsub.Scalar", g.call("to.dtype", allowed, "torch.float64"), 1.0), -1e9)


def _allowed(g: Graph, dice: Dice) -> str:
    """Which key a query may see: bool[s, s], or bool[b, 1, s, s] with an input that masks tokens."""
    square = {"dtype": "torch.bool", "device": CPU}
    causal = g.call("tril", g.call("ones", [g.s, g.s], named=square))
    if not g.maskable or not dice.rarely(2):
        return causal
    tokens = g.view(g.input("mask", "bool", "b", "s"), g.b, 1, 1, g.s)
    return g.call("logical_and", causal, tokens)


def _masked(g: Graph, dice: Dice, scores: str) -> str:
    which = dice.roll(4)
    if which == 3:
        return scores
    allowed = _allowed(g, dice)
    if which == 0:
        return g.call("masked_fill.Scalar", scores, g.call("logical_not", allowed), "-1e9")
    if which == 1:
        return g.call("where.ScalarOther", allowed, scores, 'float("-inf")')
    return g.add(scores, _floating(g, allowed))


def _repeat(g: Graph, dice: Dice, x: str, queries: int, keys: int) -> str:
    """Each key head once for every query head of its group."""
    share = queries // keys
    if share == 1:
        return x
    if dice.rarely(3):
        return g.call("repeat_interleave.self_int", x, share, 1)
    shape = g.call("expand", g.call("unsqueeze", x, 2), [-1, -1, share, -1, -1])
    return g.call("flatten.using_ints", g.call("clone", shape), 1, 2)


def _scores(g: Graph, dice: Dice, q: str, k: str, keys: int, queries: int) -> str:
    scale = dice.pick(0.5, 0.25, 0.7)
    which = dice.roll(4)
    if which == 1:
        q = g.mul(q, scale)
    if which == 3 and (keys > 1 or queries == 1):
        return g.call("div.Tensor", g.call("einsum", '"bhqd,bhkd->bhqk"', [q, k]), 1 / scale)
    turned = g.swap(k, 2, 3) if dice.often() else g.call("permute", k, [0, 1, 3, 2])
    product = g.call("matmul", q, turned)
    return product if which == 1 else g.mul(product, scale)


def _softmax(g: Graph, dice: Dice, scores: str) -> str:
    weights = g.call("softmax.int", scores, -1, *(["torch.float64"] if dice.rarely() else []))
    return g.call("dropout", weights, 0.1, False) if dice.rarely() else weights


def _weighted(g: Graph, dice: Dice, weights: str, v: str) -> str:
    return g.call("matmul", weights, v)


def _with_sinks(g: Graph, dice: Dice, scores: str, v: str, name: str, queries: int) -> str:
    """A score of its own that each head may spend its attention on."""
    one = g.call("expand", g.weight(f"{name}.sinks", [1, queries, 1, 1], 0.0, 1.0), [g.b, -1, g.s, -1])
    weights = _softmax(g, dice, g.call("cat", [scores, one], -1))
    return _weighted(g, dice, g.part(weights, -1, 0, -1), v)


def _alibi(g: Graph, dice: Dice, q: str, k: str, v: str, name: str, count: int) -> str:
    """Scores as one batched product over batch × heads, added to slopes times positions."""
    flat = [g.call("flatten.using_ints", g.call("clone", x), 0, 1) for x in (q, k, v)]
    slopes = g.call("repeat", _slopes(g, name, count), [g.b, 1, 1])
    scores = g.call("baddbmm", slopes, flat[0], g.swap(flat[1], 1, 2), named={"beta": "0.5", "alpha": "0.6"})
    scores = g.view(scores, g.b, count, g.s, g.s)
    weights = g.call("flatten.using_ints", _softmax(g, dice, _masked(g, dice, scores)), 0, 1)
    return g.call("unflatten.int", g.call("bmm", weights, flat[2]), 0, [g.b, count])


def _slopes(g: Graph, name: str, count: int) -> str:
    """Each head's slope times the position of the key."""
    places = g.call("arange", g.s, named={"device": CPU, "dtype": "torch.float64"})
    return g.mul(g.weight(f"{name}.slopes", [count, 1, 1], 0.0, 0.3), places)


def _without_softmax(g: Graph, dice: Dice, q: str, k: str, v: str) -> str:
    """Linear attention: q·(kᵀ·v), with or without a positive map of q and k before."""
    if dice.often():
        q, k = (g.add(g.call("elu", x), 1.0) for x in (q, k))
    memory = g.mul(g.call("matmul", g.swap(k, 2, 3), v), 0.3)
    if dice.often():
        return g.call("matmul", q, memory)
    return g.call("einsum", '"bhsd,bhde->bhse"', [q, memory])
