"""Whole-model GPTQ int4 g128 by llm-compressor; see `common_gptq`.

Its scale of a symmetric group is amax / 7.5 with codes -8 … 7, chosen ahead. It looks at a whole layer at a time:
`--true-sequential` is refused.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common_gptq import BLOCK, DAMPING, GROUP, Job, job, linears
from torch import Tensor
from torch.utils.data import DataLoader


def main() -> None:
    run = job(__doc__)
    if run.true_sequential:
        sys.exit("llm-compressor rounds all products of a layer together; leave --true-sequential out")
    model = run.load()
    quantize(run, model)
    run.write(
        linears(model), ["llmcompressor", "torch", "transformers"], "scale = amax / 7.5, codes -8 … 7, static groups"
    )


def quantize(run: Job, model: Any) -> None:
    """Round the weights of `model` in place."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    modifier = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        block_size=BLOCK,
        dampening_frac=DAMPING,
        actorder="static" if run.act_order else None,
    )
    rows = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in run.read_tokens()]
    loader: DataLoader[dict[str, Tensor]] = DataLoader(rows, batch_size=None)  # type: ignore[arg-type]
    made = {"processor": run.tokenizer(), "num_calibration_samples": len(rows)}
    with run.timed():
        oneshot(model=model, dataset=loader, recipe=modifier, pipeline="sequential", **made)


if __name__ == "__main__":
    main()
