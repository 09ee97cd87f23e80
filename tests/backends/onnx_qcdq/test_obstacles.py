"""What cannot be lowered is said first, with the node, its module and the way out, and nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx_programs import Layer, decoder, products, quantized
from transformers import AutoModelForCausalLM  # noqa: F401  (loaded before a test hides packages)

from qcompile.backends.onnx_qcdq import OnnxQcdqBackend
from qcompile.errors import LoweringError, QCompileError, RecipeError
from qcompile.ir.program import Program
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.kv_cache import QuantizeKVCache
from qcompile.passes.quantize.rtn import RTN


def reasons(program: Program) -> list[str]:
    return [str(obstacle) for obstacle in OnnxQcdqBackend().obstacles(program)]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_none(name: str) -> None:
    assert reasons(quantized(decoder(name), "int4 sym group=32", "int8 sym token dynamic")) == []


def test_weights_that_are_not_rounded() -> None:
    program = decoder("llama").clone()
    InsertQDQ(weights="int4 sym group=32").run(program)
    found = reasons(program)
    assert len(found) == 14
    assert "'model.layers.0.self_attn.q_proj.weight' is not rounded yet" in found[0]
    assert "(module model.layers.0.self_attn.q_proj)" in found[0]
    assert "rtn" in found[0]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("int8 sym token percentile=99.9 dynamic", "observer percentile=99.9 at run time"),
        ("int8 sym token mse dynamic", "observer mse at run time"),
        ("int8 sym token scale=pow2 dynamic", "pow2 scales at run time"),
        ("int8 sym signed token scaling_min=0.1 dynamic", "scaling_min has no ONNX form where scales have a sign"),
    ],
)
def test_parameters_chosen_at_run_time(spec: str, says: str) -> None:
    (found,) = reasons(products({"a": Layer("int8 sym channel", spec)}))
    assert says in found
    assert "; use" in found


LINEAR = "def main(x: f32[batch, 64], *, w: f32[32, 64]):\n    y = aten.linear.default(x, w)\n    return {'y': y}"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mxfp4", "onnxruntime dequantizes no e2m1; use int1 to int8, e4m3fn, e5m2, e4m3fnuz, e5m2fnuz, or another"),
        ("e3m2 channel", "dequantizes no e3m2"),
        ("e4m3(plain) channel", "dequantizes no e4m3(plain)"),
        ("nf4 group=64", "dequantizes no nf4"),
        ("nvfp4", "dequantizes no e2m1"),
        ("mxfp8_e4m3", "takes no e8m0 scales; use scale=pow2"),
        ("mxint8", "takes no e8m0 scales; use scale=pow2"),
        ("bfp16", "takes no e8m0(bfp) scales; use scale=pow2"),
        ("mx9", "takes no micro(16) scales; use scale=pow2"),
        ("int4 group=16 scale=e4m3", "takes no e4m3 scales; use scale=f16"),
        ("int4 group=16 double=8x256", "takes no scales that are quantized themselves; drop double="),
        ("int4 asym group=16 zero=8x256", "takes no zero-points that are quantized themselves; use zero=int"),
        ("int4 group=16 via=e4m3fn", "rounds nothing to e4m3fn; drop via="),
    ],
)
def test_formats(spec: str, says: str) -> None:
    program = Program.parse(LINEAR)
    InsertQDQ(weights=spec).run(program)
    RTN().run(program)
    (found,) = reasons(program)
    assert says in found
    assert found.startswith("dequantize (module top): ")


CACHE = """def main(x: f32[b, 2, s, 8], past_key_values_0_key: f32[b, 2, past, 8]):
    keys = aten.cat.default([past_key_values_0_key, x], 2)  # attn
    y = aten.neg.default(keys)
    return {"y": y, "present_0_key": keys}"""


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "e4m3fn token dynamic",
            "key_quantize (module attn): e4m3fn token dynamic: onnxruntime neither joins nor exchang",
        ),
        ("e5m2 tensor static", "so none can be cached; use int8"),
        ("nf4 token dynamic", "dequantizes no nf4"),
        (
            "int8 token scale=bf16 dynamic",
            "a cache with scales in bfloat16 cannot be given to onnxruntime; use scale=f32",
        ),
        ("int8 group=4 scale=e8m0 dynamic", "a cache with scales in float8_e8m0fnu cannot be given"),
        ("int8 token scale=pow2 dynamic", "pow2 scales at run time have no ONNX form; use scale=f32"),
    ],
)
def test_caches(spec: str, says: str) -> None:
    program = Program.parse(CACHE)
    QuantizeKVCache(keys=spec).run(program)
    assert says in reasons(program)[0] + reasons(program)[-1]


ACTIVATION = """
def main(x: f32[batch, 8, 16]):
    p: none = qcompile.choose_qparams.default(x, "{spec}")
    s: none = operator.getitem(p, 0)
    q: none = qcompile.quantize.default(x, s, None, "{spec}")
    y: none = qcompile.dequantize.default(q, s, None, "{spec}")
    return {{"y": y}}
