"""Generation: the loop on a model small enough to follow by hand, and on a Llama against transformers' own."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.generate import Decoding, ProgramStepper, Sampling, generate, held_weights
from qcompile.ir.program import Program

BIGRAM = """def main(input_ids: i64[batch, sequence], *, table: f32[6, 6]):
    logits = aten.embedding.default(table, input_ids)
    return {"logits": logits}"""


def bigram(table: Tensor, **info: object) -> ProgramStepper:
    """A model whose next token depends on the last one only; it has no cache."""
    program = Program.parse(BIGRAM, {"table": table})
    program.info.update(info)
    return ProgramStepper(program)


def cycle() -> Tensor:
    """After token i, token i + 1 is the likeliest."""
    return 3 * torch.eye(6).roll(1, dims=1)


def test_greedy_follows_the_likeliest() -> None:
    out = generate(bigram(cycle()), torch.tensor([[0], [4]]), 3)
    assert out.tolist() == [[0, 1, 2, 3], [4, 5, 0, 1]]


def test_nothing_new_is_the_prompt() -> None:
    prompt = torch.tensor([[3, 2]])
    assert torch.equal(generate(bigram(cycle()), prompt, 0), prompt)


def test_an_ended_row_is_filled_until_all_have_ended() -> None:
    out = generate(bigram(cycle()), torch.tensor([[0], [3]]), 5, eos_token_id=[4, 5])
    assert out.tolist() == [[0, 1, 2, 3, 4], [3, 4, 4, 4, 4]]


def test_sampling_has_the_distribution_of_the_logits() -> None:
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    prompt = torch.full((20_000, 1), 2)
    drawn = generate(bigram(table), prompt, 1, temperature=0.7, seed=3)[:, 1]
    share = torch.bincount(drawn, minlength=6) / len(prompt)
    assert torch.allclose(share, (table[2] / 0.7).softmax(-1), atol=0.012)


def test_a_seed_repeats_and_another_differs() -> None:
    step, prompt = bigram(torch.zeros(6, 6)), torch.zeros(2, 1, dtype=torch.int64)
    first = generate(step, prompt, 20, temperature=1.0, seed=5)
    assert torch.equal(first, generate(step, prompt, 20, temperature=1.0, seed=5))
    assert not torch.equal(first, generate(step, prompt, 20, temperature=1.0, seed=6))
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0, top_k=1), {5}),
        (Sampling(1.0, top_k=2), {4, 5}),
        (Sampling(1.0, top_p=0.25), {5}),
        (Sampling(1.0, top_p=0.7), {3, 4, 5}),  # 5: 6/21, 4: 5/21, 3: 4/21: the third passes 0.7
        (Sampling(1.0, top_k=4, top_p=0.999), {2, 3, 4, 5}),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(sampling: Sampling, kept: set[int]) -> None:
    logits = torch.arange(1, 7).double().log().expand(1001, 6)
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)  # both ends: 1.0 itself must not fall off
    assert set(sampling.choose(logits, uniform).tolist()) == kept


def test_the_cache_comes_back_and_positions_go_on() -> None:
    seen: list[dict[str, list[int]]] = []

    def step(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        seen.append({name: tensor.flatten().tolist() for name, tensor in feeds.items()})
        past = feeds.get("past_key_values_0_key", torch.zeros(1, 0))
        logits = torch.nn.functional.one_hot((feeds["input_ids"] + 1) % 6, 6).float()
        return {"logits": logits, "present_0_key": torch.cat([past, feeds["input_ids"].float()], 1)}

    mask = torch.tensor([[0, 1, 1]])
    assert generate(step, torch.tensor([[0, 2, 3]]), 3, attention_mask=mask).tolist() == [[0, 2, 3, 4, 5, 0]]
    assert seen == [
        {"input_ids": [0, 2, 3], "attention_mask": [0, 1, 1], "position_ids": [0, 0, 1]},
        {
            "input_ids": [4],
            "attention_mask": [0, 1, 1, 1],
            "position_ids": [2],
            "past_key_values_0_key": [0.0, 2.0, 3.0],
        },
        {
            "input_ids": [5],
            "attention_mask": [0, 1, 1, 1, 1],
            "position_ids": [3],
            "past_key_values_0_key": [0.0, 2.0, 3.0, 4.0],
        },
    ]


@pytest.mark.parametrize(
    ("prompt", "new", "mask", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), 1, None, r"shape \[1, 0\]; give at least one token"),
        (torch.zeros(3, dtype=torch.int64), 1, None, "at least one token"),
        (torch.zeros(1, 9, dtype=torch.int64), 1, None, "prompt has 9 tokens and the model positions for 8"),
        (torch.zeros(1, 6, dtype=torch.int64), 3, None, "6 tokens of prompt and 3 new .* 8 positions; .* at most 2"),
        (torch.zeros(1, 2, dtype=torch.int64), -1, None, "max_new_tokens is -1"),
        (torch.zeros(1, 3, dtype=torch.int64), 1, torch.tensor([[1, 1, 0]]), "pad prompts on the left"),
        (torch.zeros(1, 3, dtype=torch.int64), 1, torch.tensor([[1, 0, 1]]), "pad prompts on the left"),
        (torch.zeros(1, 3, dtype=torch.int64), 1, torch.ones(1, 2), r"attention_mask is \[1, 2\]"),
    ],
)
def test_what_cannot_be_continued_is_refused(prompt: Tensor, new: int, mask: Tensor | None, message: str) -> None:
    with pytest.raises(QCompileError, match=message):
        generate(bigram(cycle(), max_positions=8), prompt, new, attention_mask=mask)


def test_positions_may_be_said_by_the_caller() -> None:
    with pytest.raises(QCompileError, match="3 positions"):
        generate(lambda feeds: feeds, torch.zeros(1, 3, dtype=torch.int64), 1, max_positions=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"temperature": -1.0}, "temperature is -1"), ({"top_k": 0}, "top_k is 0"), ({"top_p": 1.5}, "top_p is 1.5")],
)
def test_sampling_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(QCompileError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def test_a_model_without_logits_is_refused() -> None:
    with pytest.raises(QCompileError, match="no 'logits'"):
        Decoding(lambda feeds: {"hidden": feeds["input_ids"]}, torch.zeros(1, 1, dtype=torch.int64)).logits()


def test_weights_are_held_only_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    program = bigram(cycle()).program
    reads = []
    program.weights.edit("table", lambda t: reads.append(1) or t)
    for limit, expected in ((1 << 20, 1), (10, 2)):
        monkeypatch.setattr("qcompile.generate.CACHED_BELOW", limit)
        reads.clear()
        with held_weights(program):
            program(torch.zeros(1, 1, dtype=torch.int64))
            program(torch.zeros(1, 1, dtype=torch.int64))
        assert len(reads) == expected


def test_greedy_is_exactly_what_transformers_generates() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from qcompile.capture import capture

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(0.5, 1.5)
    step = ProgramStepper(capture(model))
    prompt = torch.randint(3, 48, (3, 7))
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [0] * 6 + [1]])
    for padding in (torch.ones_like(mask), mask):
        expected = model.generate(prompt, attention_mask=padding, max_new_tokens=24, do_sample=False, pad_token_id=2)
        mine = generate(step, prompt, 24, eos_token_id=2, attention_mask=padding)
        assert torch.equal(mine, expected)
        assert len(set(mine[0, 7:].tolist())) > 4  # a model stuck on one token would prove little
