"""Raise every spelled-out normalisation to one operator.

    r = rsqrt(mean(pow(x, 2), -1) + ε)
    y = mul(γ, mul(x, r))                   ⟶      y = rms_norm(x, [d], γ, ε)

    c = sub(x, mean(x, -1))                        y = layer_norm(x, [d], γ, β, ε)        likewise
    r = rsqrt(sum(pow(x, 2), -1) + ε)              y = mul(rms_norm(x, [d], None, ε/d), 1/√d)

Exact in real arithmetic, and to rounding in a program of one dtype. Where the program casts on the way, the operator
works in the widest of the dtypes of x, γ and the result (inside, PyTorch computes a half-precision norm in float32)
and rounds to the result's dtype once, at the end; the spelled-out form may round more often: Llama in bfloat16 rounds
before and after γ, and a float64 model rounds to float32 and back, which the operator does not. So such an output
moves by at most the roundings that go away. A γ that is computed, as Gemma's 1 + γ, is computed once, in the dtype in
which the program computes it, and stored under a new key such as ``norm.weight.plus_one``: float32 in a bfloat16
Gemma, because 1 + γ rounded to bfloat16 would be another model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile.ir.program import Program
from qcompile.ir.types import SHORT
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.cleanup.constants import Constants
from qcompile.passes.norm.affine import NORMS, vectors
from qcompile.passes.norm.spelled import SpelledNorm, recognise, roots, strip_casts

aten = torch.ops.aten

MAX_WEIGHT = 1 << 20  # elements of a norm's weight; a wider vector is no norm's

_STORED = "over stored statistics, a factor and a shift a channel: no norm of what it reads"
_OTHERS: dict[Any, str] = {
    aten.batch_norm.default: _STORED,
    aten._native_batch_norm_legit_no_training.default: _STORED,
    aten.group_norm.default: "runs over all positions, not over the last axis alone",
    aten.instance_norm.default: "runs over all positions, not over the last axis alone",
}


@register
@dataclass(frozen=True)
class RaiseNorms(Pass):
    """Turn spelled-out RMS norms and layer norms into `aten.rms_norm` and `aten.layer_norm` with stored weights."""

    name: ClassVar[str] = "raise-norms"

    def run(self, program: Program) -> Report:
        """Raise every norm, and store the weights of those that are operators already but compute theirs."""
        report = Report()
        constants = Constants(program, MAX_WEIGHT)
        raise_spelled(program, constants, report)
        for other in program.calls(*_OTHERS):
            report.skip(other, _OTHERS[other.target])
        for norm in program.calls(*NORMS):
            for name in vectors(norm):
                value = program.arg(norm, name)
                if value is None or program.is_weight(value):
                    continue
                if value in constants:
                    stored = constants.fold(value)
                    report.rewrote(norm, f"{name} is computed once and stored as {program.key(stored)!r}")
                else:
                    report.skip(norm, f"its {name} {value.name} is no constant of the program")
        return report


def raise_spelled(
    program: Program,
    constants: Constants,
    report: Report,
    unwanted: Callable[[SpelledNorm], str | None] = lambda norm: None,
) -> None:
    """Raise every norm that is spelled out, but those that `unwanted` has a reason to leave as they are."""
    for root in roots(program):
        found = recognise(program, root, constants)
        reason = unwanted(found) if isinstance(found, SpelledNorm) else found
        if reason is not None:
            report.skip(root, reason)
        elif isinstance(found, SpelledNorm):
            _raise(program, found, constants, report)


def _raise(program: Program, norm: SpelledNorm, constants: Constants, report: Report) -> None:
    """Let every reader of a norm that is spelled out read one operator."""
    name = "layer_norm" if norm.centred else "rms_norm"
    said = f"{name} over {norm.width}, eps {norm.eps:g}"
    result, module = norm.result, program.module_of(norm.product)
    out, dtype = result.meta["val"].dtype, norm.x.meta["val"].dtype
    dtype = torch.promote_types(dtype, out)
    weight, bias = _vector(program, norm.weight, constants), _vector(program, norm.bias, constants)
    for vector, old in ((weight, norm.weight), (bias, norm.bias)):
        if vector is not None:
            dtype = torch.promote_types(dtype, vector.meta["val"].dtype)
            said += f", {program.key(vector)!r} computed once and stored" if strip_casts(old)[0] is not vector else ""
    x = _as(program, norm.x, dtype, result)
    affine = [None if v is None else _stored_as(program, v, dtype) for v in (weight, bias)]
    target = aten.layer_norm.default if norm.centred else aten.rms_norm.default
    args = (x, [norm.width], *(affine if norm.centred else affine[:1]), norm.eps)
    raised = program.call(target, args, before=result, name=name, module=module)
    scaled = raised
    if norm.scale != 1:
        scaled = program.call(aten.mul.Tensor, (raised, norm.scale), before=result, module=module)
        said += f", times {norm.scale:g}: an l2 norm"
    program.replace(result, _as(program, scaled, out, result))
    report.rewrote(raised, said)


def _vector(program: Program, vector: fx.Node | None, constants: Constants) -> fx.Node | None:
    """γ or β as a weight, which stands for any casts of it; computed and stored where it is more than that."""
    if vector is None:
        return None
    bare, _ = strip_casts(vector)
    return bare if program.is_weight(bare) else constants.fold(vector)


def _as(program: Program, node: fx.Node, dtype: torch.dtype, before: fx.Node) -> fx.Node:
    """`node` in `dtype`."""
    if node.meta["val"].dtype == dtype:
        return node
    return program.call(aten.to.dtype, (node, dtype), before=before, module=program.module_of(before))


def _stored_as(program: Program, weight: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A weight in a wider dtype; under another key, for its own may have other readers."""
    if weight.meta["val"].dtype == dtype:
        return weight
    key = f"{program.key(weight)}.{SHORT[dtype]}"
    found = program.weight_node(key)
    return found or program.add_weight(key, program.weight(weight).to(dtype), module=program.module_of(weight))
