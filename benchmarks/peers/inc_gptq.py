"""Whole-model GPTQ int4 g128 by neural-compressor-pt; see `common_gptq`.

Its scale of a symmetric group is amax / 7.5 with codes -8 … 7. Groups are chosen when their turn comes, from columns as
they are by then; with `--act-order` they are groups of columns in the order of their turns. Values are taken from the
result of its solver; those that its packed module decodes to are compared with them.
"""

from __future__ import annotations

from typing import Any

import torch
from common_gptq import BLOCK, DAMPING, GROUP, Job, job, linears
from torch import Tensor


def main() -> None:
    run = job(__doc__)
    model = run.load()
    weights = quantize(run, model)
    run.write(weights, ["neural_compressor_pt", "torch", "transformers"], "scale = amax / 7.5, codes -8 … 7")


def quantize(run: Job, model: Any) -> dict[str, Tensor]:
    """The rounded weights by their name in the checkpoint."""
    from neural_compressor.torch.algorithms.weight_only import gptq
    from neural_compressor.torch.quantization import GPTQConfig, convert, prepare

    wanted = linears(model)
    config = GPTQConfig(
        bits=4,
        group_size=GROUP,
        use_sym=True,
        percdamp=DAMPING,
        block_size=BLOCK,
        act_order=run.act_order,
        true_sequential=run.true_sequential,
    )
    solved: list[Tensor] = []
    solve = gptq.GPTQ.fasterquant

    def kept(*arguments: Any, **options: Any) -> Any:
        found = solve(*arguments, **options)
        solved.append(found[-1].clone())
        return found

    gptq.GPTQ.fasterquant = kept
    with run.timed(), torch.no_grad():
        prepared = prepare(model, config)
        for tokens in run.read_tokens():
            prepared(tokens)
        convert(prepared)
    return dict(zip(wanted, solved, strict=True))


if __name__ == "__main__":
    main()