"""


@pytest.mark.parametrize("spec", ["int8 sym group=4 axis=1 dynamic", "int8 sym block=4x4 dynamic"])
def test_groups_along_another_axis(spec: str) -> None:
    found = reasons(Program.parse(ACTIVATION.format(spec=spec).strip()))
    assert len(found) == 3
    assert "; use" in found[0] or "; drop" in found[0]
    assert "last axis" in found[1]


@pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("f64", "float64")])
def test_element_types(short: str, name: str) -> None:
    text = f"def main(x: {short}[batch, 4], *, w: {short}[3, 4]):\n    y: none = aten.linear.default(x, w)\n"
    found = reasons(Program.parse(text + '    return {"y": y}'))
    assert len(found) == 2
    assert f"in {name}; capture the model with dtype=float32" in found[0]


def test_operators() -> None:
    text = 'def main(x: f32[4, 4]):\n    y: none = aten.cholesky.default(x)\n    return {"y": y}'
    (found,) = reasons(Program.parse(text))
    assert "y (module top): aten.cholesky.default has no ONNX form" in found


def test_nothing_is_written(tmp_path: Path) -> None:
    program = products({"a": Layer("int8 sym channel", "int8 sym token mse dynamic"), "b": Layer("int4 sym group=16")})
    with pytest.raises(LoweringError, match=r"onnx_qcdq cannot take a_p \(module .*mse at run time"):
        OnnxQcdqBackend().lower(program, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options", [{"opset": 20}, {"opset": 26}, {"style": "qlinear"}, {"external_data_threshold": -1}]
)
def test_options(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"; use|opset=21"):
        OnnxQcdqBackend(**options)  # type: ignore[arg-type]


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoweringError, match="pip install"):
        OnnxQcdqBackend().obstacles(decoder("llama"))


def test_missing_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(QCompileError, match="pip install onnxruntime"):
        OnnxQcdqBackend().load(tmp_path)


def test_conversion_that_fails_names_the_node(tmp_path: Path) -> None:
    torch.library.define("qcompile_onnx_test::odd", "(Tensor x) -> Tensor")
    torch.library.impl("qcompile_onnx_test::odd", "CompositeExplicitAutograd", lambda x: x.clone())
    torch.library.register_fake("qcompile_onnx_test::odd", torch.empty_like)
    program = Program.parse(
        'def main(x: f32[4, 4]):\n    y: none = qcompile_onnx_test.odd.default(x)\n    return {"y": y}'
    )
    from qcompile.backends.onnx_qcdq.convert import convert
    from qcompile.backends.onnx_qcdq.prelower import prelower

    with pytest.raises(LoweringError, match=r"no ONNX form at opset 21: .*odd"):
        convert(prelower(program), 21)
