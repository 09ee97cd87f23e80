"""The faults that `mutations.py` seeds: each a place in the passes, and what a slip there would have written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`old`, which stands in `file` exactly once, becomes `new`; `what` says what is wrong then."""

    file: str
    old: str
    new: str
    what: str


_RAISE, _SPELLED = "passes/norm/raise_norms.py", "passes/norm/spelled.py"

FAULTS: tuple[Fault, ...] = (
    Fault(_RAISE, "affine[:1]), norm.eps)", "affine[:1]), 1e-05)", "eps is a constant"),
    Fault(
        _RAISE,
        "norm.weight, constants), _vector(program, norm.bias",
        "norm.weight, constants), _vector(program, None",
        "β is lost",
    ),
    Fault(
        _RAISE,
        "aten.layer_norm.default if norm.centred else",
        "aten.layer_norm.default if norm.bias else",
        "centred without β is taken for an RMS norm",
    ),
    Fault(
        _SPELLED, "if len(node.users) > 1:", "if len(node.users) > 99:", "other readers of the statistic are not seen"
    ),
    Fault(
        _SPELLED,
        'program.arg(node, "correction") == 0',
        'program.arg(node, "correction") in (0, 1)',
        "the unbiased variance is taken for the biased one",
    ),
    Fault(
        _SPELLED,
        'if not program.arg(found.reduction, "keepdim"):',
        "if False:",
        "a reduction that drops its axis is accepted",
    ),
    Fault(
        _SPELLED,
        "abs(count - size) <= 1e-12 * size",
        "abs(count - size) <= size",
        "a sum over another number is taken for a mean",
    ),
    Fault(_SPELLED, "(inverse or user.args[1] is factor)", "(inverse or True)", "√v / x is taken for x / √v"),
)
