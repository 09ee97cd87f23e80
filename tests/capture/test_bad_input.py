"""Whatever is wrong with a model directory is said in one line, before anything is traced; nothing is unpickled."""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_models import save
from safetensors.torch import load_file, save_file

from qcompile.capture import capture
from qcompile.errors import CaptureError


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory.mktemp("intact"), num_hidden_layers=1)


@pytest.fixture
def directory(intact: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    for file in intact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def refused(source: Any, *words: str) -> str:
    with pytest.raises(CaptureError) as caught:
        capture(source)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "does not exist")


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    refused("some-org/some-model", "some-org/some-model", "network", "local directory")


def test_hub_id_is_fetched_without_pickles(intact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        assert name == "some-org/some-model"
        assert not any("bin" in pattern or ".pt" in pattern or ".py" in pattern for pattern in allow_patterns)
        return str(intact)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert capture("some-org/some-model").info["source"] == "some-org/some-model"


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    refused(directory, "no config.json")


def test_broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")
    refused(directory, "config.json", "not readable JSON")


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    refused(directory, "no weights")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl"])
def test_pickled_weights_are_never_opened(directory: Path, name: str) -> None:
    (directory / "model.safetensors").unlink()
    mark = directory / "ran"
    (directory / name).write_bytes(pickle.dumps(Bomb(mark)))
    refused(directory, name, "pickle", "save_pretrained")
    refused(directory / name, name, "pickle")
    assert not mark.exists()


def test_files_that_are_no_model(directory: Path) -> None:
    (directory / "m.gguf").write_bytes(b"GGUF")
    refused(directory / "m.gguf", "GGUF")
    refused(directory / "model.safetensors", "config.json")
    refused(directory / "config.json", "model directory")
    (directory / "config.json").unlink()
    refused(directory, "GGUF")


def test_truncated_shard(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(directory, "model.safetensors", "truncated")
    path.write_bytes(b"\1")
    refused(directory, "truncated")


def test_corrupt_header(directory: Path) -> None:
    path = directory / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"#" + data[9:])
    refused(directory, "corrupt")
    text = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    refused(directory, "corrupt", "'w'")
    text = json.dumps({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(1))
    refused(directory, "F4")


def test_index_that_does_not_hold(directory: Path) -> None:
    names = list(load_file(directory / "model.safetensors"))
    index = directory / "model.safetensors.index.json"
    where = dict.fromkeys(names, "model.safetensors")
    for wrong, word in (
        ({**where, names[0]: "model-2.safetensors"}, "model-2.safetensors"),
        ({**where, "ghost.weight": "model.safetensors"}, "ghost.weight"),
        ({**where, names[0]: "../elsewhere.safetensors"}, "elsewhere"),
    ):
        index.write_text(json.dumps({"weight_map": wrong}))
        refused(directory, word)
    index.write_text("{}")
    refused(directory, "weight_map")


def test_weight_missing(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")
    refused(directory, "model.layers.0.mlp.up_proj.weight", "lacks")


def test_weight_of_another_shape(directory: Path) -> None:
    edit_config(directory, intermediate_size=48)
    refused(directory, "mlp", "40", "48", "do not belong together")


def test_unknown_model_type(directory: Path) -> None:
    edit_config(directory, model_type="lama")
    refused(directory, "'lama'", "did you mean 'llama'")


def test_code_of_its_own_is_not_run(directory: Path) -> None:
    edit_config(directory, model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (directory / "mine.py").write_text("raise SystemExit")
    refused(directory, "trust_remote_code", "example")


def test_quantized_already(directory: Path) -> None:
    edit_config(directory, quantization_config={"quant_method": "gptq"})
    refused(directory, "gptq")


def test_what_is_no_model() -> None:
    refused(3, "int")
    refused(torch.nn.Linear(2, 2), "example=")
