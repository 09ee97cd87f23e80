"""How well a model predicts held-out text, in nats per character.

Per character rather than per token, because that number does not depend on the tokenizer: 1.6 nats per character is a
perplexity of 4.95 among characters, whatever the tokens are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from qcompile.zoo.tokenizer import BOS


class Score(NamedTuple):
    """Mean loss of a text in nats per token and per character, and over how many of each."""

    nats_per_token: float
    nats_per_char: float
    tokens: int
    chars: int


def split(text: str, held_out: float = 0.1) -> tuple[str, str]:
    """Split into the text for training and, from its end, the text for validation.

    >>> split("abcdefghij")
    ('abcdefghi', 'j')
    """
    cut = len(text) - round(len(text) * held_out)
    return text[:cut], text[cut:]


def windows(ids: torch.Tensor, starts: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut inputs and targets, both ``[len(starts), length]``; every window of `ids` is a text of its own after ``<s>``.

    >>> inputs, targets = windows(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 2]), 2)
    >>> inputs.tolist(), targets.tolist()
    ([[1, 5], [1, 7]], [[5, 6], [7, 8]])
    """
    targets = ids[starts[:, None] + torch.arange(length)]
    first = torch.full((len(starts), 1), BOS, dtype=targets.dtype)
    return torch.cat([first, targets[:, :-1]], dim=1), targets


@torch.no_grad()
def score(model: PreTrainedModel, ids: torch.Tensor, chars: int, length: int, batch: int = 32) -> Score:
    """Predict every token of `ids` (``[tokens]``, without ``<s>``) once, in windows of `length` tokens.

    `chars` is the number of characters that `ids` encode.
    """
    model.eval()
    total = 0.0
    whole = len(ids) // length * length
    firsts = torch.arange(0, whole, length)
    pieces = [windows(ids, firsts[at : at + batch], length) for at in range(0, len(firsts), batch)]
    if whole < len(ids):
        pieces.append(windows(ids, torch.tensor([whole]), len(ids) - whole))
    for inputs, targets in pieces:
        logits = model(input_ids=inputs, use_cache=False).logits
        total += float(functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"))
    return Score(total / len(ids), total / chars, len(ids), chars)
