"""Captured decoders compute what transformers computes: whole, padded, in chunks, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from capture_models import CONFIGS, LENGTH, error, reference, tokens
from torch import Tensor

from qcompile.capture import capture
from qcompile.ir.program import Program
from qcompile.ir.run import fill

TOLERANCE = 1e-5
FAMILIES = sorted(CONFIGS)


def in_steps(program: Program, ids: Tensor, mask: Tensor, cuts: list[int]) -> Iterator[Tensor]:
    """Logits of each piece of `ids`, the cache passed on from one to the next."""
    past: dict[str, Tensor] = {}
    for start, end in pairwise(cuts):
        feeds = fill(program, {"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **past})
        outputs = program.run(feeds)
        past = {
            name.replace("present_", "past_key_values_"): t for name, t in outputs.items() if name.startswith("present")
        }
        yield outputs["logits"]


def left_padded(count: int = 3) -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.int64)
    mask[1, :count] = 0
    return mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "length"), [(2, LENGTH), (1, 1), (3, 5)])
def test_prefill_of_an_empty_cache(captured: Callable[[str], Any], family: str, batch: int, length: int) -> None:
    case, ids = captured(family), tokens(batch, length)
    assert error(case.program(ids), reference(case.model, ids, torch.ones_like(ids))) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cuts", [[0, 5, 9, 12], [0, 8, 9, 10, 11, 12]], ids=["chunks", "token by token"])
def test_steps_with_a_padded_row(captured: Callable[[str], Any], family: str, cuts: list[int]) -> None:
    """Twelve tokens: three times the sliding window of the models that have one."""
    case, ids, mask = captured(family), tokens(), left_padded()
    logits = torch.cat(list(in_steps(case.program, ids, mask, cuts)), 1)
    wanted = reference(case.model, ids, mask)
    assert error(logits[mask.bool()], wanted[mask.bool()]) <= TOLERANCE


@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_a_full_cache_equals_the_models_own_sliding_one(captured: Callable[[str], Any], family: str) -> None:
    case, ids = captured(family), tokens()
    steps = list(in_steps(case.program, ids, torch.ones_like(ids), [0, 6, *range(7, 13)]))
    cache, wanted = None, []
    with torch.no_grad():
        for start, end in [(0, 6), *((n, n + 1) for n in range(6, 12))]:
            out = case.model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            wanted.append(out.logits)
    assert error(torch.cat(steps, 1), torch.cat(wanted, 1)) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_text_clone_and_export_keep_the_program(captured: Callable[[str], Any], family: str) -> None:
    program, ids = captured(family).program, tokens()
    program.verify()
    logits = program(ids)
    parsed = Program.parse(str(program), program.weights.copy())
    assert str(parsed) == str(program)
    assert torch.equal(parsed(ids), logits)
    assert torch.equal(program.clone()(ids), logits)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_to_exported_runs_at_other_sizes(captured: Callable[[str], Any], family: str) -> None:
    program, ids = captured(family).program, tokens(3, 7)
    feeds = fill(program, {"input_ids": ids})
    layers = range((len(program.inputs) - 3) // 2)
    past = [(feeds[f"past_key_values_{i}_key"], feeds[f"past_key_values_{i}_value"]) for i in layers]
    exported = program.to_exported()
    logits, _ = exported.module()(ids, feeds["attention_mask"], feeds["position_ids"], past)
    assert error(logits, program(ids)) <= 1e-6
    again = capture(exported)
    assert again.output_names == program.output_names
    assert torch.equal(again(ids), program(ids))


def test_inputs_outputs_and_modules_have_their_names(captured: Callable[[str], Any]) -> None:
    program = captured("llama").program
    cache = [f"{i}_{part}" for i in range(2) for part in ("key", "value")]
    head = ["input_ids", "attention_mask", "position_ids"]
    assert [n.name for n in program.inputs] == [*head, *(f"past_key_values_{c}" for c in cache)]
    assert program.output_names == ("logits", *(f"present_{c}" for c in cache))
    types = [program.type_of(n) for n in program.inputs[1:4]]
    assert types == ["i64[batch, past + sequence]", "i64[batch, sequence]", "f32[batch, 2, past, 8]"]
    assert program.type_of(program.outputs["present_1_value"]) == "f32[batch, 2, past + sequence, 8]"
    modules = {program.module_of(n) for n in program.calls(torch.ops.aten.linear.default)}
    assert {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"} <= modules


def test_info_says_what_was_captured(captured: Callable[[str], Any]) -> None:
    case = captured("llama")
    info = case.program.info
    assert info["model_type"] == "llama"
    assert info["architecture"] == "LlamaForCausalLM"
    assert info["source"] == str(case.directory)
    assert info["tokenizer"] is None
    assert (info["dtype"], info["vocab_size"], info["max_positions"]) == ("float32", 97, 64)
    assert (info["bos_token_id"], info["eos_token_id"]) == (1, 2)
    assert info["config"]["intermediate_size"] == 40
    assert info["notes"] == []


def test_models_in_memory_share_their_tensors_and_are_left_as_they_were(captured: Callable[[str], Any]) -> None:
    case, ids = captured("qwen3_moe"), tokens()
    before = case.model.get_experts_implementation()
    case.model.train()
    program = capture(case.model)
    assert case.model.training
    assert case.model.get_experts_implementation() == before
    case.model.eval()
    assert torch.equal(program(ids), case.program(ids))
    key = "model.layers.0.mlp.experts.down_proj"
    assert program.weights[key].data_ptr() == case.model.get_parameter(key).data_ptr()
