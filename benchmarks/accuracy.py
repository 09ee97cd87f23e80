"""Every preset on every embedded model (and on HF directories given as arguments): size, perplexity, KL, agreement.

The quantized side is measured in onnxruntime, on text that the float model wrote; greedy decoding of 32 tokens by the
artifact is compared with the Program's, with the KV cache.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from common import publish

import qcompile
from qcompile import zoo
from qcompile.data import load_passages, load_tokenizer
from qcompile.evaluate import evaluate
from qcompile.recipe import Recipe

PROMPTS = ["KING HENRY:", "Once upon a time, there was a", "What is", "The cat"]


def row(model: Path, preset: str, overrides: list[str]) -> dict[str, object]:
    compiled = qcompile.compile(model, preset, overrides=overrides)
    reference = compiled.reference
    assert reference is not None
    with tempfile.TemporaryDirectory() as folder:
        artifact = compiled.export("onnx_qcdq", Path(folder) / "out")
        result = evaluate(artifact, reference, data=load_passages("generated", length=128, limit=32, program=reference))
        same = 0
        for prompt in PROMPTS:
            ids = load_tokenizer(reference.info["tokenizer"]).encode(prompt).ids
            tokens = torch.tensor([[int(reference.info["bos_token_id"]), *ids]])
            same += int(torch.equal(artifact.generate(tokens, 32), compiled.generate(tokens, 32)))
        manifest = artifact.manifest
    assert manifest.agreement is not None
    assert result.kl is not None
    assert result.top1 is not None
    return {
        "model": model.name,
        "recipe": preset + (f" ({'; '.join(overrides)})" if overrides else ""),
        "MB": f"{manifest.bytes / 1e6:.2f} of {manifest.float32_bytes / 1e6:.2f}",
        "bits, quantized layers": f"{manifest.quantized_bits_per_weight:.2f}",
        "perplexity before": f"{result.reference_perplexity:.3f}",
        "after": f"{result.perplexity:.3f}",
        "KL, nats per token": str(result.kl),
        "top-1": f"{result.top1.mean:.1%}",
        "onnxruntime against Program": f"{manifest.agreement.max_relative_error:.1e}",
        "greedy 32 tokens": f"{same} of {len(PROMPTS)} the same",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path, help="HF directories beside the embedded models")
    parser.add_argument(
        "--set", action="append", default=[], help="overrides of the int4 recipes for those directories"
    )
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = [row(zoo.path(name), preset, []) for name in zoo.NAMES for preset in Recipe.presets()]
    for model in options.models:
        rows += [row(model, preset, options.set if "int4" in preset else []) for preset in Recipe.presets()]
    notes = (
        "max |Δlogit| / max |logit| on two random prompts. With quantized activations a value on the edge between two "
        "codes may be rounded the other way by another summation order; each such flip moves the logits."
    )
    publish("accuracy", "Presets on trained models", rows, notes)


if __name__ == "__main__":
    main()
