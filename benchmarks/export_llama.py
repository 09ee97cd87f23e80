"""Capture, passes, RTN int4-g128 and ONNX export of a Llama shape, beside torch.onnx.export of the same float model.

Random float16 weights in shards, made once. Each side is a process of its own, measured from outside; both end with
the files on disk. Ours also runs the artifact in onnxruntime and compares it with the Program, which the other does
not; the time without that is given too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path

from common import Run, measure, publish

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY = 32000


def make(directory: Path, layers: int) -> None:
    """A checkpoint of random weights, a shard a layer, never whole in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", num_hidden_layers=layers, vocab_size=VOCABULARY, **SHAPE)
    config.dtype = "float16"
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, list[str]] = {}
    for name in model.state_dict():
        part = next((p for p in name.split(".") if p.isdigit()), "rest")
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    random = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            shape = model.state_dict()[name].shape
            noise = torch.randn(shape, generator=random) * 0.02
            tensors[name] = (noise + 1 if len(shape) == 1 else noise).half()
        save_file(tensors, directory / file, {"format": "pt"})
    total = sum((directory / f).stat().st_size for f in shards)
    index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, names in shards.items() for n in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)


def ours(directory: Path, out: Path) -> None:
    import qcompile
    from qcompile.artifact import export_program
    from qcompile.backend_base import make_backend

    start = time.perf_counter()
    model = qcompile.compile(directory, "int4-g128", overrides=["verify=off"])
    compiled = time.perf_counter() - start
    start = time.perf_counter()
    backend = make_backend("onnx_qcdq")
    staged = out.with_name(f"{out.name}-lowered-only")
    staged.mkdir(parents=True)
    backend.lower(model.program, staged)
    lowered = time.perf_counter() - start
    shutil.rmtree(staged)
    start = time.perf_counter()
    artifact = export_program(model.program, out, backend, model.recipe.to_dict(), model.report.sqnr(), model.reference)
    whole = time.perf_counter() - start
    manifest = artifact.manifest
    assert manifest.agreement is not None
    figures = {
        "compile": compiled,
        "lower": lowered,
        "export": whole,
        "bits": manifest.quantized_bits_per_weight,
        "bytes": manifest.bytes,
        "agreement": manifest.agreement.max_relative_error,
    }
    print("FIGURES", json.dumps(figures))


def plain(directory: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from qcompile.capture.decoder import export_decoder

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    exported = export_decoder(model).program
    program = torch.onnx.export(exported, (), dynamo=True, opset_version=21, verbose=False)
    assert program is not None
    out.mkdir(parents=True)
    program.save(str(out / "model.onnx"), external_data=True)
    print("FIGURES", json.dumps({"whole": time.perf_counter() - start}))


def child(role: str, directory: Path, out: Path) -> tuple[Run, dict[str, float]]:
    command = [sys.executable, __file__, "--role", role, "--model", str(directory), "--out", str(out)]
    run = measure(command)
    line = next(line for line in run.output.splitlines() if line.startswith("FIGURES"))
    return run, json.loads(line.removeprefix("FIGURES"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path("benchmark-export"), help="needs about 8 GB for 16 layers")
    parser.add_argument("--role", choices=["ours", "plain"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.role:
        {"ours": ours, "plain": plain}[options.role](options.model, options.out)
        return
    model = options.folder / "model"
    if not model.exists():
        model.mkdir(parents=True)
        make(model, options.layers)
    for name in ("ours", "plain"):
        shutil.rmtree(options.folder / name, ignore_errors=True)
    plain_run, plain_figures = child("plain", model, options.folder / "plain")
    ours_run, figures = child("ours", model, options.folder / "ours")
    plain_size = sum(f.stat().st_size for f in (options.folder / "plain").rglob("*") if f.is_file())
    over = (ours_run.peak - figures["bytes"]) / 1e9
    body, base = figures["compile"] + figures["lower"], plain_figures["whole"]
    rows: list[dict[str, object]] = [
        {
            "side": "torch.onnx.export(dynamo=True), float32",
            "seconds": f"{base:.1f}",
            "CPU s": f"{plain_run.cpu:.1f}",
            "peak RSS GB": f"{plain_run.peak / 1e9:.2f}",
            "artifact GB": f"{plain_size / 1e9:.2f}",
        },
        {
            "side": "qcompile: capture, passes, RTN int4-g128, lower",
            "seconds": f"{body:.1f} ({body / base:.2f}×)",
            "CPU s": "",
            "peak RSS GB": f"{ours_run.peak / 1e9:.2f} ({over:+.2f} over the artifact)",
            "artifact GB": f"{figures['bytes'] / 1e9:.2f}",
        },
        {
            "side": "the same, run in onnxruntime and compared, hashed, put in place",
            "seconds": f"{figures['compile'] + figures['export']:.1f}",
            "artifact GB": f"{figures['bytes'] / 1e9:.2f}",
        },
    ]
    notes = (
        f"Llama shape: {SHAPE}, {options.layers} layers, vocabulary {VOCABULARY}, float16 shards. Quantized layers: "
        f"{figures['bits']:.3f} bits a weight as measured from the files (target 4.6). Targets: peak RSS at most the "
        f"artifact + 1.5 GB; time at most 1.5×. max |Δlogit| / max |logit| in onnxruntime: {figures['agreement']:.1e}. "
        "Peak RSS is of the whole process, with the runs in onnxruntime and torch."
    )
    publish("export_llama", "Export of a Llama shape", rows, notes)


if __name__ == "__main__":
    main()
