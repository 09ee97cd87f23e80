"""What rotation and smoothing win back at W4A4 on models with activation outliers: KL from the float model.

    python benchmarks/outliers.py                       # llama, opt, moe
    python benchmarks/outliers.py --models llama --gain 100

`inject-outliers` multiplies a few channels behind every norm, and divides the weights that read them: the function
stays, rounding suffers. Recovery = (KL injected − KL rotated) / (KL injected − KL clean).
"""

from __future__ import annotations

import argparse
import time

from common import publish
from torch import Tensor

import qcompile
from qcompile import zoo
from qcompile.data import Batches, load_batches, load_passages
from qcompile.evaluate import Measure, evaluate

FOLDED = "raise-norms, fold-norm-affine, center-norm"
TREATMENTS = {
    "nothing": "",
    "folded": FOLDED,
    "smooth": "raise-norms, smooth",
    "R1, R2": f"{FOLDED}, rotate",
    "R1, R2, R3": f"{FOLDED}, rotate(qk=true)",
    "R1, R2, R4": f"{FOLDED}, rotate(orphans=true)",
    "R1, R2, R3, R4": f"{FOLDED}, rotate(qk=true, orphans=true)",
}
SCHEMES = {
    "int4 group=32 · int4 asym token": "insert-qdq(weights=int4 sym group=32, activations=int4 asym token dynamic)",
    "int4 channel · int4 sym token": "insert-qdq(weights=int4 sym channel, activations=int4 sym token dynamic)",
}


class Model:
    """An embedded model, the passages it is judged on, its own logits, and calibration data."""

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self.program = qcompile.capture(zoo.path(name))
        self.passages = load_passages("generated", length=128, limit=limit, program=self.program)
        self.batches: Batches = load_batches("generated", samples=16, length=128, program=self.program)
        self._known: dict[bytes, Tensor] = {}

    def reference(self, ids: Tensor) -> Tensor:
        """Logits of the float model, computed once."""
        key = ids.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self.program(ids)
        return self._known[key]

    def kl(self, *pipelines: str) -> Measure:
        """KL(float ‖ program after the passes) in nats per token."""
        program = self.program.clone()
        for pipeline in pipelines:
            if pipeline:
                qcompile.run_passes(program, pipeline, data=self.batches)
        result = evaluate(program, self.reference, data=self.passages, quiet=True)
        assert result.kl is not None
        return result.kl


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(zoo.NAMES))
    parser.add_argument("--gain", type=float, default=30.0)
    parser.add_argument("--limit", type=int, default=16, help="passages of 128 tokens")
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    arguments = parser.parse_args()
    inject = f"raise-norms, inject-outliers(gain={arguments.gain:g})"
    rows: list[dict[str, object]] = []
    for name in arguments.models:
        model = Model(name, arguments.limit)
        for scheme, quantize in SCHEMES.items():
            clean, hurt = model.kl(quantize), model.kl(inject, quantize)
            for treatment, passes in TREATMENTS.items():
                start = time.perf_counter()
                with_outliers = hurt if not passes else model.kl(inject, passes, quantize)
                without = clean if not passes else model.kl(passes, quantize)
                lost = hurt.mean - clean.mean
                rows.append(
                    {
                        "model": name,
                        "weights · inputs": scheme,
                        "treatment": treatment,
                        "KL, no outliers": str(without),
                        "KL, outliers": str(with_outliers),
                        "recovery": f"{(hurt.mean - with_outliers.mean) / lost:.0%}" if passes and lost > 0 else "",
                    }
                )
                print(f"{time.perf_counter() - start:.0f} s", *rows[-1].values(), sep=" | ", flush=True)
    notes = (
        f"Outliers: `{inject}`, 4 channels behind every norm. KL in nats per token over {arguments.limit} passages of "
        "128 tokens that the float model wrote; rounding to nearest; head and embedding stay float. Folded: the passes "
        "before a rotation alone. They take the norms' gains into the weights, and these outliers are in the gains: "
        "what rotation adds is its distance from that row. R1 and R2 are folded into weights; R3 rotates queries and "
        "keys and R4 the other inputs online. Above 100%: better than the untreated model without outliers. Target: at "
        "least 80%."
    )
    publish("outliers", "Outliers, smoothing and rotation at W4A4", rows, notes)


if __name__ == "__main__":
    main()
