"""What a product adds up: codes of its input, in a range that their spec sets, times codes of its weight."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.errors import RecipeError
from qcompile.ir.contractions import Contraction
from qcompile.ir.moves import moved
from qcompile.ir.program import Program
from qcompile.numerics.element import IntElement
from qcompile.numerics.spec import QuantSpec
from qcompile.passes.round.places import Place
from qcompile.rounding import Accumulator


def accumulator_of(program: Program, place: Place, bits: int, tile: int, widen: bool) -> Accumulator:
    """The accumulator of the products that read a weight, for the codes that any of their inputs can have.

    Raises RecipeError where weight or input are no integers without a zero-point between them and their sum, or where a
    tile meets several scales.
    """
    spec, first = place.qdq.spec, place.reads[0].product
    if not isinstance(spec.element, IntElement) or not spec.symmetric or spec.via is not None:
        raise RecipeError(f"{place.key}: {spec} sums up no plain codes; accumulator_bits needs weights like int4 sym")
    shape = tuple(place.qdq.source.meta["val"].shape)
    groups = spec.scale_shape(shape)[first.axis_in]
    width = shape[first.axis_in] // groups
    if groups > 1 and width % tile:
        ways = f"use accumulator_tile={width}, or wider groups"
        raise RecipeError(
            f"{place.key}: a tile of {tile} inputs meets groups of {width}, which differ in scale; {ways}"
        )
    ranges = [input_codes(program, read.product, place.key) for read in place.reads]
    return Accumulator(bits, tile, min(low for low, _ in ranges), max(high for _, high in ranges), widen)


def input_codes(program: Program, product: Contraction, key: str) -> tuple[int, int]:
    """The least and the greatest code of a product's input, less their zero-point.

    A zero-point that is not known yet, or is computed as the program runs, may be any code. RecipeError, naming the
    weight `key`, for an input that is not made of integer codes.
    """
    node: fx.Node | None = product.input
    while node is not None and node.target is not torch.ops.qcompile.dequantize.default:
        node = moved(program, node)
    if node is None:
        needs = "accumulator_bits needs activations like int8 sym token dynamic"
        raise RecipeError(f"{key}: its input {product.input.name} is not quantized; {needs}")
    spec = QuantSpec.parse(program.arg(node, "spec"))
    if not isinstance(spec.element, IntElement) or spec.zero not in ("none", "int"):
        raise RecipeError(f"{key}: its input is {spec}, not integer codes; accumulator_bits needs int8 or the like")
    if spec.symmetric:
        return spec.qmin, spec.qmax
    zero = program.arg(node, "zero_point")
    if program.is_weight(zero):
        known = program.weight(zero)
        return spec.qmin - int(known.max()), spec.qmax - int(known.min())
    return spec.qmin - spec.qmax, spec.qmax - spec.qmin
