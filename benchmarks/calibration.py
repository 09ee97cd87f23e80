"""Whole GPTQ runs, int4 in groups of 128, of a small Llama with wide layers: qcompile beside peers.

    python benchmarks/calibration.py --llm-compressor LLMC/bin/python --neural-compressor-pt INC/bin/python \\
        --gptqmodel GPTQMODEL/bin/python

The peers come from PyPI, each in an environment of its own; one that is not given is left out. All read one float32
checkpoint, with random weights of falling spectra and a few loud channels, and one set of tokens. Counted are the CPU
seconds of the call that quantizes: not imports, not loading, not writing. The loss is Σ tr(ΔW H ΔWᵀ) over all rounded
weights, H from the float model on the same tokens: the same for everyone.

    python3.11 -m venv LLMC; LLMC/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python3.11 -m venv INC; INC/bin/pip install torch==2.13.0 neural_compressor_pt==3.10 transformers==5.17.0 accelerate
    python3.11 -m venv GPTQMODEL; GPTQMODEL/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate \\
        threadpoolctl device-smi protobuf pillow requests jinja2 ninja datasets dill torchao==0.18.0 setuptools
    GPTQMODEL/bin/pip install --no-deps --no-build-isolation pypcre tokenicer logbar defuser gptqmodel==7.7.0

gptqmodel asks for torch 2.14.1 and runs on 2.13, too. It compiles its packing the first time: run it once on a small
shape (`--width 256 --hidden 768 --layers 2 --rounds 1`) before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import publish
from llama_shapes import Shape
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PEERS = Path(__file__).parent / "peers"
OWN = "qcompile"
MODES = {"act": ["--act-order"], "plain": []}
"""Options of a run: columns by falling diagonal of H with groups chosen ahead; or as they stand, with groups chosen
when their turn comes. Peers are compared with ours of the mode that they can do."""
FAST = ["--compute", "bfloat16", "--sums", "int8"]
OURS = {
    "": ["--true-sequential"],
    ", fast": ["--true-sequential", *FAST],
    ", compute: bfloat16": ["--true-sequential", "--compute", "bfloat16"],
    ", propagate: float": ["--true-sequential", "--propagate", "float"],
    ", fast, propagate: float": ["--true-sequential", *FAST, "--propagate", "float"],
}
""""propagate: float" shows every layer what the float model gives it; peers show it what the rounded layers give."""


@dataclass(frozen=True)
class Peer:
    """A peer, the script that runs it, the mode to run it in, and whether it can hold the model in bfloat16."""

    name: str
    script: str
    mode: str
    halves: bool = False


@dataclass(frozen=True)
class Job:
    """One run in every round: its name, mode and script, the Python that runs it, and options beside the mode's."""

    name: str
    mode: str
    script: str
    python: str
    options: list[str]


@dataclass(frozen=True)
class Quality:
    """What came out, by run: tr(ΔW H ΔWᵀ) by weight, and the divergence from the float model in nats a token."""

    losses: dict[str, dict[str, float]]
    divergences: dict[str, float]


