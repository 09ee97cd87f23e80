"""The second-order core on one 2048 × 2048 layer, H and W given, int4 g128: against the loop as it was published.

The reference is written from arXiv 2210.17323 (algorithm 1): Cholesky, inverse, upper Cholesky of the inverse; then a
rank-one update of the rest of a 128-column block for every column, and one product for all later columns after every
block. Both round with the same parameters and the same four operations. CPU seconds of one thread, rounds interleaved,
medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import publish
from torch import Tensor

from qcompile.numerics import QuantSpec
from qcompile.rounding import GPTQ, Grid, Statistics, Stored, factor, recurse, round_matrix

DAMPING = 0.01


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of (H + λI)⁻¹ by three factorisations."""
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def lazy_blocks(weight: Tensor, upper: Tensor, steps: Tensor, group: int, block: int = 128) -> Tensor:
    """The published loop: [out, in] values; `steps` [out, groups]."""
    w, values = weight.clone(), torch.zeros_like(weight)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        here, errors = w[:, start:stop].clone(), torch.zeros_like(w[:, start:stop])
        rows = upper[start:stop, start:stop]
        for i in range(stop - start):
            step = steps[:, (start + i) // group]
            value = torch.clamp(torch.round(here[:, i] / step), -8, 7) * step
            error = (here[:, i] - value) / rows[i, i]
            here[:, i:] -= error.unsqueeze(1).matmul(rows[i, i:].unsqueeze(0))
            values[:, start + i] = value
            errors[:, i] = error
        w[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return values


def layer(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight, and a Hessian of correlated inputs with channels of different size."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(2 * size, size // 16, generator=generator) @ torch.randn(size // 16, size, generator=generator)
    x = mixed / size**0.5 + torch.randn(2 * size, size, generator=generator)
    x *= torch.rand(size, generator=generator) + 0.1
    weight = torch.randn(size, size, generator=generator) * 0.02
    x = x.to(dtype)
    return weight.to(dtype), x.t() @ x


def medians(rounds: int, **jobs: Callable[[], object]) -> dict[str, float]:
    """Median CPU seconds of each job, run in turns."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            start = time.process_time()
            job()
            times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec, size = QuantSpec.parse("int4 sym group=128"), options.size

    weight, hessian = layer(size, torch.float64)
    grid = Grid.fit(weight, Stored.plain(spec, weight))
    columns = weight.t().contiguous()
    ours = recurse(columns, columns, factor(hessian, DAMPING).feedback, grid).t()
    theirs = lazy_blocks(weight, inverse_factor(hessian), grid.steps.t(), 128)
    equal = float((grid.finish(ours).codes == grid.finish(theirs).codes).double().mean())

    weight, hessian = layer(size, torch.float32)
    stored = Stored.plain(spec, weight)
    grid = Grid.fit(weight, stored)
    columns, steps = weight.t().contiguous(), grid.steps.t().contiguous()
    feedback, upper = factor(hessian, DAMPING).feedback, inverse_factor(hessian)
    found = medians(
        options.rounds,
        factor=lambda: factor(hessian, DAMPING),
        inverse=lambda: inverse_factor(hessian),
        recursion=lambda: recurse(columns, columns, feedback, grid),
        loop=lambda: lazy_blocks(weight, upper, steps, 128),
        whole=lambda: round_matrix(weight, stored, Statistics(hessian), GPTQ(DAMPING)),
    )

    def row(what: str, own: str, peer: str) -> dict[str, object]:
        return {
            "step": what,
            "qcompile, CPU-s": f"{found[own]:.3f}",
            "reference, CPU-s": f"{found[peer]:.3f}",
            "faster": f"{found[peer] / found[own]:.1f}×",
        }

    rows = [
        row("factorisation", "factor", "inverse"),
        row("columns (recursion / loop)", "recursion", "loop"),
    ]
    both = found["factor"] + found["recursion"], found["inverse"] + found["loop"]
    rows.append({
        "step": "both",
        "qcompile, CPU-s": f"{both[0]:.3f}",
        "reference, CPU-s": f"{both[1]:.3f}",
        "faster": f"{both[1] / both[0]:.1f}×",
    })  # fmt: skip
    notes = (
        f"One thread, float32, {options.rounds} rounds. In float64 {equal:.4%} of the codes are equal. The whole of "
        f"`round_matrix`, with parameters, codes checked against decoding, and the losses of GPTQ and of rounding to "
        f"nearest, takes {found['whole']:.3f} CPU-s."
    )
    publish("rounding_core", f"Second-order core, {size} × {size}, int4 g128", rows, notes)


if __name__ == "__main__":
    main()
