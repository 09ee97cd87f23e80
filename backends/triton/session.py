"""Prefill and decode with shapes that stay, so that a decode step can be a CUDA graph.

The graph of a model joins its cache with the new token, so each step's cache is one longer. Here the cache has `room`
tokens from the start, those not yet written at its left, where the mask hides them as it hides a padded prompt:

    past [room]  ─ step ─▶  present [room + 1]  ─ drop the leftmost, which is padding ─▶  past [room]

Any model that takes a mask and positions takes this, and gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.triton.runtime import TritonRunner
from qcompile.errors import QCompileError
from qcompile.ir.run import fill_inputs
from qcompile.ir.state import past_name

_TOKENS = 2  # axis of a cache [batch, heads, tokens, features]


class Session:
    """A stepper over a bundle: the first call is the prefill, each later one a token.

    Args:
        runner: the bundle.
        room: tokens that the cache can hold, prompt included.
        fixed: keep shapes from step to step; by default where there is a GPU and the model takes mask and positions.
    """

    def __init__(self, runner: TritonRunner, room: int, fixed: bool | None = None) -> None:
        self.runner, self.room = runner, room
        takes = {"attention_mask", "position_ids"} <= set(runner.inputs) and any(map(_is_past, runner.inputs))
        if fixed and not takes:
            raise QCompileError("the model takes no mask or positions: steps of one shape cannot be had; fixed=False")
        self.fixed = (takes and runner.device.type == "cuda") if fixed is None else fixed
        self._static: dict[str, Tensor] = {}
        self._captured: tuple[Any, dict[str, Tensor]] | None = None

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Start with prompts int64 ``[batch, prompt]``; logits ``[batch, vocabulary]`` behind their last token."""
        feeds = {"input_ids": input_ids} | ({} if attention_mask is None else {"attention_mask": attention_mask})
        return self(feeds)["logits"][:, -1]

    def decode(self, tokens: Tensor) -> Tensor:
        """Go on with a token a row, int64 ``[batch]``; logits ``[batch, vocabulary]``.

        Raises QCompileError before `prefill`, and where the room is used up.
        """
        if not self._static:
            raise QCompileError("decode needs a prefill first")
        return self._step(tokens[:, None])["logits"][:, -1]

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step of `qcompile.generate`: states that it feeds back are those that are kept here."""
        if self._static and any(map(_is_past, feeds)):
            return self._step(feeds["input_ids"])
        if not self.fixed:
            return self.runner(feeds)
        home = feeds["input_ids"].device
        taken = {n: t.to(self.runner.device) for n, t in feeds.items() if n in self.runner.inputs}
        filled = fill_inputs(self.runner.inputs, taken)
        outputs = self.runner.run_there(filled)
        self._keep(filled, outputs)
        return {n: t.to(home) if n == "logits" else t for n, t in outputs.items()}

    def _keep(self, feeds: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Lay the cache of a prefill to the right of a room of zeros."""
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        if ids.shape[1] > self.room:
            raise QCompileError(f"a prompt of {ids.shape[1]} tokens does not fit a room of {self.room}; give more room")
        self._static = {
            "input_ids": ids[:, -1:].clone(),
            "attention_mask": torch.cat([_behind(mask, self.room, 1), torch.ones_like(mask[:, :1])], 1),
            "position_ids": mask.sum(1, keepdim=True) - 1,
        }
        self.free = self.room - ids.shape[1]
        for name, tensor in outputs.items():
            if (past := past_name(name)) is not None:
                self._static[past] = _behind(tensor, self.room, _TOKENS)
        self._captured = None

    def _step(self, ids: Tensor) -> dict[str, Tensor]:
        if self.free < 1:
            raise QCompileError(f"the room for {self.room} tokens is used up; make a session with more room")
        self.free -= 1
        static = self._static
        static["input_ids"].copy_(ids)
        outputs = self._replay() if self.runner.device.type == "cuda" else self._advance()
        return {n: t.to(ids.device) if n == "logits" else t for n, t in outputs.items()}

    def _advance(self) -> dict[str, Tensor]:
        """One step on the tensors that are kept; they end as the next step needs them."""
        static = self._static
        static["position_ids"].add_(1)
        outputs = self.runner.run_there({name: static[name] for name in self.runner.inputs})
        for name, tensor in outputs.items():
            if (past := past_name(name)) is not None:
                static[past].copy_(tensor.narrow(_TOKENS, 1, self.room))
        static["attention_mask"][:, :-1].copy_(static["attention_mask"][:, 1:].clone())
        return outputs

    def _replay(self) -> dict[str, Tensor]:
        """The step as a CUDA graph: run once to load kernels, captured from a copy of the state, replayed from then
        on."""
        if self._captured is None:
            before = {name: tensor.clone() for name, tensor in self._static.items()}
            self._advance()
            torch.cuda.synchronize()
            self._restore(before)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self._advance()
            self._restore(before)
            self._captured = graph, outputs
        graph, outputs = self._captured
        graph.replay()
        return {name: tensor.clone() if name == "logits" else tensor for name, tensor in outputs.items()}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in state.items():
            self._static[name].copy_(tensor)


def _is_past(name: str) -> bool:
    return name.startswith("past_key_values_")


def _behind(tensor: Tensor, room: int, axis: int) -> Tensor:
    """`tensor` as the end of zeros that are `room` long along `axis`."""
    shape = list(tensor.shape)
    shape[axis] = room - shape[axis]
    return torch.cat([tensor.new_zeros(shape), tensor], axis)