KNOWN = (
    Peer("llm-compressor", "llmcompressor_gptq.py", "act", halves=True),
    Peer("neural-compressor-pt", "inc_gptq.py", "plain"),
    Peer("gptqmodel", "gptqmodel_gptq.py", "act"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in KNOWN:
        parser.add_argument(f"--{peer.name}", type=Path, metavar="PYTHON", help=f"of an environment with {peer.name}")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=5632, help="inside the feed-forward layers")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="for the model and what comes out, kept; a temporary one by default"
    )
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    options = parser.parse_args()
    shape = Shape(
        options.layers, options.width, options.hidden, options.width // 64, max(1, options.width // 256), 4096
    )
    with folder_of(options.folder) as folder:
        if not (folder / "tokens.safetensors").exists():
            make(folder, shape, options.samples, options.length)
        chosen = {p: python for p in KNOWN if (python := getattr(options, p.name.replace("-", "_"))) is not None}
        modes = list(dict.fromkeys(p.mode for p in chosen)) or ["act"]
        jobs = [
            Job(own_name(mode, how), mode, "qcompile_gptq.py", sys.executable, OURS[how])
            for mode in modes
            for how in OURS
        ]
        for peer, python in chosen.items():
            jobs.append(Job(peer.name, peer.mode, peer.script, str(python), []))
            if peer.halves:
                halved = ["--compute", "bfloat16"]
                jobs.append(Job(f"{peer.name}, model in bfloat16", peer.mode, peer.script, str(python), halved))
        found: dict[str, list[dict[str, Any]]] = {job.name: [] for job in jobs}
        for _ in range(options.rounds):
            for job in jobs:
                found[job.name].append(run(folder, job, options.threads))
                print(job.name, found[job.name][-1], file=sys.stderr, flush=True)
        names = [job.name for job in jobs]
        show(jobs, found, Quality(losses(folder, names), divergences(folder, names)), options)


@contextmanager
def folder_of(given: Path | None) -> Iterator[Path]:
    """The folder to work in."""
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def make(folder: Path, shape: Shape, samples: int, length: int) -> None:
    """A float32 checkpoint and tokens: falling spectra, a few loud channels, tokens of falling frequency."""
    random = torch.Generator().manual_seed(0)
    (folder / "model").mkdir(exist_ok=True)
    config = shape.config() | {"dtype": "float32", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    tensors = {name: _values(name, dims, random) for name, dims in shape.tensors()}
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    save_file({"tokens": draw(samples, length, shape.vocabulary, random)}, folder / "tokens.safetensors")


def draw(samples: int, length: int, vocabulary: int, random: torch.Generator) -> Tensor:
    """Tokens [samples, length] of falling frequency."""
    often = 1 / torch.arange(10, vocabulary + 10, dtype=torch.float64)
    return torch.multinomial(often, samples * length, replacement=True, generator=random).view(samples, length)


def _values(name: str, dims: list[int], random: torch.Generator) -> Tensor:
    if len(dims) == 1:  # the gains of a norm: around 1, one channel in two hundred up to 8 times as loud
        gains = (0.3 * torch.randn(dims, generator=random)).exp()
        loud = torch.rand(dims, generator=random) < 0.005
        return torch.where(loud, gains * 8 * torch.rand(dims, generator=random), gains)
    rows, columns = dims
    rank = min(dims) // 4
    fall = torch.arange(1, rank + 1) ** -0.7
    low = torch.randn(rows, rank, generator=random) * fall @ torch.randn(rank, columns, generator=random)
    values = low / low.std() + torch.randn(rows, columns, generator=random)
    return values / values.std() * (1.0 if "embed" in name else columns**-0.5)


def own_name(mode: str, how: str = "") -> str:
    """What a run of ours is called."""
    return f"{OWN}, {mode}{how}"


def file_of(folder: Path, name: str) -> Path:
    """Where a run writes, without the ending."""
    return folder / "".join(c if c.isalnum() else "-" for c in name)


def run(folder: Path, job: Job, threads: int) -> dict[str, Any]:
    """One run in a process of its own; raises CalledProcessError where it fails."""
    out = file_of(folder, job.name)
    command = [job.python, str(PEERS / job.script), str(folder / "model"), str(folder / "tokens.safetensors"), str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, *MODES[job.mode], *job.options], check=True, env=env, stdout=sys.stderr, cwd=folder)
    facts: dict[str, Any] = json.loads(Path(f"{out}.json").read_text())
    return facts


