"""The main job: a trained model in, a quantized ONNX artifact that runs and agrees, out.

Every preset on every embedded model; on real models where they are at hand.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile import zoo
from qcompile.artifact import WEIGHT_ONLY_TOLERANCE
from qcompile.data import load_tokenizer
from qcompile.manifest import Manifest
from qcompile.recipe import Recipe

PRESETS = ["int4-g128", "int8-dynamic", "int8-static", "int4-int8dynamic"]
DATA = Path(os.environ.get("QCOMPILE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
SHARED: dict[str, list[str]] = {
    # group 32 divides this model's widths
    "babyllama-105": ["weights.group=32"],
    # width 64 and FFN width 172: a rule gives what reads the FFN one scale a channel
    "stories260K": ["weights.group=32", 'rules=[{match: "model.layers.*.mlp.down_proj", weights: int4 sym channel}]'],
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_embedded(name: str, preset: str, tmp_path: Path) -> None:
    check(zoo.path(name), preset, [], tmp_path)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SHARED)
def test_real(name: str, preset: str, tmp_path: Path) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not at hand (set QCOMPILE_TEST_DATA)")
    check(DATA / name, preset, SHARED[name] if preset.startswith("int4") else [], tmp_path)


def check(model: Path, preset: str, overrides: list[str], tmp_path: Path) -> None:
    compiled = qcompile.compile(model, preset, overrides=[*overrides, "calibration.samples=8", "calibration.length=64"])
    artifact = compiled.export("onnx_qcdq", tmp_path / "out")
    manifest = artifact.manifest
    assert manifest.agreement is not None
    if Recipe.load(preset).activations is None:
        assert manifest.agreement.max_relative_error <= WEIGHT_ONLY_TOLERANCE
    assert manifest.quantized_bits_per_weight is not None
    assert manifest.quantized_bits_per_weight <= (5.1 if "int4" in preset else 8.6)
    prompt = text_prompt(compiled)
    ours, theirs = compiled.generate(prompt, 32), artifact.generate(prompt, 32)
    assert ours.shape[1] == prompt.shape[1] + 32
    if Recipe.load(preset).activations is None:
        assert torch.equal(ours, theirs)
    else:
        assert_same_or_tied(compiled, artifact, ours, theirs)
    assert qcompile.verify(tmp_path / "out").manifest == Manifest.read(tmp_path / "out")


def text_prompt(compiled: qcompile.CompiledModel) -> torch.Tensor:
    info = compiled.program.info
    ids = list(load_tokenizer(info["tokenizer"]).encode("Once upon a time, there was a").ids)
    return torch.tensor([[int(info["bos_token_id"]), *ids]])


def assert_same_or_tied(compiled: Any, artifact: Any, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Greedy tokens are the same, or part where the Program itself is undecided.

    Two runtimes sum in another order; an activation that lies on the edge between two codes may be rounded the other
    way, which moves the logits by up to a percent. Tokens may part only where the Program's two likeliest are nearer
    than that.
    """
    differs = (ours != theirs)[0].nonzero()
    if len(differs) == 0:
        return
    step = int(differs[0])
    prefix = ours[:, :step]
    mine, other = compiled(input_ids=prefix)[0, -1], artifact.run(prefix)[0, -1]
    moved = float((mine - other).abs().max())
    margin = float(mine[ours[0, step]] - mine[theirs[0, step]])
    assert margin <= 2 * moved, f"step {step}: margin {margin}, logits moved by {moved}"
    assert moved <= 0.05 * float(mine.abs().max())


def test_batches_and_lengths_are_dynamic(tmp_path: Path) -> None:
    compiled = qcompile.compile(zoo.path("llama"))
    artifact = compiled.export("onnx_qcdq", tmp_path / "out")
    for batch, length in ((1, 1), (3, 2), (2, 33)):
        ids = torch.randint(0, 512, (batch, length), generator=torch.Generator().manual_seed(batch))
        theirs, ours = artifact.run(ids), compiled(input_ids=ids)
        assert theirs.shape == ours.shape
        assert float((theirs - ours).abs().max() / ours.abs().max()) <= WEIGHT_ONLY_TOLERANCE


def test_save_and_load_give_the_same_codes(tmp_path: Path) -> None:
    compiled = qcompile.compile(zoo.path("moe"), "int4-g128")
    compiled.save(tmp_path / "saved")
    loaded = qcompile.load(tmp_path / "saved")
    assert str(loaded.recipe) == str(compiled.recipe)
    assert set(loaded.program.weights) == set(compiled.program.weights)
    for key in compiled.program.weights:
        assert torch.equal(loaded.program.weights[key], compiled.program.weights[key]), key
    ids = torch.arange(5)[None]
    assert torch.equal(loaded(input_ids=ids), compiled(input_ids=ids))
    manifest = qcompile.verify(tmp_path / "saved").manifest
    assert manifest.quantized_bits_per_weight == pytest.approx(4.25)  # 4 bits a code, a float32 scale for 128 codes
    assert 4.25 < manifest.bits_per_weight < 32
    assert {t.container for t in manifest.tensors.values()} == {"i4", "f32"}


def test_the_same_inputs_give_the_same_artifact(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        artifact = qcompile.compile(zoo.path("opt"), "int8-static").export("onnx_qcdq", tmp_path / name)
        files.append({n: f.sha256 for n, f in artifact.manifest.files.items()})
    assert files[0] == files[1]


def test_a_runtime_that_disagrees_fails_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.backends.onnx_qcdq import OnnxQcdqBackend
    from qcompile.backends.onnx_qcdq.runtime import OnnxRunner
    from qcompile.errors import ArtifactError

    honest = OnnxRunner.run

    def wrong(self: OnnxRunner, feeds: Any) -> Any:
        return {name: 1.01 * tensor for name, tensor in honest(self, feeds).items()}

    monkeypatch.setattr(OnnxRunner, "run", wrong)
    with pytest.raises(ArtifactError, match="onnxruntime disagrees with the Program"):
        qcompile.compile(zoo.path("llama")).export(OnnxQcdqBackend.name, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
