"""Which kernel multiplies a quantized activation: those of 8-bit integers, fp8 or microscaling formats, or none, and
then the activation stays simulated in torch and the weight is multiplied as it is."""

from __future__ import annotations

import operator
from dataclasses import replace

from torch import fx

from qcompile.backends.onnx_qcdq.recognise import CHOOSE, QuantizedActivation, match_activation, parse_spec
from qcompile.backends.triton.formats import WeightFormat
from qcompile.backends.triton.matching import Site
from qcompile.backends.triton.ops.quantize_rows import quantizable
from qcompile.backends.triton.ops.scaled_linear import SPECS
from qcompile.ir.program import Program
from qcompile.numerics import QuantSpec
from qcompile.numerics.element import IntElement
from qcompile.numerics.granularity import PerGroup

_STEP = 32
"""Codes along K that 8-bit tensor cores multiply at least: groups are made of whole ones."""


def kernel_for(program: Program, site: Site) -> Site:
    """The site with the kernel that takes its activation; as it is where none does, with `reason` why."""
    activation = match_activation(program, site.product.x)
    if activation is None:
        return site
    if not _chosen_as_it_runs(program, activation):
        return replace(site, reason=f"activations {activation.spec} have stored scales")
    spec, form = activation.spec, site.form
    if (element := _scaled_element(spec)) is not None and element == form.element and _microscaling(form):
        return replace(site, kind="mx", activation=activation)
    if not quantizable(spec):
        return replace(site, reason=f"no kernel quantizes activations to {spec}")
    rows = replace(form, layout="rows")
    whole = all(group % _STEP == 0 for group in (form.group, _group(spec)) if group)
    plain = form.scale == "float" and form.zero == "none" and not form.outer and form.times == 1.0
    integers = isinstance(spec.element, IntElement)
    if whole and plain and integers and form.integer and form.bits == 8 and form.element == "int8":
        return replace(site, kind="int8", form=rows, activation=activation)
    if whole and plain and not integers and form.element == "e4m3fn":
        return replace(site, kind="fp8", form=rows, activation=activation)
    tile = form.zero == "none" and form.block_k >= _STEP and form.bits < 8 and not _group(spec)
    if integers and form.integer and tile:
        return replace(site, kind="int8", activation=activation)
    return replace(site, reason=f"no kernel multiplies activations {spec} by {form.element} weights of this kind")


def _chosen_as_it_runs(program: Program, activation: QuantizedActivation) -> bool:
    """Whether the scale is what `choose_qparams` says of the same value by the same spec."""
    scale = activation.scale
    if not isinstance(scale, fx.Node) or scale.target is not operator.getitem:
        return False
    chosen = scale.args[0]
    return (
        isinstance(chosen, fx.Node)
        and chosen.target is CHOOSE
        and program.arg(chosen, "x") is activation.x
        and parse_spec(str(program.arg(chosen, "spec"))) == activation.spec
    )


def _scaled_element(spec: QuantSpec) -> str | None:
    """e2m1 or e4m3fn where the kernel for microscaling formats makes these codes."""
    return next((element for element, text in SPECS.items() if parse_spec(text) == spec), None)


def _microscaling(form: WeightFormat) -> bool:
    return form.scale == "e8m0" and form.group == form.block_k == 32 and form.times == 1.0 and form.rows == 1


def _group(spec: QuantSpec) -> int:
    return spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