@torch.no_grad()
def losses(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """For each run, tr(ΔW H ΔWᵀ) by weight: Σ ‖ΔW x‖² over what the float model's products read."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    files: dict[str, Any] = {name: safe_open(f"{file_of(folder, name)}.safetensors", "pt") for name in names}
    changes: dict[str, dict[str, Tensor]] = {}

    def look(key: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for name, change in changes[key].items():
                error = torch.linalg.vector_norm(inputs[0] @ change.T, dtype=torch.float64)
                found[name][key] = found[name].get(key, 0.0) + float(error.square())

        return hook

    for path, module in model.named_modules():
        key = f"{path}.weight"
        held = [name for name, file in files.items() if key in file.keys()]  # noqa: SIM118  no mapping
        if not held:
            continue
        if len(held) != len(files):
            raise ValueError(f"{key} was rounded by {held} alone")
        changes[key] = {name: files[name].get_tensor(key) - module.weight for name in held}
        module.register_forward_pre_hook(look(key))
    for tokens in load_file(folder / "tokens.safetensors")["tokens"].split(1):
        model.model(input_ids=tokens, use_cache=False)
    return found


@torch.no_grad()
def divergences(folder: Path, names: list[str]) -> dict[str, float]:
    """For each run, KL from the float model in nats a token, on tokens that nothing was calibrated on."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    tokens = draw(4, 256, model.config.vocab_size, torch.Generator().manual_seed(1))
    before = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    found = {}
    for name in names:
        model.load_state_dict(load_file(f"{file_of(folder, name)}.safetensors"), strict=False)
        after = model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        found[name] = float((before.exp() * (before - after)).sum(-1).mean(dtype=torch.float64))
    return found


def show(
    jobs: list[Job], found: dict[str, list[dict[str, Any]]], quality: Quality, options: argparse.Namespace
) -> None:
    """Print the table, and with ``--write`` put it into results/."""
    seconds = {name: statistics.median(f["cpu"] for f in runs) for name, runs in found.items()}
    sums = {name: sum(by.values()) for name, by in quality.losses.items()}
    rows: list[dict[str, object]] = []
    for job in jobs:
        runs, theirs = found[job.name], not job.name.startswith(OWN)
        own = [own_name(job.mode, how) for how in OURS]
        rows.append({
            "run": f"{job.name} {next(iter(runs[0]['versions'].values()))}" if theirs else job.name,
            "order, groups": {"act": "act order, static", "plain": "as they stand, running"}[job.mode],
            "CPU, s": f"{seconds[job.name]:.1f}",
            "of all rounds": ", ".join(f"{f['cpu']:.1f}" for f in runs),
            "times ours": ", ".join(f"{seconds[job.name] / seconds[name]:.1f}" for name in own[:2]) if theirs else "",
            "Σ tr(ΔW H ΔWᵀ)": f"{sums[job.name]:.6g}",
            "ours / theirs": ", ".join(f"{sums[name] / sums[job.name]:.4f}" for name in own) if theirs else "",
            "KL, nats a token": f"{quality.divergences[job.name]:.5f}",
            "peak resident, GB": f"{max(f['peak'] for f in runs) / 1e9:.2f}",
        })  # fmt: skip
    notes = (
        f"Llama of {options.layers} layers, width {options.width}, {options.hidden} inside the feed-forward layers, "
        f"random weights in float32; {options.samples} × {options.length} tokens; {options.threads} thread(s), "
        f"{options.rounds} round(s), in turns; medians. Everyone: scale = amax / 7.5, codes -8 … 7, damping 1%. Peers "
        "calibrate a layer on the outputs of the rounded layers before it, and look at all its products before they "
        "round one; ours rounds q, k, v, then o, and so on, which costs it nothing (`propagate: quantized`). "
        "`compute: bfloat16` is for linear layers while data is run; `fast` is that and `sums: int8`, H added up as "
        "8-bit integers; rounding stays float32. A peer's bfloat16 is its whole model's. H is the float model's for "
        "everyone, so that the loss favours who calibrates on float inputs. Times ours: the first two of ours; ours / "
        "theirs: all five. KL, on 4 × 256 other tokens, is what counts in the end. Each of ours is compared with the "
        "peers of its order and groups. Peers load the model into memory before the clock starts; ours reads its "
        "weights from the file within the time."
    )
    publish("calibration", "Whole GPTQ runs, int4 g128", rows, notes)


if __name__ == "__main__":
    main()
