"""Whole-model GPTQ int4 g128 by gptqmodel; see `common_gptq`.

Its scale of a symmetric group is amax / 7.5 with codes -8 … 7. With `--act-order` groups are chosen ahead; without it
when their turn comes. Values are taken from the result of its solver.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from common_gptq import DAMPING, GROUP, Job, job
from torch import Tensor


def main() -> None:
    run = job(__doc__)
    groups = "static" if run.act_order else "running"
    run.write(
        quantize(run), ["gptqmodel", "torch", "transformers"], f"scale = amax / 7.5, codes -8 … 7, {groups} groups"
    )


def quantize(run: Job) -> dict[str, Tensor]:
    """The rounded weights by their name in the checkpoint."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # of two cores it takes one for itself, and then asks for two
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import gptq

    config = QuantizeConfig(
        bits=4,
        group_size=GROUP,
        sym=True,
        desc_act=run.act_order,
        static_groups=run.act_order,
        act_group_aware=False,
        damp_percent=DAMPING,
        true_sequential=run.true_sequential,
        device="cpu",
    )
    with tempfile.TemporaryDirectory() as folder:
        model = GPTQModel.load(str(_with_tokenizer(run, Path(folder))), config, dtype=torch.float32)
        solved: dict[str, Tensor] = {}
        solve = gptq.GPTQ.quantize

        def kept(self: Any, *arguments: Any, **options: Any) -> Any:
            found = solve(self, *arguments, **options)
            solved[f"{self._named_module.full_name}.weight"] = found[0].detach().clone()
            return found

        gptq.GPTQ.quantize = kept
        rows = [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in run.read_tokens()]
        with run.timed():
            model.quantize(rows, batch_size=1, calibration_sort=None)
    return solved


def _with_tokenizer(run: Job, folder: Path) -> Path:
    """A folder with the model, by links, and a tokenizer."""
    for file in run.model.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    run.tokenizer().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
