"""Every quantization scheme in use, on every embedded model: perplexity and KL; docs/schemes.md with `--write`.

The quantized program is run as torch runs it, on text that the float model wrote, the same for all schemes of a model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import circumstances, table
from torch import Tensor

import qcompile
from qcompile import zoo
from qcompile.data import load_passages
from qcompile.errors import QCompileError
from qcompile.evaluate import evaluate

PAGE = Path(__file__).parents[1] / "docs" / "schemes.md"
W8 = "int8 sym channel"
Recipe = dict[str, Any]


def weights_only() -> Iterator[tuple[str, Recipe]]:
    """Weights alone."""
    for spec in (
        *("int8 sym tensor", "int8 sym channel", "int8 asym channel", "uint8 asym channel", "int8 group=32"),
        *("int4 sym tensor", "int4 sym channel", "int4 group=32", "int4 narrow group=32", "int4 half group=32"),
        *("int4 full group=32", "int4 asym group=32", "uint4 asym group=32", "int4 group=32 axis=0"),
        *("int4 group=32 mse", "int4 group=32 mse=2.4", "int4 group=32 golden", "int4 half group=32 hqo"),
        *("int4 asym group=32 zero=float", "uint4 asym group=32 zero=float hqo", "uint4 asym group=32 zero=8x128 hqo"),
        *("int4 group=32 scale=f16", "int4 group=32 scale=bf16", "int4 half group=32 scale=pow2"),
        *("int4 half group=32 scale=pow2(floor)", "int4 half group=32 scale=pow2(round)"),
        *("int4 half group=32 scale=pow2(midmax)", "int4 group=32 double=8x256", "int4 group=32 double=6x256"),
        *("int4 group=32 scale=e4m3", "int6 group=32", "int5 group=32", "int3 group=32", "int3 asym group=32"),
        *("int2 asym group=16", "ternary group=32", "int1 group=16"),
        *("e4m3fn tensor", "e4m3fn channel", "e4m3fn no_scale", "e4m3fn block=16x16", "e4m3fnuz channel"),
        *("e5m2 channel", "e5m2fnuz channel", "e4m3(plain) channel", "e3m2 channel", "e2m3 channel", "e3m4 channel"),
        *("e2m1 channel", "e2m1 group=32 scale=f16", "e2m1 group=32", "e2m1 group=32 scale=pow2"),
        *("e2m1 group=32 scale=e4m3", "e2m1 group=16 scale=e4m3", "nvfp4", "nvfp4(mse)"),
        *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxfp4(even)", "mxfp4(ceil)"),
        *("mxfp4(rceil)", "mxfp4(mse)", "mxfp4(noclip)", "mxint8", "bfp16", "bfp(block=32 bits=4)", "mx6", "mx9"),
        *("nf4 group=64", "nf4 group=64 double=8x256", "fp4 group=64", "fp4 group=64 double=8x256"),
        *("int4 channel via=e4m3fn", "int4 group=32 via=e4m3fn", "e2m1 group=32 via=e4m3fn"),
    ):
        yield spec, {"weights": spec}
    yield "int4 group=32, embedding int8, head int8", {"weights": "int4 group=32", "embeddings": W8, "head": W8}
    yield "int4 group=32, head int4", {"weights": "int4 group=32", "head": "int4 group=32"}


def with_activations() -> Iterator[tuple[str, Recipe]]:
    """Weights and inputs."""
    for weights, inputs in (
        *((W8, f"int8 {rest}") for rest in ("sym token dynamic", "asym token dynamic", "asym tensor dynamic")),
        *((W8, f"int8 {rest}") for rest in ("sym tensor static", "asym tensor static", "sym tensor static mse")),
        *((W8, f"int8 {rest}") for rest in ("asym tensor static percentile=99.9", "sym group=32 dynamic")),
        (W8, "uint8 asym tensor static"),
        (W8, "int8 half scale=pow2 token dynamic"),
        ("int8 half scale=pow2", "int8 half scale=pow2 tensor static"),
        ("e4m3fn channel", "e4m3fn token dynamic"),
        ("e4m3fn tensor", "e4m3fn tensor static"),
        ("e4m3fn channel", "e4m3fn no_scale"),
        ("e4m3fn block=16x16", "e4m3fn group=16 dynamic"),
        ("e4m3fnuz channel", "e4m3fnuz token dynamic"),
        ("e5m2 channel", "e5m2 token dynamic"),
        *((name, f"{name} dynamic") for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxint8")),
        *((name, f"{name} dynamic") for name in ("mxfp4", "mxfp4(even)", "nvfp4", "bfp16", "mx6", "mx9")),
        ("nvfp4(mse)", "nvfp4 dynamic"),
        ("mxfp4(mse)", "mxfp8_e4m3 dynamic"),
        ("e2m1 group=32 scale=e4m3", "e2m1 group=32 scale=e4m3 dynamic"),
        ("int4 group=32", "int8 sym token dynamic"),
        ("int4 channel", "int4 sym token dynamic"),
        ("int4 group=32", "int4 sym group=32 dynamic"),
        ("int4 group=32 via=e4m3fn", "e4m3fn token dynamic"),
    ):
        yield f"{weights} | {inputs}", {"weights": weights, "activations": inputs}
    outputs = "int8 sym token dynamic"
    yield f"{W8} | {outputs} | outputs {outputs}", {"weights": W8, "activations": outputs, "outputs": outputs}


def attention_and_cache() -> Iterator[tuple[str, Recipe]]:
    """Weights in eight bits, and what flows inside attention."""
    token = "int8 sym token dynamic"
    for named in (
        {"qkv": token},
        {"kv": token},
        {"qkv": token, "softmax": "uint8 sym tensor static"},
        {"qkvs": "e4m3fn tensor static"},
        {"qkv": "int8 sym tensor static", "softmax": "uint8 sym tensor static"},
        {"q": token, "k": "int4 asym group=16 dynamic", "v": "int4 asym token dynamic"},
        {"qkv": "e4m3fn token dynamic"},
    ):
        text = ", ".join(f"{k} {v}" for k, v in named.items())
        yield f"attention: {text}", {"weights": W8, "attention": named}
    for cache in (
        *("int8 sym token dynamic", "int8 asym token dynamic", "int8 sym tensor static", "int8 sym channel static"),
        *("int4 sym token dynamic", "int4 asym group=16 dynamic", "e4m3fn tensor static", "e5m2 tensor static"),
    ):
        yield f"cache: {cache}", {"weights": W8, "kv_cache": cache}
    mixed = {"keys": "int8 sym channel static", "values": "int4 asym token dynamic"}
    yield "cache: keys int8 channel static, values int4 asym token", {"weights": W8, "kv_cache": mixed}
    everything = {"weights": "e4m3fn tensor", "activations": "e4m3fn tensor static", "kv_cache": "e4m3fn tensor static"}
    yield "e4m3fn: weights, inputs, cache", everything


GROUPS = {
    "Weights": weights_only,
    "Weights | inputs": with_activations,
    "Attention and its cache (weights int8 per channel)": attention_and_cache,
}


PASSAGES = {"llama": 16, "opt": 16, "moe": 8}


class Model:
    """An embedded model with its passages; the logits of the float model are computed once."""

    def __init__(self, name: str) -> None:
        self.program = qcompile.capture(zoo.path(name))
        self.passages = load_passages("generated", length=128, limit=PASSAGES[name], program=self.program)
        self._known: dict[bytes, Tensor] = {}

    def reference(self, ids: Tensor) -> Tensor:
        key = ids.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self.program(ids)
        return self._known[key]

    def measure(self, recipe: Recipe) -> str:
        settings = {"verify": "off", "calibration": {"samples": 16, "length": 128}}
        compiled = qcompile.compile(self.program, {**recipe, **settings})
        result = evaluate(compiled, self.reference, data=self.passages, quiet=True)
        assert result.kl is not None
        return f"{result.perplexity:.3f}, {result.kl.mean:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="schemes that contain this text")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    models = {name: Model(name) for name in zoo.NAMES}
    parts = []
    for title, schemes in GROUPS.items():
        rows = []
        for scheme, recipe in schemes():
            if options.only not in scheme:
                continue
            start = time.perf_counter()
            row: dict[str, object] = {"scheme": scheme.replace("|", "·")}
            for name in zoo.NAMES:
                try:
                    row[name] = models[name].measure(recipe)
                except QCompileError as error:
                    row[name] = f"refused: {error}"
            rows.append(row)
            print(f"{time.perf_counter() - start:5.1f} s", *row.values(), sep=" | ", flush=True)
        if rows:
            parts.append(f"## {title}\n\n{table(rows)}")
    if options.write:
        PAGE.write_text(PREFACE + "\n\n".join(parts) + "\n")


PREFACE = f"""# Schemes, measured

Perplexity and KL divergence from the float model (nats per token) of every scheme on the three embedded models,
rounding to nearest, on text that the float model wrote (16 passages of 128 tokens, 8 for the mixture of experts).
Static scales come from 16 × 128 tokens. The head, the embedding and expert routers stay float unless a row says
otherwise. What the words mean: [formats.md](formats.md).

{circumstances()}. Made by `python benchmarks/schemes.py --write`.

"""


if __name__ == "__main__":
    main()
