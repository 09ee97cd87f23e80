"""Models rounded by one process, or by those that torchrun starts: ``torchrun … split.py OUT`` (rank 0 writes)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from calibration import tiny
from torch import Tensor

from qcompile import run_passes
from qcompile.calibration.processes import first_process
from qcompile.ir.program import Program

STATIC = "insert-qdq(weights=int4 sym group=8, activations=int8 asym tensor static percentile=99)"
EXPERTS = """def main(x: f64[n, 8], o: i32[3], *, w0: f64[8, 8], w: f64[3, 6, 8] = "experts.w"):
    z = aten.linear.default(x, w0)  # in
    t = aten.transpose.int(w, 1, 2)
    y = transformers.grouped_mm_fallback.default(z, t, o)  # experts
    return {"y": y}"""


CHOSEN = """def main(x: f64[n, 8], *, r0: f64[3, 8], w0: f64[3, 8, 8] = "first.w", r1: f64[3, 8], w1: f64[3, 8, 8] = "second.w"):
    s = aten.linear.default(x, r0)  # router
    i = aten.argmax.default(s, -1)
    g = aten.index.Tensor(w0, [i])
    u = aten.unsqueeze.default(x, -1)
    b = aten.bmm.default(g, u)  # first
    z = aten.squeeze.dim(b, -1)
    t = aten.linear.default(z, r1)  # router
    j = aten.argmax.default(t, -1)
    h = aten.index.Tensor(w1, [j])
    c = aten.bmm.default(h, b)  # second
    return {"y": c}"""


def expert_batches() -> list[dict[str, Tensor]]:
    """Expert 2 gets rows in the first batch only: of two processes, one never sees it."""
    generator = torch.Generator().manual_seed(3)
    ends = [[20, 30, 60], [30, 60, 60], [24, 60, 60]]
    return [
        {
            "x": torch.randn(60, 8, generator=generator, dtype=torch.float64),
            "o": torch.tensor(each, dtype=torch.int32),
        }
        for each in ends
    ]


def rounded(folder: Path | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Codes and scales of a dense model and of experts, and what the reports say of tokens."""
    import transformers.integrations.moe  # noqa: F401  registers grouped_mm_fallback

    found: dict[str, Tensor] = {}
    told: dict[str, Any] = {}
    dense = tiny.decoder(1, "f32")
    reports = run_passes(dense, f"{STATIC}, calibrate, gptq(target=float)", tiny.tokens(8, 6, 3), resume=folder)
    found |= {f"dense {key}": value for key, value in tiny.codes(dense).items()}
    told["dense"] = [reports[-1].measured["wq0"]["tokens"], reports[-2].notes[0]]
    experts = Program.parse(EXPERTS)
    reports = run_passes(experts, "insert-qdq(weights=int3 sym channel), gptq(target=float)", expert_batches())
    found |= {f"experts {key}": value for key, value in tiny.codes(experts).items()}
    told["experts"] = [reports[-1].measured["experts.w"]["tokens"], *sorted(reports[-1].notes)[:1]]
    chosen, rows = Program.parse(CHOSEN), [{"x": batch["x"]} for batch in expert_batches()]
    reports = run_passes(chosen, "insert-qdq(activations=int8 sym tensor static), calibrate", rows)
    found |= {f"chosen {key}": value for key, value in tiny.codes(chosen).items()}
    for where in ("first", "second"):
        told[where] = {k: v for k, v in reports[-1].measured[where].items() if k.startswith("tokens")}
    return found, told


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    result = rounded(out / "resume")
    again = rounded(out / "resume")
    assert tiny.same(result[0], again[0])
    if first_process():
        torch.save(result, out / "found.pt")
