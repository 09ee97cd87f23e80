"""Whole-model GPTQ int4 g128 by qcompile; see `common_gptq`."""

from __future__ import annotations

from typing import Any

import torch
from common_gptq import GROUP, Job, job
from torch import Tensor

BATCH = 8  # as a recipe has it


def main() -> None:
    run = job(__doc__)
    program = quantize(run)
    convention = f"scale = amax / 7.5, codes -8 … 7, {'static' if run.act_order else 'running'} groups"
    run.write(values(program), ["qcompile", "torch", "transformers"], convention)


def quantize(run: Job) -> Any:
    """The program with its weights rounded; capture comes before the clock, reading weights after it."""
    import qcompile
    from qcompile.calibration.settings import Settings

    order = "act_order=true" if run.act_order else "act_order=false, static_groups=false"
    pipeline = f"raise-norms, insert-qdq(weights=int4 sym half group={GROUP}), gptq({order})"
    settings = Settings(run.propagate, run.true_sequential, compute=run.compute, sums=run.sums)
    rows = run.read_tokens()
    batches = [torch.cat(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    program = qcompile.capture(run.model, dtype="float32")
    with run.timed():
        reports = qcompile.run_passes(program, pipeline, batches, settings=settings)
    run.facts["parts"] = reports[-1].measured["calibration"]
    return program


def values(program: Any) -> dict[str, Tensor]:
    """What every stored weight decodes to, by its name in the checkpoint."""
    codes = torch.ops.qcompile.dequantize.default
    found = {}
    for node in program.calls(codes):
        arguments = [program.weight(a) if program.is_weight(a) else a for a in node.args]
        found[program.key(node.args[0]).removesuffix(".codes")] = codes(*arguments, **node.kwargs)
    return found


if __name__ == "__main__":
    main()
