"""A Llama shape in IREE: compile time and memory, resident memory, prefill and decode, beside other runtimes.

Random float16 weights, hidden 2048 × 4 layers. float32, W8A8 (int8 per channel, int8 per token at run time) and W4 in
groups of 128, packed; torch (eager and torch.compile) in float32, onnxruntime with the same codes. Each side is a
process of its own; the fastest of several runs counts. Shared machines are noisy: only ratios of one run say anything.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import measure, publish

LAYERS, PREFILL, PAST, VOCABULARY = 4, 128, 128, 32000
RECIPES = {"fp32": '{"weights": null}', "W8A8": '"int8-dynamic"', "W4 g128": '"int4-g128"'}
TARGETS = ("torch_mlir", "onnx_qcdq")


def slug(name: str) -> str:
    """A folder's name."""
    return name.replace(" ", "-").lower()


# ---------------------------------------------------------------- children


def export(checkpoint: Path, recipe: str, out: Path, target: str) -> dict[str, float]:
    """Compile and lower, without running: seconds of iree-compile, and its peak memory."""
    import resource

    import qcompile
    from qcompile.artifact import export_program
    from qcompile.backend_base import make_backend

    program = qcompile.capture(checkpoint, dtype="float32")
    model = qcompile.compile(program, json.loads(RECIPES[recipe]), overrides=["verify=off"])
    artifact = export_program(model.program, out, make_backend(target), {})
    attempts = artifact.manifest.build.get("attempts", [])
    return {
        "compile": sum(a["seconds"] for a in attempts),
        "compiler_peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
        "bits": artifact.manifest.quantized_bits_per_weight or 32.0,
        "error": artifact.manifest.agreement.max_relative_error if artifact.manifest.agreement else -1.0,
    }


def timed(run: Callable[[], object], least: int, seconds: float) -> float:
    """The fastest of several runs, in milliseconds; the first is not counted."""
    run()
    best, start, count = float("inf"), time.perf_counter(), 0
    while count < least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        best, count = min(best, time.perf_counter() - before), count + 1
    return 1e3 * best


def resident() -> float:
    """Resident GB of this process: anonymous memory, without mapped files."""
    status = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: int(line.split()[1]) for line in status if line.startswith(("VmRSS", "RssAnon"))}
    return found["RssAnon"] / 1e6


