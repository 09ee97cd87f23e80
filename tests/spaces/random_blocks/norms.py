"""Every spelling of a normalisation, and things that look like one."""

from __future__ import annotations

from collections.abc import Callable

from .graph import Dice, Graph

Norm = Callable[[Graph, Dice, str, str, int], str]


def norm(g: Graph, dice: Dice, x: str, name: str, width: int = 0) -> str:
    """x normalised over its last axis (the stream's width unless given), as the dice say."""
    return NORMS[dice.roll(len(NORMS))](g, dice, x, name, width or g.width)


def head_norm(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """One of the norms that work on any rank."""
    return dice.pick(_rms, _layer, _plain_rms, _llama, _gemma)(g, dice, x, name, width)


def _eps(dice: Dice) -> float:
    return dice.pick(1e-5, 1e-6, 1e-3, 0.1, 1.0)


def _rms(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    return g.call("rms_norm", x, [width], g.gain(f"{name}.gain", width), _eps(dice))


def _layer(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    gain, bias = g.gain(f"{name}.gain", width), g.shift(f"{name}.bias", width)
    return g.call("layer_norm", x, [width], gain, bias, _eps(dice))


def _plain_rms(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    eps = dice.pick(None, 1e-5, 0.1)
    return g.call("rms_norm", x, [width], None, eps) if eps else g.call("rms_norm", x, [width])


def _layer_in_part(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    gain = g.gain(f"{name}.gain", width) if dice.often() else None
    bias = g.shift(f"{name}.bias", width) if gain and dice.rarely() else None
    return g.call("layer_norm", x, [width], gain, bias, _eps(dice))


def _llama(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    return g.mul(g.gain(f"{name}.gain", width), _unit(g, dice, x, width))


def _gemma(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    gain = g.add(g.weight(f"{name}.gain", [width], 0.0, 0.5), 1.0)
    if dice.often():
        return g.mul(_unit(g, dice, x, width), gain)
    return g.call("rms_norm", x, [width], gain, _eps(dice))


def _spelled_layer(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    centred = g.call("sub.Tensor", x, g.call("mean.dim", x, [-1], True))
    if dice.often():
        unit = _scaled(g, dice, centred, g.call("mean.dim", g.call("pow.Tensor_Scalar", centred, 2), [-1], True))
    else:
        unit = _scaled(
            g, dice, centred, g.call("var.correction", x, [-1], named={"correction": dice.roll(2), "keepdim": True})
        )
    if dice.often():
        unit = g.mul(unit, g.gain(f"{name}.gain", width))
    return g.add(unit, g.shift(f"{name}.bias", width)) if dice.often() else unit


def _rms_and_bias(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    return g.add(_rms(g, dice, x, name, width), g.shift(f"{name}.bias", width))


def _affine_after(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """Gain and bias are applied by operators of their own, twice."""
    y = g.mul(_plain_rms(g, dice, x, name, width), g.gain(f"{name}.gain", width))
    y = g.add(y, g.shift(f"{name}.bias", width)) if dice.often() else y
    return g.mul(y, g.gain(f"{name}.second", width)) if dice.often() else g.call("div.Tensor", y, 1.5)


def _factor_after(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """Gain and bias, and behind them a factor for all channels: a number, −1, or one a token."""
    y = _layer(g, dice, x, name, width)
    if dice.rarely():
        return g.call("neg", y)
    if dice.often():
        return g.mul(y, dice.pick(0.5, 2.0, -1.5))
    return g.mul(y, g.call("sigmoid", g.call("mean.dim", x, [-1], True)))


def _euclidean(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """x / max(‖x‖, ε), times a gain."""
    length = g.call("linalg_vector_norm", x, 2, [-1], True)
    unit = g.call("div.Tensor", x, g.call("clamp_min", length, _eps(dice)))
    return g.mul(unit, g.weight(f"{name}.gain", [width], 2.0, 1.0))


def _of_groups(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """Each half of the channels by itself."""
    parts = g.view(x, g.b, g.s, 2, width // 2)
    gain = g.gain(f"{name}.gain", width // 2) if dice.often() else None
    y = g.view(g.call(dice.pick("rms_norm", "layer_norm"), parts, [width // 2], gain), g.b, g.s, width, op="reshape")
    return g.mul(y, g.gain(f"{name}.after", width)) if dice.rarely() else y


def _group_norm(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """Over groups of channels and all tokens."""
    gain, bias = g.gain(f"{name}.gain", width), g.shift(f"{name}.bias", width)
    return g.swap(g.call("group_norm", g.swap(x, 1, 2), dice.pick(1, 2), gain, bias, _eps(dice)), 1, 2)


def _squashing(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """tanh(α·x)·γ + β: no norm, but in the place of one."""
    squashed = g.call("tanh", g.mul(x, g.weight(f"{name}.alpha", [1], 0.7, 0.1)))
    return g.add(g.mul(squashed, g.gain(f"{name}.gain", width)), g.shift(f"{name}.bias", width))


def _statistic_of_another(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """Scales x by the statistic of something near it: of x + β, of half its channels, or read once more."""
    which = dice.roll(3)
    if which == 0:
        return _scaled(g, dice, x, _mean_square(g, dice, g.add(x, g.shift(f"{name}.bias", width)), width))
    if which == 1:
        return _scaled(g, dice, x, _mean_square(g, dice, g.part(x, -1, 0, width // 2), width // 2))
    statistic = _mean_square(g, dice, x, width)
    return g.add(_scaled(g, dice, x, statistic), g.call("tanh", statistic))


def _whole(g: Graph, dice: Dice, x: str, name: str, width: int) -> str:
    """A gain of one number."""
    unit = _unit(g, dice, x, width)
    return g.mul(unit, g.weight(f"{name}.gain", [1], 1.0, 0.5)) if dice.often() else g.mul(unit, 1.3)


def _unit(g: Graph, dice: Dice, x: str, width: int) -> str:
    return _scaled(g, dice, x, _mean_square(g, dice, x, width))


def _mean_square(g: Graph, dice: Dice, x: str, width: int) -> str:
    """The mean of squares as a mean, or as a sum over the width; over another number now and then."""
    form = dice.roll(8)
    squared = g.call("pow.Tensor_Scalar", x, 2) if form < 4 else g.mul(x, x) if form < 6 else g.call("square", x)
    if form not in (2, 3, 7):
        return g.call("mean.dim", squared, [-1], True)
    total = g.call("sum.dim_IntList", squared, [-1], True)
    if form == 2:
        return g.mul(total, 1 / width)
    return g.call("div.Tensor", total, width if dice.often() else width - 1)


def _scaled(g: Graph, dice: Dice, x: str, statistic: str) -> str:
    under = g.add(statistic, _eps(dice))
    which = dice.roll(3)
    if which == 0:
        return g.mul(x, g.call("rsqrt", under))
    if which == 1:
        return g.call("div.Tensor", x, g.call("sqrt", under))
    return g.mul(x, g.call("pow.Tensor_Scalar", under, -0.5))


NORMS: tuple[Norm, ...] = (
    _rms,
    _layer,
    _rms,
    _layer,
    _llama,
    _gemma,
    _plain_rms,
    _layer_in_part,
    _spelled_layer,
    _rms_and_bias,
    _affine_after,
    _factor_after,
    _euclidean,
    _of_groups,
    _group_norm,
    _squashing,
    _statistic_of_another,
    _whole,
)
