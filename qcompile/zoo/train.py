"""Train one of the embedded models on a text file.

Usage::

    python -m qcompile.zoo.train --text tinyshakespeare.txt --model llama --out qcompile/zoo/models/llama

The text of the embedded models is "tiny Shakespeare", 1.1 million characters of plays. On its last tenth, which they
have not seen, the saved float16 files reach (computed in float32, each window of 256 tokens on its own):

======  ==========  ==============  ===============
name    parameters  nats per token  nats per char
======  ==========  ==============  ===============
llama   1312384     2.7949          1.4905
opt     1090176     3.2005          1.7068
moe     1460608     2.9368          1.5662
======  ==========  ==============  ===============

The best checkpoint was the last one each time. The recipe was tried out on the same tenth, so these numbers are a
little optimistic; for comparing a model with its own quantized form that does not matter.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from qcompile.zoo.configs import MODELS, POSITIONS, SHORT, Recipe
from qcompile.zoo.score import Score, score, split, windows
from qcompile.zoo.tokenizer import save_tokenizer, train_tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
    """Tokens of `text`, ``[tokens]``, without ``<s>``."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def add_dropout(model: nn.Module, rate: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Drop parts of the embedding and of what each attention and feed-forward block adds, while training.

    Done with hooks since two of the three architectures have no such option; remove them before saving.
    """

    def hook(module: nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return functional.dropout(output, rate, module.training)

    ends = ("embed_tokens", "o_proj", "out_proj", "mlp.down_proj", "fc2", "mlp.experts")
    return [module.register_forward_hook(hook) for name, module in model.named_modules() if name.endswith(ends)]


@torch.no_grad()
def start_positions(model: nn.Module) -> None:
    """Start learned positions as sines and cosines, ``[positions, hidden]``, of the size of the token embeddings.

    From random ones, attending to "the token before" has to be learned for each position anew; from these, one turn of
    the plane does for all of them.
    """
    for name, module in model.named_modules():
        if name.endswith("embed_positions") and isinstance(module, nn.Embedding):
            rows, width = module.weight.shape
            rates = float(rows) ** -torch.linspace(0, 1, width // 2)
            angles = torch.arange(rows)[:, None] * rates
            size = float(module.weight.std()) * math.sqrt(2)
            module.weight.copy_(size * torch.cat([angles.sin(), angles.cos()], dim=1))


def optimizer_for(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices only: pulling gains and biases to zero would not regularize anything."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.98), fused=True)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rate of the step numbered `step`, from 1: linear warm-up to the peak, then half a cosine to the final rate."""
    if step <= recipe.warmup:
        return recipe.peak_lr * step / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.final_lr + (recipe.peak_lr - recipe.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def forward(model: PreTrainedModel, inputs: torch.Tensor, generator: torch.Generator) -> ModelOutput:
    """Run on ``[sequences, length]`` tokens; those shorter than ``POSITIONS`` begin at a position drawn for each."""
    count, length = inputs.shape
    if length == POSITIONS:
        return model(input_ids=inputs, use_cache=False)
    shifts = torch.randint(POSITIONS - length + 1, (count, 1), generator=generator)
    return model(input_ids=inputs, position_ids=shifts + torch.arange(length), use_cache=False)


def step_loss(
    model: PreTrainedModel, ids: torch.Tensor, length: int, recipe: Recipe, generator: torch.Generator
) -> torch.Tensor:
    """Mean loss per token of random windows, plus what keeps the experts evenly used where the model has experts."""
    count = recipe.batch * POSITIONS // length
    starts = torch.randint(len(ids) - POSITIONS + 1, (count,), generator=generator)
    inputs, targets = windows(ids, starts, length)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.bf16):
        output = forward(model, inputs, generator)
    loss = functional.cross_entropy(output.logits.flatten(0, 1).float(), targets.flatten())
    balance = getattr(output, "aux_loss", None)
    return loss if balance is None else loss + model.config.router_aux_loss_coef * balance


def fit(model: PreTrainedModel, train: torch.Tensor, valid: torch.Tensor, chars: int, recipe: Recipe) -> None:
    """Train in place on random windows of the tokens `train`, and leave the weights that did best on `valid`.

    `chars` is the number of characters that `valid` encodes.
    """
    optimizer = optimizer_for(model, recipe)
    generator = torch.Generator().manual_seed(recipe.seed)
    best, best_weights = math.inf, model.state_dict()
    began = time.monotonic()
    for step in range(1, recipe.steps + 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        length = SHORT if step <= recipe.short_steps else POSITIONS
        loss = step_loss(model, train, length, recipe, generator)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % recipe.eval_every == 0 or step == recipe.steps:
            now = score(model, valid, chars, POSITIONS).nats_per_char
            seconds = time.monotonic() - began
            print(f"step {step:5d}  train {loss.item():.3f}/token  valid {now:.4f}/char  {seconds:.0f} s", flush=True)
            if now < best:
                best, best_weights = now, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)


def build(name: str, tokenizer: PreTrainedTokenizerBase, train: str, valid: str, recipe: Recipe) -> PreTrainedModel:
    """Train a model from scratch, in float32; the same on every run of the same machine."""
    torch.manual_seed(recipe.seed)
    config = MODELS[name][0]()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    start_positions(model)
    handles = add_dropout(model, recipe.dropout)
    # Asks a mixture of experts for the loss that balances them; off again in what is saved.
    routed = hasattr(config, "output_router_logits")
    if routed:
        model.config.output_router_logits = True
    fit(model, encode(tokenizer, train), encode(tokenizer, valid), len(valid), recipe)
    if routed:
        model.config.output_router_logits = False
    for handle in handles:
        handle.remove()
    return model


def measure(folder: Path, valid: str) -> Score:
    """Score of the files in `folder` as anyone would load them, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return score(model, encode(AutoTokenizer.from_pretrained(folder), valid), len(valid), POSITIONS)


def record(file: Path, name: str, entry: dict[str, float]) -> None:
    """Put the entry of one model into the table in `file`, and leave the others as they are."""
    table = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    table[name] = entry
    file.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save and measure one model."""
    parser = argparse.ArgumentParser(prog="python -m qcompile.zoo.train", description="Train an embedded model.")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text; its last 10%% is held out")
    parser.add_argument("--model", choices=tuple(MODELS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory for the model's files")
    parser.add_argument("--scores", type=Path, help="JSON table in which to record the validation score")
    parser.add_argument("--steps", type=int, help="train for this many steps instead of the recipe's number")
    args = parser.parse_args(argv)

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # More would change the order of sums, and with it the result.
    recipe = MODELS[args.model][1]
    if args.steps is not None:
        recipe = replace(recipe, steps=args.steps)
    train, valid = split(args.text.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(train, POSITIONS)
    model = build(args.model, tokenizer, train, valid, recipe)
    model.to(torch.float16).save_pretrained(args.out)
    save_tokenizer(tokenizer, args.out)
    result = measure(args.out, valid)
    entry = {name: round(value, 4) for name, value in result._asdict().items()}
    print(json.dumps(entry))
    if args.scores is not None:
        record(args.scores, args.model, {**entry, "parameters": model.num_parameters()})


if __name__ == "__main__":
    main()
