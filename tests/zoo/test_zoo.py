"""The embedded models: complete, small, trained, and of the shapes that quantization needs."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    MixtralForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from qcompile import zoo
from qcompile.zoo import configs, score, train
from qcompile.zoo.tokenizer import train_tokenizer

CLASSES: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "opt": OPTForCausalLM,
    "moe": MixtralForCausalLM,
}
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
PROMPT = "First Citizen:\nWe are "
TEXTS = [
    "First Citizen:\nBefore we proceed any further, hear me speak.\n",
    "  two spaces,\ta tab,\r\nand don 't touch , the commas .  ",
    "naïve Straße 世界 🙂 \x00\x7f",
    "special <s> tokens </s> are <unk> ordinary characters",
    "",
]


@pytest.fixture(scope="module", params=zoo.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Run a test for every embedded model."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(name: str) -> PreTrainedModel:
    """Load an embedded model as a user would, in float32."""
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(zoo.path(name), dtype=torch.float32)
    return loaded.eval()


@pytest.fixture(scope="module")
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of an embedded model as a user would."""
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(zoo.path(name))
    return loaded


@pytest.fixture(scope="module")
def weights(name: str) -> dict[str, torch.Tensor]:
    """Read the tensors as they are on disk."""
    tensors: dict[str, torch.Tensor] = load_file(zoo.path(name) / "model.safetensors")
    return tensors


def test_files_are_complete_and_small(name: str) -> None:
    files = list(zoo.path(name).iterdir())
    assert {file.name for file in files} == FILES
    assert sum(file.stat().st_size for file in files) <= 3_000_000


def test_class_and_dtype(name: str, model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    assert type(model) is CLASSES[name]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert json.loads((zoo.path(name) / "config.json").read_text())["dtype"] == "float16"


def test_config_is_the_one_that_the_script_trains(name: str, model: PreTrainedModel) -> None:
    wanted, saved = configs.MODELS[name][0]().to_dict(), model.config.to_dict()
    changed = {key for key, value in wanted.items() if saved[key] != value}
    assert changed <= {"architectures", "dtype", "transformers_version", "_name_or_path"}


def test_head_is_tied_in_opt_only(name: str, model: PreTrainedModel) -> None:
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name == "opt")


def test_reduced_widths_are_multiples_of_128(weights: dict[str, torch.Tensor]) -> None:
    widths = {key: tensor.shape[-1] for key, tensor in weights.items() if tensor.ndim > 1}
    assert widths
    assert not {key: width for key, width in widths.items() if width % 128}


def test_gains_and_biases_are_trained(weights: dict[str, torch.Tensor]) -> None:
    vectors = {key: tensor.float() for key, tensor in weights.items() if tensor.ndim == 1}
    assert vectors
    # The bias of the keys adds the same to all scores of a query, so training hardly moves it.
    still = {key for key, value in vectors.items() if value.std() < 1e-3 and "k_proj.bias" not in key}
    assert not still


def test_every_position_and_start_token_is_trained(name: str, weights: dict[str, torch.Tensor]) -> None:
    if name == "opt":
        assert weights["model.decoder.embed_positions.weight"].norm(dim=1)[2:].min() > 0.1
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_is_lossless(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text)
    assert (ids[0], ids.count(1), ids.count(0)) == (tokenizer.bos_token_id, 1, 0)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 512
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert isinstance(tokenizer, PreTrainedTokenizerFast)


def test_greedy_generation_is_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert text.startswith(PROMPT)
    words = [word.strip(".,:;!?'-").lower() for word in text[len(PROMPT) :].split()]
    assert len(words) > 5
    assert set(words) & {"the", "to", "i", "and", "of", "my", "you", "is", "a", "not", "with", "in"}


def test_predicts_its_kind_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    text = "DUKE:\nWhat say you, sir? The king is dead, and I must to the castle with my lord.\n\n"
    ids = train.encode(tokenizer, text)
    assert score.score(model, ids, len(text), configs.POSITIONS).nats_per_char < 2.2


def test_recorded_scores(name: str, model: PreTrainedModel) -> None:
    table = json.loads((Path(zoo.__file__).parent / "scores.json").read_text())
    assert set(table) == set(zoo.NAMES)
    entry = table[name]
    assert 1.0 < entry["nats_per_char"] < 1.8
    assert entry["nats_per_token"] * entry["tokens"] == pytest.approx(entry["nats_per_char"] * entry["chars"], rel=1e-3)
    assert entry["parameters"] == model.num_parameters() < 1_500_000


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="there are: llama, opt, moe"):
        zoo.path("gpt")


def test_doctests() -> None:
    for module in (zoo, score):
        result = doctest.testmod(module)
        assert result.attempted > 0
        assert result.failed == 0


def test_import_is_light() -> None:
    code = "import sys, qcompile.zoo as zoo; zoo.path(); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_training_is_deterministic() -> None:
    text = "".join(f"{word} goes to the market. " for word in ("Anna", "Bruno", "Clara", "Dario")) * 40
    learned = train_tokenizer(text, configs.POSITIONS)
    recipe = configs.Recipe(steps=3, batch=1, warmup=1, eval_every=3)
    first, second = (train.build("llama", learned, text, text[:200], recipe).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
