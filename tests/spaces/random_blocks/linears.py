"""Every spelling of a linear map over the channels of ``[batch, length, channels]``."""

from __future__ import annotations

from collections.abc import Callable

from .graph import Dice, Graph

Spelling = Callable[[Graph, Dice, str, str, int, int, str | None], str]


def linear(g: Graph, dice: Dice, x: str, n_in: int, n_out: int, name: str, bias: bool | None = None) -> str:
    """x ``[b, s, n_in]`` ⟶ ``[b, s, n_out]`` in a spelling of the dice's, with or without bias."""
    spelling = SPELLINGS[dice.roll(len(SPELLINGS))] if dice.rarely(2) else _linear
    has = dice.rarely(2) if bias is None else bias
    return spelling(g, dice, x, name, n_in, n_out, g.shift(f"{name}.bias", n_out) if has else None)


def _linear(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    args = (x, g.weight(f"{name}.weight", [n_out, n_in]))
    return g.call("linear", *args, bias) if bias else g.call("linear", *args)


def _cast(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    weight = g.call("to.dtype", g.weight(f"{name}.weight", [n_out, n_in]), "torch.float64")
    return g.call("to.dtype", g.call("linear", x, weight, bias), "torch.float64")


def _addmm(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    flat = g.view(x, -1, n_in, op="reshape")
    weight = _in_out(g, name, n_in, n_out)
    product = g.call("addmm", bias, flat, weight) if bias else g.call("mm", flat, weight)
    return g.view(product, g.b, g.s, n_out)


def _matmul(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    weight = g.weight(f"{name}.weight", [n_out, n_in])
    turned = dice.pick(("numpy_T",), ("t",), ("transpose.int", -1, -2), ("permute", [1, 0]))
    product = g.call("matmul", x, g.call(str(turned[0]), weight, *turned[1:]))
    return g.add(product, bias) if bias else product


def _straight(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    product = g.call("matmul", x, _in_out(g, name, n_in, n_out))
    return g.add(bias, product) if bias else product


def _einsum(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    if dice.often():
        product = g.call("einsum", '"bsi,oi->bso"', [x, g.weight(f"{name}.weight", [n_out, n_in])])
    else:
        product = g.call("einsum", '"io,bsi->bso"', [_in_out(g, name, n_in, n_out), x])
    return g.add(product, bias) if bias else product


def _from_the_left(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    product = g.swap(g.call("matmul", g.weight(f"{name}.weight", [n_out, n_in]), g.swap(x, 1, 2)), 1, 2)
    return g.add(product, bias) if bias else product


def _pointwise(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    args = (g.swap(x, 1, 2), g.weight(f"{name}.weight", [n_out, n_in, 1]))
    return g.swap(g.call("conv1d", *args, bias) if bias else g.call("conv1d", *args), 1, 2)


def _bmm(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    weight = g.call("expand", g.call("unsqueeze", _in_out(g, name, n_in, n_out), 0), [g.b, -1, -1])
    if bias:
        return g.call("baddbmm", g.view(bias, 1, 1, n_out), x, weight)
    return g.call("bmm", x, weight)


def _computed(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    """The weight is scaled before it multiplies: by a number, by row, or by column."""
    weight = g.weight(f"{name}.weight", [n_out, n_in])
    scale = dice.pick("0.5", g.weight(f"{name}.rows", [n_out, 1], 1.0, 0.5), g.gain(f"{name}.columns", n_in))
    return g.call("linear", x, g.mul(weight, scale), bias)


def _block_diagonal(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    if n_in % 2 or n_out % 2:
        return _linear(g, dice, x, name, n_in, n_out, bias)
    parts = g.view(x, g.b, g.s, 2, n_in // 2)
    weight = g.weight(f"{name}.weight", [2, n_out // 2, n_in // 2], 0.0, (n_in // 2) ** -0.5)
    product = g.view(g.call("einsum", '"bshi,hoi->bsho"', [parts, weight]), g.b, g.s, n_out, op="reshape")
    return g.add(product, bias) if bias else product


def _stacked_halves(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    """Two maps, one after the other along the channels."""
    first = n_out // 2
    low = _linear(g, dice, x, f"{name}.low", n_in, first, None)
    high = _linear(g, dice, x, f"{name}.high", n_in, n_out - first, None)
    whole = g.call("cat", [low, high], -1)
    return g.add(whole, bias) if bias else whole


def _by_parts(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    """Parts of the input through parts of the weight, summed."""
    weight, cut = g.weight(f"{name}.weight", [n_out, n_in]), n_in // 2
    low = g.call("linear", g.part(x, -1, 0, cut), g.part(weight, 1, 0, cut))
    high = g.call("linear", g.part(x, -1, cut), g.part(weight, 1, cut))
    whole = g.add(low, high)
    return g.add(whole, bias) if bias else whole


def _low_rank(g: Graph, dice: Dice, x: str, name: str, n_in: int, n_out: int, bias: str | None) -> str:
    down = _linear(g, dice, x, f"{name}.down", n_in, 4, g.shift(f"{name}.middle", 4) if dice.rarely() else None)
    low = _linear(g, dice, down, f"{name}.up", 4, n_out, bias)
    return low if dice.often() else g.add(low, _linear(g, dice, x, f"{name}.base", n_in, n_out, None))


def _in_out(g: Graph, name: str, n_in: int, n_out: int) -> str:
    return g.weight(f"{name}.weight", [n_in, n_out], 0.0, n_in**-0.5)


SPELLINGS: tuple[Spelling, ...] = (
    _linear,
    _addmm,
    _matmul,
    _straight,
    _einsum,
    _from_the_left,
    _pointwise,
    _bmm,
    _cast,
    _computed,
    _block_diagonal,
    _stacked_halves,
    _by_parts,
    _low_rank,
)