def artifact_times(directory: Path, threads: int) -> dict[str, float]:
    """Prefill and decode of an artifact in its runtime."""
    import torch

    from qcompile.artifact import Artifact

    torch.set_num_threads(threads)
    artifact = Artifact.open(directory)
    if artifact.manifest.target == "torch_mlir":
        import iree.runtime as rt

        from qcompile.backends.torch_mlir.runtime import IreeRunner

        rt.flags.parse_flags(f"--task_topology_group_count={threads}")
        runner = IreeRunner(directory, driver="local-sync" if threads == 1 else "local-task")
    else:
        from qcompile.backends.onnx_qcdq.runtime import OnnxRunner

        runner = OnnxRunner(directory, threads=threads)  # type: ignore[assignment]
    artifact.__dict__["runner"] = runner
    prompt = torch.randint(0, VOCABULARY, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    first = artifact.run_named({"input_ids": prompt})
    past = {k.replace("present_", "past_key_values_"): v for k, v in first.items() if k.startswith("present_")}
    step = {"input_ids": prompt[:, :1], **past, "position_ids": torch.tensor([[PREFILL]])}
    step["attention_mask"] = torch.ones(1, PREFILL + 1, dtype=torch.int64)
    held = resident()
    decode = timed(lambda: artifact.run_named(step), 10, 2)
    return {"prefill": timed(lambda: artifact.run_named({"input_ids": prompt}), 3, 2), "decode": decode, "anon": held}


def torch_times(checkpoint: Path, threads: int, compiled: bool) -> dict[str, float]:
    """Prefill and decode in torch, float32."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = torch.randint(0, VOCABULARY, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    call = torch.compile(model, dynamic=False) if compiled else model

    def cache() -> DynamicCache:
        return DynamicCache(config=model.config)

    with torch.no_grad():
        full = cache()
        model(prompt, past_key_values=full)
        kept = [(layer.keys, layer.values) for layer in full.layers]

        def decode() -> object:
            past = cache()
            for i, (keys, values) in enumerate(kept):
                past.update(keys, values, i)
            return call(prompt[:, :1], past_key_values=past)

        held = resident()
        step = timed(decode, 10, 2)
        prefill = timed(lambda: call(prompt, past_key_values=cache()), 3, 2)
    return {"prefill": prefill, "decode": step, "anon": held}


# ---------------------------------------------------------------- the table


def child(*arguments: str, threads: int = 2) -> dict[str, float]:
    """Run this script again for one measurement."""
    env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    run = measure([sys.executable, __file__, *arguments], env)
    return {**json.loads(run.output.splitlines()[-1]), "wall": run.wall, "peak": run.peak / 1e9}


def depth(folder: Path, layers: int) -> dict[str, float]:
    """Seconds of iree-compile for so many layers."""
    checkpoint = folder / f"depth{layers}"
    if not checkpoint.exists():
        checkpoint.mkdir()
        made(checkpoint, layers, small=True)
    shutil.rmtree(folder / "depth", ignore_errors=True)
    return child("export", str(checkpoint), "W4 g128", str(folder / "depth"), "torch_mlir")


def made(checkpoint: Path, layers: int, small: bool = False) -> None:
    """A checkpoint of random weights."""
    import export_llama

    export_llama.VOCABULARY = VOCABULARY
    if small:
        export_llama.SHAPE = {**export_llama.SHAPE, "hidden_size": 256, "intermediate_size": 512}
        export_llama.SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        export_llama.VOCABULARY = 1024
    export_llama.make(checkpoint, layers)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "qcompile-mlir")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--depth", action="store_true", help="also compile 4 and 32 layers of a narrow shape")
    options = parser.parse_args()
    folder = options.folder
    checkpoint = folder / "checkpoint"
    if not (checkpoint / "config.json").exists():
        checkpoint.mkdir(parents=True, exist_ok=True)
        made(checkpoint, LAYERS)
    rows: list[dict[str, object]] = []
    for recipe in RECIPES:
        for target in TARGETS:
            out = folder / f"{slug(recipe)}-{target}"
            figures = folder / f"{out.name}.json"
            if not figures.exists():
                shutil.rmtree(out, ignore_errors=True)
                figures.write_text(json.dumps(child("export", str(checkpoint), recipe, str(out), target)))
            exported = json.loads(figures.read_text())
            rows.append(row(recipe, target, exported, out, options.threads))
            print(rows[-1], file=sys.stderr, flush=True)
    for name in ("eager", "compile"):
        times = {t: child(f"torch-{name}", str(checkpoint), threads=t) for t in options.threads}
        rows.append({"side": f"torch {name}", "weights": "fp32", **columns(times)})
        print(rows[-1], flush=True)
    notes = (
        f"Llama, hidden 2048 × {LAYERS} layers, vocabulary {VOCABULARY}; milliseconds for a prefill of {PREFILL} "
        f"tokens and for one token after {PAST}, fastest of several runs, the machine shared. The head stays in "
        "float32. Anonymous memory: resident without mapped files. Compiler: iree-compile, for both functions."
    )
    if options.depth:
        few, many = depth(folder, 4), depth(folder, 32)
        ratio = many["compile"] / few["compile"]
        seconds = f"4 layers {few['compile']:.1f} s, 32 layers {many['compile']:.1f} s ({ratio:.1f}×)"
        notes += f"\n\niree-compile of a narrow shape: {seconds}."
    publish("torch_mlir", "A Llama shape in IREE", rows, notes)


def row(recipe: str, target: str, exported: dict[str, float], out: Path, threads: list[int]) -> dict[str, object]:
    times = {t: child("run", str(out), str(t), threads=t) for t in threads}
    iree = target == "torch_mlir"
    return {
        "side": "IREE" if iree else "onnxruntime",
        "weights": recipe,
        **columns(times),
        "bits": f"{exported['bits']:.2f}",
        "err": f"{exported['error']:.0e}",
        "compile s": f"{exported['compile']:.1f}" if iree else "",
        "compiler GB": f"{exported['compiler_peak']:.2f}" if iree else "",
    }


def columns(times: dict[int, dict[str, float]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for threads, figures in times.items():
        found[f"prefill, {threads} thr"] = f"{figures['prefill']:.0f}"
        found[f"decode, {threads} thr"] = f"{figures['decode']:.1f}"
    found["anonymous GB"] = f"{next(iter(times.values()))['anon']:.2f}"
    return found


def run_child(what: str, arguments: list[str]) -> dict[str, float]:
    match what:
        case "export":
            return export(Path(arguments[0]), arguments[1], Path(arguments[2]), arguments[3])
        case "run":
            return artifact_times(Path(arguments[0]), int(arguments[1]))
    return torch_times(Path(arguments[0]), int(os.environ["OMP_NUM_THREADS"]), what == "torch-compile")


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("export", "run", "torch-eager", "torch-compile"):
        print(json.dumps(run_child(sys.argv[1], sys.argv[2:])))
    else:
        main()
