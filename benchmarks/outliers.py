"""What rotation and smoothing win back at W4A4 on models with activation outliers: KL from the float model.

    python benchmarks/outliers.py                       # llama, opt, moe
    python benchmarks/outliers.py --models llama --gain 100

Three passes put outliers in, in three places, and keep the function: behind the norms, in the residual stream, and
between the products of a block. Recovery = (KL injected − KL treated) / (KL injected − KL without outliers).
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
from qcompile.ir.program import Program

FOLDED = "fold-norm-affine, center-norm"
ROTATED = f"{FOLDED}, rotate(qk=true, orphans=true)"
JOINT = f"{FOLDED}, rotate(qk=true, orphans=true, joint=true)"
TREATMENTS = {
    "nothing": "",
    "folded": FOLDED,
    "smooth": "smooth",
    "R1, R2": f"{FOLDED}, rotate",
    "R1, R2, R3, R4": ROTATED,
    "R1–R4, heads jointly": JOINT,
    "equalize, R1, R2, R3, R4": f"equalize, {ROTATED}",
    "smooth, R1, R2, R3, R4": f"smooth, {ROTATED}",
}
JUDGED = ("R1, R2, R3, R4", "R1–R4, heads jointly", "equalize, R1, R2, R3, R4", "smooth, R1, R2, R3, R4")
SCHEMES = {
    "int4 group=32 · int4 asym token": "insert-qdq(weights=int4 sym group=32, activations=int4 asym token dynamic)",
    "int4 channel · int4 sym token": "insert-qdq(weights=int4 sym channel, activations=int4 sym token dynamic)",
}
CLEAN, ALL = "no outliers", "all three"


def injections(gain: float) -> dict[str, str]:
    """Passes that put outliers in, by the column of the table."""
    norms, inputs = f"inject-outliers(gain={gain:g})", f"inject-input-outliers(gain={gain:g})"
    stream = f"{FOLDED}, inject-stream-outliers"
    return {CLEAN: "", "norms": norms, "stream": stream, "inputs": inputs, ALL: f"{stream}, {inputs}, {norms}"}


class Model:
    """An embedded model, the passages it is judged on, its own logits, and calibration data."""

    def __init__(self, name: str, limit: int) -> None:
        self.program = qcompile.capture(zoo.path(name))
        self.passages = load_passages("generated", length=128, limit=limit, program=self.program)
        self.batches: Batches = load_batches("generated", samples=8, length=128, program=self.program)
        self._known: dict[bytes, Tensor] = {}

    def reference(self, ids: Tensor) -> Tensor:
        """Logits of the float model, computed once."""
        key = ids.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self.program(ids)
        return self._known[key]

    def after(self, program: Program, passes: str) -> Program:
        """A copy of a program behind some passes."""
        copy = program.clone()
        if passes:
            qcompile.run_passes(copy, passes, data=self.batches)
        return copy

    def kl(self, program: Program) -> Measure:
        """KL(float ‖ program) in nats per token."""
        result = evaluate(program, self.reference, data=self.passages, quiet=True)
        assert result.kl is not None
        return result.kl


def measure(name: str, limit: int, gain: float) -> dict[tuple[str, str, str], Measure]:
    """KL by scheme, treatment and injection."""
    model = Model(name, limit)
    raised = model.after(model.program, "raise-norms")
    injected = {where: model.after(raised, passes) for where, passes in injections(gain).items()}
    found = {}
    for treatment, passes in TREATMENTS.items():
        start = time.process_time()
        for where, program in injected.items():
            treated = model.after(program, passes)
            for scheme, quantize in SCHEMES.items():
                found[scheme, treatment, where] = model.kl(model.after(treated, quantize))
        print(f"{name}, {treatment}: {time.process_time() - start:.0f} s", flush=True)
    return found


def recovery(found: dict[tuple[str, str, str], Measure], scheme: str, treatment: str, where: str) -> float:
    """How much of what an injection cost a treatment wins back; nan where it cost nothing."""
    clean, hurt = found[scheme, "nothing", CLEAN].mean, found[scheme, "nothing", where].mean
    return (hurt - found[scheme, treatment, where].mean) / (hurt - clean) if hurt > clean else float("nan")


def cell(found: dict[tuple[str, str, str], Measure], scheme: str, treatment: str, where: str) -> str:
    """KL, its standard error, and the recovery where something was injected and treated."""
    text = str(found[scheme, treatment, where])
    if where == CLEAN or treatment == "nothing":
        return text
    return f"{text} ({recovery(found, scheme, treatment, where):.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(zoo.NAMES))
    parser.add_argument("--gain", type=float, default=30.0)
    parser.add_argument("--limit", type=int, default=8, help="passages of 128 tokens")
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    reached: dict[str, list[tuple[float, str]]] = {treatment: [] for treatment in JUDGED}
    for name in arguments.models:
        found = measure(name, arguments.limit, arguments.gain)
        for scheme in SCHEMES:
            for treatment, seen in reached.items():
                seen.append((recovery(found, scheme, treatment, ALL), f"{name}, {scheme}"))
            for treatment in TREATMENTS:
                head = {"model": name, "weights · inputs": scheme, "treatment": treatment}
                rows.append(head | {w: cell(found, scheme, treatment, w) for w in injections(arguments.gain)})
    judged = [
        f"- *{treatment}*: {min(seen)[0]:.1%} ({min(seen)[1]}) to {max(seen)[0]:.1%}"
        for treatment, seen in reached.items()
    ]
    notes = NOTES.format(limit=arguments.limit, gain=arguments.gain, judged="\n".join(judged))
    publish("outliers", "Outliers, smoothing and rotation at W4A4", rows, notes)


NOTES = """\
KL in nats per token from the float model over {limit} passages of 128 tokens that it wrote, ± standard error; in
brackets the recovery. Rounding to nearest; head and embedding stay float. Above 100%: better than the untreated model
without outliers.

**Target: rotation recovers at least 80% of what all three injections cost. Measured, from the least to the most:**

{judged}

- *norms*: `inject-outliers`, 4 channels behind every norm times {gain:g}. Folding alone undoes this one.
- *stream*: `inject-stream-outliers`, the residual stream rotated to its principal axes. The norms would not allow to
  scale a channel of it, so its outliers are as large as the energy of the stream is uneven.
- *inputs*: `inject-input-outliers`, 4 channels of each hidden layer and of the values, times {gain:g}. R2 and R4 are
  for these.
- *folded*: the passes before a rotation alone. R1 and R2 are folded into weights, R4 rotates the other inputs online.
  R3 rotates queries and keys, which nothing rounds here: it changes nothing beyond float rounding.
- *heads jointly*: `rotate(joint=true)`. Values are not rotated head by head in their weights, but all heads together in
  front of the output projection, when the model runs, as QuaRot does.
- *equalize*: from weights alone, before the rotation; it keeps the function and needs no data.

With outliers in the *stream*, R1 and R2 end where they end without: a stream that is rotated twice is one that is
rotated once. The recovery is a quotient of small numbers there, some 0.01 to 0.04, with errors of a few 0.001 in each.

*inputs* is where rotation falls short. A scaled channel is no rotated one: an orthogonal T keeps the length of a
vector, so what 4 channels have too much is spread over all n, and the step of the rounding stays larger, by something
like √(1 + gain²·4/n): 4 times in a hidden layer of 256. The 4 channels of the values fall on some heads; to rotate all
heads together spreads them over all channels, and leaves less. Only a diagonal undoes a diagonal. `equalize` finds this
one because it was put into the weights on both sides; outliers that a model has learned need not show there, and
`smooth` looks at data."""


if __name__ == "__main__":
    main()
