"""The text form: what is printed parses back to the same text and the same function."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompile.errors import VerifyError
from qcompile.ir.parse import _Reader, resolve
from qcompile.ir.program import Program
from qcompile.ir.text import literal, target_name

# Kinds of values: F f32[n,4,6]  H bf16[n,4,6]  D f64[n,4,6]  B bool[n,4,6]  T f32[n,6,4]  Q f32[n,2,6]  P (Q, Q)
# K (F-like top-k pair)  I i64[n,4,2]  S symbolic size  W f32[6,6] weight  V f32[6] weight  A i64[·]
TEMPLATES = [
    ("F", "aten.relu.default({F})"),
    ("F", 'aten.clamp.default({F}, float("-inf"), 3.5)'),
    ("F", "aten.add.Tensor({F}, {F}, alpha=-2)"),
    ("F", "aten.mul.Tensor({F}, 1e-06)"),
    ("F", 'aten.full_like.default({F}, float("nan"))'),
    ("F", 'aten.masked_fill.Scalar({F}, {B}, float("inf"))'),
    ("F", "aten.where.self({B}, {F}, {F})"),
    ("B", "aten.gt.Tensor({F}, {F})"),
    ("B", "aten.logical_not.default({B})"),
    ("H", "aten.to.dtype({F}, torch.bfloat16)"),
    ("F", "aten.to.dtype({H}, torch.float32)"),
    ("D", "aten.to.dtype({F}, torch.float64, False, True)"),
    ("F", "aten.to.dtype({D}, torch.float32)"),
    ("H", "aten.neg.default({H})"),
    ("T", "aten.transpose.int({F}, 1, -1)"),
    ("F", "aten.permute.default({T}, [0, 2, 1])"),
    ("F", "aten.linear.default({F}, {W})"),
    ("F", "aten.linear.default({F}, {W}, {V})"),
    ("F", "aten.rms_norm.default({F}, [6], {V}, 0.1)"),
    ("F", "aten.layer_norm.default({F}, [6], None, {V}, 1e-05, False)"),
    ("P", "aten.split.Tensor({F}, 2, 1)"),
    ("P", "aten.split_with_sizes.default({F}, [2, 2], 1)"),
    ("Q", "operator.getitem({P}, 0)"),
    ("Q", "operator.getitem({P}, 1)"),
    ("F", "aten.cat.default([{Q}, {Q}], 1)"),
    ("Q", "aten.slice.Tensor({F}, 1, 0, 9223372036854775807, 2)"),
    ("S", "aten.sym_size.int({F}, 0)"),
    ("S", "operator.add({S}, 1)"),
    ("S", "operator.mul({S}, {S})"),
    ("S", "torch.sym_max({S}, 2)"),
    ("A", 'aten.arange.start_step(0, {S}, dtype=torch.int64, device=torch.device("cpu"), pin_memory=False)'),
    ("A", "aten.full.default([{S}, 1], 7, dtype=torch.int64, layout=torch.strided)"),
    ("F", "aten.clone.default({F}, memory_format=torch.contiguous_format)"),
    ("F", 'aten.gelu.default({F}, approximate="tanh")'),
    ("F", 'aten.einsum.default("bij,jk->bik", [{F}, {W}])'),
    ("F", 'aten.div.Tensor_mode({F}, {F}, rounding_mode="floor")'),
    ("F", "aten.scaled_dot_product_attention.default({F}, {F}, {F}, None, 0.0, True, scale=0.5)"),
    ("K", "aten.topk.default({F}, 2, -1, True, True)"),
    ("I", "operator.getitem({K}, 1)"),
    ("F", "aten.index.Tensor({F}, [None, {J}])"),
    ("F", 'qcompile.dequantize.default({C}, {V1}, None, "int8 sym tensor")'),
    ("Z", "aten.nan_to_num.default({F}, 0.0, 1.0, -1.0)"),
    ("C", 'qcompile.quantize.default({Z}, {V1}, None, "int8 sym tensor")'),
]
START = {"F": ["x"], "J": ["j"], "W": ["w"], "V": ["v"], "V1": ["s"]}
KEYS = r"""w: f32[6, 6] = "a.weight", v: f32[6] = "b \"c\" \\d", s: f32[1, 1, 1]"""
HEAD = f"def main(x: f32[n, 4, 6], j: i64[4], *, {KEYS}):"


@st.composite
def programs(draw: Callable[..., Any]) -> str:
    """Text of a random program over the table."""
    have = {kind: list(names) for kind, names in START.items()}
    lines, modules = [HEAD], st.sampled_from(["", "  # layers.0.mlp", "  # model"])
    for index in range(draw(st.integers(1, 25))):
        fits = [t for t in TEMPLATES if all(k in have for k in re.findall(r"\{(\w+)\}", t[1]))]
        kind, template = draw(st.sampled_from(fits))
        picks = re.sub(r"\{(\w+)\}", lambda m: draw(st.sampled_from(have[m[1]])), template)
        lines.append(f"    n{index} = {picks}{draw(modules)}")
        have.setdefault(kind, []).append(f"n{index}")
    read = {name for line in lines[1:] for name in re.findall(r"\bn\d+\b", line.partition("=")[2])}
    ends = [line.split()[0] for line in lines[1:] if line.split()[0] not in read]
    returned = [n for n in ends if not any(n in have.get(kind, ()) for kind in "PKS")] or ["x"]
    lines.append("    return {" + ", ".join(f'"{n}": {n}' for n in returned) + "}")
    return "\n".join(lines)


@settings(max_examples=14)
@given(programs())
def test_random_programs_round_trip(text: str) -> None:
    program = _refreshed(text)
    printed = str(program)
    again = Program.parse(printed, {key: program.weights[key] for key in program.weights})
    assert str(again) == printed
    names = [node.name for node in program.inputs]
    feeds = {
        name: t for name, t in {"x": torch.randn(3, 4, 6), "j": torch.tensor([0, 3, 1, 1])}.items() if name in names
    }
    for name, value in program.run(feeds).items():
        torch.testing.assert_close(again.run(feeds)[name], value, rtol=0, atol=0, equal_nan=True)
    copy = program.clone()
    assert str(copy) == printed


def _refreshed(text: str) -> Program:
    """Parsed although parts of it are dead: those go first."""
    lines = text.splitlines()
    while True:
        body = "\n".join(lines)
        dead = [i for i, line in enumerate(lines[1:-1], 1) if len(re.findall(rf"\b{line.split()[0]}\b", body)) == 1]
        if not dead:
            return Program.parse(body)
        del lines[dead[-1]]


LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
    | st.sampled_from(
        [torch.strided, torch.sparse_coo, torch.contiguous_format, torch.channels_last, torch.device("cuda:1")]
    )
    | st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none() | st.integers()),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@settings(max_examples=200)
@given(LITERALS)
@example('a "quoted" \\ string\nof two lines\t\r')
@example([(1,), (), [], [[float("-inf")]]])
def test_every_literal_round_trips(value: object) -> None:
    text = literal(value)
    assert "\n" not in text
    back = _Reader([], None, 0)._operand(ast.parse(text, mode="eval").body)
    assert _same(back, value), text


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


@given(st.text(min_size=1), st.text(min_size=1))
def test_any_weight_key_and_output_name_round_trips(key: str, name: str) -> None:
    program = Program.parse('def main(x: f32[2]):\n    y = aten.neg.default(x)\n    return {"y": y}')
    weight = program.add_weight(key, torch.ones(2))
    program.set_arg(program.nodes[0], "self", weight)
    program.output_names = (name,)
    again = Program.parse(str(program))
    assert list(again.weights) == [key]
    assert again.output_names == (name,)
    assert str(again) == str(program)


@pytest.mark.parametrize("symbol", ["E", "I", "S", "N", "Q", "beta", "gamma", "zoo", "pi", "_", "batch_size"])
def test_symbols_may_be_called_anything(symbol: str) -> None:
    text = (
        f"def main(x: f32[{symbol}, 4], y: i64[2*{symbol} + 1]):\n"
        f"    z: f32[{symbol}, 4] = aten.neg.default(x)\n"
        f"    u: i64[2*{symbol} + 1] = aten.neg.default(y)\n"
        '    return {"z": z, "u": u}'
    )
    program = Program.parse(text)
    assert str(program) == text
    assert program.run({"x": torch.ones(3, 4), "y": torch.ones(7, dtype=torch.int64)})["u"].shape == (7,)


def test_equal_names_are_one_size_and_unequal_ones_are_not() -> None:
    same = "def main(x: f32[a], y: f32[{0}]):\n    z = aten.stack.default([x, y])\n    return {{'z': z}}"
    assert "z: f32[2, a]" in str(Program.parse(same.format("a")))
    with pytest.raises(Exception, match=r"(?s)stack|a"):
        Program.parse(same.format("b"))


def test_dtypes_of_weights_and_inputs() -> None:
    shorts = ["f64", "f32", "f16", "bf16", "f8e4m3fn", "f8e5m2", "i8", "i16", "i32", "i64", "u8", "bool", "c64"]
    weights = ", ".join(f"w_{s}: {s}[3]" for s in shorts)
    calls = [f"    y_{s}: {s}[1, 3] = aten.unsqueeze.default(w_{s}, 0)" for s in shorts]
    returned = ", ".join(f'"{s}": y_{s}' for s in shorts)
    text = "\n".join(["def main(*, " + weights + "):", *calls, f"    return {{{returned}}}"])
    program = Program.parse(text)
    assert str(Program.parse(str(program))) == str(program)
    assert {s: v.shape for s, v in program.run({}).items()} == dict.fromkeys(shorts, (1, 3))


GOOD = "def main(x: f32[2, 4], *, w: f32[3, 4]):\n    y: f32[2, 3] = aten.linear.default(x, w)\n    return {'y': y}"
BAD = {
    "syntax": (GOOD.replace("return", "retrun"), "line 3"),
    "two functions": (GOOD + "\n" + GOOD, "must be one function"),
    "no return": (GOOD[: GOOD.index("    return")], "no return statement"),
    "bare return": (GOOD.replace("{'y': y}", "y"), "expected return"),
    "unknown operator": (
        GOOD.replace("linear.default", "linnear.default"),
        "line 2: operator 'aten.linnear.default' is unknown",
    ),
    "packet": (GOOD.replace("linear.default", "linear"), "names no overload"),
    "unknown name": (GOOD.replace("(x, w)", "(x, v)"), "line 2: v is not defined"),
    "assigned twice": (
        GOOD.replace("    return", "    y = aten.neg.default(y)\n    return"),
        "line 3: y is assigned twice",
    ),
    "wrong size": (GOOD.replace("y: f32[2, 3]", "y: f32[2, 5]"), r"y is declared f32\[2, 5\], inferred f32\[2, 3\]"),
    "wrong dtype": (GOOD.replace("y: f32", "y: f16"), "y is declared f16"),
    "wrong rank": (GOOD.replace("y: f32[2, 3]", "y: f32[3]"), "y is declared"),
    "no call": (GOOD.replace("aten.linear.default(x, w)", "x"), "expected NAME: TYPE = OPERATOR"),
    "odd argument": (GOOD.replace("(x, w)", "(x, w + 1)"), "line 2: w \\+ 1 is not an argument"),
    "odd constant": (GOOD.replace("(x, w)", "(x, torch.nn)"), "torch.nn is not a dtype"),
    "no type": (GOOD.replace("x: f32[2, 4]", "x"), "expected a tensor type like f32.*found nothing"),
    "unknown dtype": (GOOD.replace("x: f32", "x: q7"), "expected a tensor type"),
    "dead call": (GOOD.replace("    return", "    z = aten.neg.default(y)\n    return"), "rule 'alive'"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_line(name: str) -> None:
    text, message = BAD[name]
    with pytest.raises(VerifyError, match=message):
        Program.parse(text)


def test_given_weights_are_checked() -> None:
    with pytest.raises(VerifyError, match=r"weight 'w' is torch.float32\[2\], declared torch.float32\[3, 4\]"):
        Program.parse(GOOD, {"w": torch.ones(2)})


def test_seed_decides_the_weights() -> None:
    first, same, other = (Program.parse(GOOD, seed=s).weights["w"] for s in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "name", ["aten.linear.default", "operator.add", "math.ceil", "torch.sym_min", "qcompile.quantize.default"]
)
def test_operators_resolve_to_what_they_print_as(name: str) -> None:
    assert target_name(resolve(name)) == name


@pytest.mark.parametrize("target", [torch.nn.functional.relu, len, lambda x: x, torch.relu])
def test_what_is_no_operator_does_not_print(target: Any) -> None:
    with pytest.raises(VerifyError, match="is not an operator of the IR"):
        target_name(target)


def test_an_argument_without_spelling() -> None:
    with pytest.raises(VerifyError, match="has no spelling in the IR"):
        literal(object())
