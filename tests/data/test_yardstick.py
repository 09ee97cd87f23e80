"""Trained models, where their files are at hand: figures known beforehand, and transformers' own text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qcompile.data import load_batches, load_passages
from qcompile.evaluate import Measure, evaluate
from qcompile.generate import ProgramStepper, generate
from qcompile.ir.program import Program

DATA = Path(os.environ.get("QCOMPILE_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")
STORIES = DATA / "text" / "tinystories.jsonl"
PERPLEXITY = {"babyllama-105": 1.854, "stories260K": 3.654}  # per token, first 60 stories

pytestmark = pytest.mark.skipif(not STORIES.is_file(), reason="the trained models are not at hand")


@pytest.fixture(scope="module")
def program() -> Program:
    from qcompile.capture import capture

    return capture(DATA / "babyllama-105")


@pytest.mark.parametrize("name", list(PERPLEXITY))
def test_perplexity_of_the_first_stories(name: str) -> None:
    """Each story by itself behind the token that begins a text, cut to the context, which counts that token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DATA / name)
    context = model.config.max_position_embeddings
    stories = load_passages(STORIES, DATA / name, context, mode="documents", limit=60)
    result = evaluate(model, data=stories)
    assert round(result.perplexity, 3) == PERPLEXITY[name]
    assert result.sequences == 60


def test_a_program_is_its_model(program: Program) -> None:
    from transformers import AutoModelForCausalLM

    stories = load_passages(STORIES, mode="documents", limit=8, program=program)
    result = evaluate(program, AutoModelForCausalLM.from_pretrained(DATA / "babyllama-105"), data=stories)
    assert result.kl is not None
    assert abs(result.kl.mean) < 1e-9
    assert result.top1 == Measure(1.0, 0.0)


def test_characters_are_those_of_the_text(program: Program) -> None:
    stories = load_passages(STORIES, mode="documents", limit=60, program=program)
    assert stories.characters == 60 * 254  # of the 256 tokens, one is <s> and one the space that is put in front


def test_greedy_text_is_what_transformers_writes(program: Program) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DATA / "babyllama-105")
    stories = load_passages(STORIES, mode="documents", limit=3, program=program)
    prompt = torch.stack([ids[:20] for ids in stories.sequences])
    mask = torch.ones_like(prompt)
    mask[1, :5], mask[2, :11] = 0, 0
    expected = model.generate(prompt, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=2)
    mine = generate(ProgramStepper(program), prompt, 30, eos_token_id=2, attention_mask=mask)
    assert torch.equal(mine, expected)


def test_a_model_knows_its_own_text(program: Program, tmp_path: Path) -> None:
    written = load_batches("generated", samples=16, length=48, program=program, cache_folder=tmp_path)
    noise = torch.randint(3, program.info["vocab_size"], (16, 48), generator=torch.Generator().manual_seed(0))
    assert evaluate(program, data=written).perplexity < 4 < 50 < evaluate(program, data=noise).perplexity
