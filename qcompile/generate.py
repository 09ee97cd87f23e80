"""Text generation with a key-value cache: one loop for a `Program`, an ONNX session and anything else that steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.state import past_name

CACHED_BELOW = 4 << 30
"""Bytes of weights up to which a model that is run over and over is kept in memory; a larger one is read each time."""


Stepper = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""One step of a causal language model.

It is fed ``input_ids`` int64 ``[batch, sequence]``, ``attention_mask`` int64 ``[batch, past + sequence]``,
``position_ids`` int64 ``[batch, sequence]`` and, from the second step on, ``past_key_values_{i}_key`` and ``…_value``;
it leaves those that its model does not take. It returns ``logits`` ``[batch, sequence, vocabulary]`` and, where the
model has a cache, every ``present_{i}_key`` and ``…_value``, with ``…_scale`` and the like behind one that holds codes:
each ``present_…`` is fed back as ``past_key_values_…``.
"""


@dataclass(frozen=True, eq=False)
class ProgramStepper:
    """A `Program` as a stepper."""

    program: Program

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for; None where it does not say."""
        limit = self.program.info.get("max_positions")
        return None if limit is None else int(limit)

    def __call__(self, feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """One step; inputs that the program does not take are left."""
        from qcompile.ir.run import fill

        taken = {node.name for node in self.program.inputs}
        return self.program.run(fill(self.program, {k: v for k, v in feeds.items() if k in taken}))


@contextmanager
def held_weights(program: Program) -> Iterator[None]:
    """Keep the weights that are read until the block ends, where all of them fit in `CACHED_BELOW` bytes."""
    if sum(program.weights.nbytes(key) for key in program.weights) > CACHED_BELOW:
        yield
        return
    with program.weights.caching():
        yield


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: draw among this many of the likeliest tokens.
        top_p: draw among the fewest likeliest tokens that have this probability together (nucleus sampling,
            Holtzman et al. 2020).

    Raises QCompileError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise QCompileError(f"temperature is {self.temperature}; give 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise QCompileError(f"top_k is {self.top_k}; give 1 or more, or None for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise QCompileError(f"top_p is {self.top_p}; give a probability over 0 and at most 1, or None")

    def choose(self, logits: Tensor, uniform: Tensor) -> Tensor:
        """The next tokens int64 ``[batch]`` for logits ``[batch, vocabulary]`` and uniform draws float64 ``[batch]``.

        Tokens are drawn by inverting the cumulative distribution, so a row depends on its own draw only.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        scaled, order = (logits.double() / self.temperature).sort(dim=-1, descending=True, stable=True)
        probability = scaled.softmax(-1)
        if self.top_k is not None:
            probability[:, self.top_k :] = 0
        if self.top_p is not None:
            before = probability.cumsum(-1) - probability
            probability[before >= self.top_p * probability.sum(-1, keepdim=True)] = 0
        cumulative = probability.cumsum(-1)
        drawn = torch.searchsorted(cumulative, (uniform[:, None] * cumulative[:, -1:]), right=True)
        last = (probability > 0).sum(-1, keepdim=True) - 1  # rounding must not choose a token that is left out
        tokens: Tensor = order.gather(-1, drawn.minimum(last))[:, 0]
        return tokens


class Decoding:
    """The state of a batch that is being decoded: its cache, or all of its tokens where the model has no cache."""

    def __init__(self, step: Stepper, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        self.step = step
        self.ids = input_ids
        self.mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.cache: dict[str, Tensor] = {}

    def logits(self) -> Tensor:
        """Logits ``[batch, vocabulary]`` of the token that comes next."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        feeds = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": positions, **self.cache}
        outputs = self.step(feeds)
        if "logits" not in outputs:
            raise QCompileError(
                f"the model returns {list(outputs)}, no 'logits': only a causal language model generates"
            )
        named = ((past_name(name), tensor) for name, tensor in outputs.items())
        self.cache = {past: tensor for past, tensor in named if past is not None}
        return outputs["logits"][:, -1]

    def append(self, tokens: Tensor) -> None:
        """Go on with one more token a row, int64 ``[batch]``."""
        column = tokens[:, None]
        self.ids = column if self.cache else torch.cat([self.ids, column], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(column)], dim=1)


@torch.no_grad()
def generate(
    step: Stepper,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    max_positions: int | None = None,
) -> Tensor:
    """Continue prompts; deterministic for a seed.

    Args:
        step: the model.
        input_ids: the prompts, int64 ``[batch, prompt]``; shorter ones padded on the left.
        max_new_tokens: how many tokens to add at most.
        temperature, top_k, top_p: see `Sampling`; greedy by default.
        eos_token_id: the token, or tokens, that end a row. An ended row is filled with the (first) one until all are.
        attention_mask: int64 ``[batch, prompt]``, 0 where a prompt is padded; all ones if None.
        max_positions: tokens the model has positions for; what `step` itself says (`ProgramStepper` does) if None.

    Returns:
        int64 ``[batch, prompt + new]``, where new is `max_new_tokens` or less if every row ended before.

    Raises:
        QCompileError: an empty prompt, padding on the right, or more tokens than the model has positions for.
    """
    limit = max_positions if max_positions is not None else getattr(step, "max_positions", None)
    _check(input_ids, max_new_tokens, attention_mask, limit)
    sampling = Sampling(temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    ends = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    decoding, tokens = Decoding(step, input_ids, attention_mask), [input_ids]
    for index in range(max_new_tokens):
        if index:
            decoding.append(tokens[-1][:, 0])
        logits = decoding.logits()
        uniform = torch.rand(len(input_ids), generator=generator, dtype=torch.float64).to(logits.device)
        chosen = sampling.choose(logits, uniform)
        if ends:
            chosen = torch.where(ended, ends[0], chosen)
            ended |= torch.isin(chosen, torch.tensor(ends, device=chosen.device))
        tokens.append(chosen[:, None])
        if bool(ended.all()):
            break
    return torch.cat(tokens, dim=1)


def _check(input_ids: Tensor, new: int, mask: Tensor | None, limit: int | None) -> None:
    if input_ids.ndim != 2 or input_ids.numel() == 0:
        raise QCompileError(f"the prompt has shape {list(input_ids.shape)}; give at least one token as [batch, prompt]")
    if new < 0:
        raise QCompileError(f"max_new_tokens is {new}; give 0 or more")
    prompt = input_ids.shape[1]
    if limit is not None and prompt > limit:
        raise QCompileError(f"the prompt has {prompt} tokens and the model positions for {limit}; shorten the prompt")
    if limit is not None and prompt + new > limit:
        raise QCompileError(
            f"{prompt} tokens of prompt and {new} new ones exceed the model's {limit} positions; "
            f"ask for at most {limit - prompt} new tokens"
        )
    if mask is None:
        return
    if mask.shape != input_ids.shape:
        raise QCompileError(f"attention_mask is {list(mask.shape)}, input_ids {list(input_ids.shape)}; make them alike")
    if bool((mask.diff(dim=1) < 0).any()) or not bool(mask[:, -1].all()):
        raise QCompileError(
            "attention_mask ends in 0 or has a gap: pad prompts on the left, and give none that is empty"
        )
