"""Bundles: written, loaded, verified, run; and everything that can be wrong with one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile import zoo
from qcompile.artifact import Artifact, export_program
from qcompile.backend_base import make_backend
from qcompile.backends.triton import launch
from qcompile.backends.triton.backend import TritonBackend
from qcompile.backends.triton.bundle import Bundle
from qcompile.backends.triton.launcher import best_target, load_sources
from qcompile.backends.triton.runtime import TritonRunner, check_memory
from qcompile.backends.triton.session import Session
from qcompile.errors import ArtifactError, LoweringError, QCompileError, RecipeError
from qcompile.generate import generate
from qcompile.ir.program import Program

IDS = torch.tensor([[1, 40, 41, 5], [7, 2, 9, 3]])
TEXT = """\
def main(x: f32[batch, 64], *, w: f32[48, 64], u: f32[16, 48]):
    y = aten.linear.default(x, w)
    z = aten.linear.default(y, u)
    return {"z": z}"""

pytestmark = pytest.mark.usefixtures("triton")


def program(passes: str = "insert-qdq(weights=int4 group=16), rtn") -> Program:
    made = Program.parse(TEXT)
    qcompile.run_passes(made, passes)
    return made


def export(directory: Path, **options: Any) -> Artifact:
    return export_program(program(), directory, TritonBackend(**{"gpu": "none", **options}), {})


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("bundle") / "small").directory


@pytest.fixture
def copied(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[qcompile.CompiledModel, Artifact]:
    model = qcompile.compile(zoo.path("llama"), recipe="int4-g128", overrides=["kv_cache=int8 sym token dynamic"])
    return model, model.export("triton", tmp_path_factory.mktemp("bundle") / "llama", {"gpu": "none"})


def test_a_model_runs_and_generates_as_its_program(llama: tuple[qcompile.CompiledModel, Artifact]) -> None:
    model, artifact = llama
    assert artifact.manifest.agreement is not None
    assert artifact.manifest.agreement.max_relative_error < 1e-3
    assert torch.equal(artifact.generate(IDS, 6), model.generate(IDS, 6))
    assert qcompile.verify(artifact.directory).manifest.target == "triton"


@pytest.mark.parametrize("fixed", [False, True])
def test_steps_of_one_shape_give_the_same_tokens(llama: tuple[qcompile.CompiledModel, Artifact], fixed: bool) -> None:
    _model, artifact = llama
    runner = artifact.runner
    assert isinstance(runner, TritonRunner)
    session = Session(runner, room=12, fixed=fixed)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    expected = generate(artifact.run_named, IDS, 6, attention_mask=mask)
    assert torch.equal(generate(session, IDS, 6, attention_mask=mask), expected)


def test_prefill_and_decode_are_steps_of_generation(llama: tuple[qcompile.CompiledModel, Artifact]) -> None:
    model, artifact = llama
    assert isinstance(artifact.runner, TritonRunner)
    session = Session(artifact.runner, room=6, fixed=True)
    first = session.prefill(IDS)
    tokens = [first.argmax(-1)]
    for _ in range(2):
        tokens.append(session.decode(tokens[-1]).argmax(-1))
    assert torch.equal(torch.stack(tokens, 1), model.generate(IDS, 3)[:, 4:])
    with pytest.raises(QCompileError, match="room for 6 tokens is used up"):
        session.decode(tokens[-1])


def test_a_session_says_what_it_cannot(llama: tuple[qcompile.CompiledModel, Artifact], small: Path) -> None:
    assert isinstance(llama[1].runner, TritonRunner)
    with pytest.raises(QCompileError, match="prompt of 4 tokens does not fit a room of 3"):
        Session(llama[1].runner, room=3, fixed=True).prefill(IDS)
    with pytest.raises(QCompileError, match="needs a prefill"):
        Session(llama[1].runner, room=3).decode(IDS[:, 0])
    with pytest.raises(QCompileError, match="takes no mask"):
        Session(TritonRunner(small), room=3, fixed=True)


def test_files_follow_the_residual_stream(llama: tuple[qcompile.CompiledModel, Artifact]) -> None:
    shards = Bundle.read(llama[1].directory).shards
    assert len(shards) > 3
    of_layers = [{int(m[1]) for k in keys if (m := re.search(r"layers\.(\d+)\.", k))} for keys in shards.values()]
    assert all(len(layers) <= 2 for layers in of_layers)


@pytest.mark.parametrize("name", ["opt", "moe"])
def test_other_models(name: str, tmp_path: Path) -> None:
    model = qcompile.compile(zoo.path(name), recipe="int4-g128")
    artifact = model.export("triton", tmp_path / name, {"gpu": "none"})
    assert artifact.manifest.agreement is not None
    assert artifact.manifest.agreement.max_relative_error < 1e-3
    qcompile.verify(artifact.directory)


def test_a_trained_model(data_folder: Path, tmp_path: Path) -> None:
    model = qcompile.compile(data_folder / "babyllama-105", recipe="int4-g128", overrides=["weights.group=32"])
    artifact = model.export("triton", tmp_path / "baby", {"gpu": "none"})
    assert artifact.manifest.agreement is not None
    assert artifact.manifest.agreement.max_relative_error < 1e-3
    qcompile.verify(artifact.directory)


def test_bits_are_those_on_disk(small: Path) -> None:
    manifest = Artifact.open(small).manifest
    assert manifest.tensors["w"].container == "int4"
    assert manifest.tensors["w"].bits_per_element == 6  # 4, and 32 of a scale over 16
    stored = sum(t.bytes for t in manifest.tensors.values())
    on_disk = sum(e.bytes for name, e in manifest.files.items() if name.startswith("weights/"))
    assert stored <= on_disk < stored + 2000  # headers of the files


def test_sources_of_a_bundle_are_importable(small: Path) -> None:
    package = load_sources(small, Bundle.read(small))
    kernel = launch.kernel_function("weight_only.gemm", package)
    assert kernel.__module__ == f"{package}.weight_only"


# ------------------------------------------------------------------ bad input


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_changed_weight_is_found(copied: Path) -> None:
    flip(next((copied / "weights").iterdir()))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        qcompile.verify(copied)


def test_a_changed_source_is_not_run(copied: Path) -> None:
    flip(copied / "kernels/sources/weight_only.py")
    with pytest.raises(ArtifactError, match=r"weight_only\.py was changed"):
        load_sources(copied, Bundle.read(copied))


@pytest.mark.parametrize("file", ["bundle.json", "graph.qir"])
def test_a_newer_bundle_asks_for_a_newer_qcompile(copied: Path, file: str) -> None:
    text = (copied / file).read_text()
    newer = text.replace('"format": 1', '"format": 2').replace("# qcompile graph 1", "# qcompile graph 2")
    (copied / file).write_text(newer)
    with pytest.raises(ArtifactError, match=r"2, this qcompile reads up to 1; upgrade qcompile"):
        TritonRunner(copied)


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("bundle.json", "{", "is not JSON"),
        ("bundle.json", '{"format": 1}', "Field required"),
        ("graph.qir", "def main():", "does not begin with its version"),
        ("bundle.json", None, "bundle.json is missing"),
        ("graph.qir", None, "graph.qir is missing"),
        ("weights/segment-000.safetensors", None, "segment-000.safetensors is missing"),
        ("weights/segment-000.safetensors", "{}", "cannot be read"),
    ],
)
def test_a_damaged_bundle(copied: Path, file: str, text: str | None, says: str) -> None:
    if text is None:
        (copied / file).unlink()
    else:
        (copied / file).write_text(text)
    with pytest.raises(ArtifactError, match=says):
        TritonRunner(copied)


def test_no_gpu(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for executor in ("jit", "binary"):
        with pytest.raises(QCompileError, match="needs a GPU and torch finds none; use executor=cpu"):
            TritonRunner(small, executor)  # type: ignore[arg-type]
    assert TritonRunner(small).executor == "cpu"
    with pytest.raises(QCompileError, match="executor 'gpu' is unknown; use auto, cpu, jit, binary"):
        TritonRunner(small, "gpu")  # type: ignore[arg-type]


def test_weights_that_do_not_fit_a_gpu() -> None:
    check_memory(10, 10)
    with pytest.raises(ArtifactError, match=r"need 3\.00 GB of GPU memory and 2\.00 GB are free"):
        check_memory(3_000_000_000, 2_000_000_000)


def test_binaries_and_the_gpus_they_run_on() -> None:
    assert best_target(["sm_80", "sm_90"], "sm_89") == "sm_80"
    assert best_target(["sm_80", "sm_90"], "sm_90") == "sm_90"
    assert best_target(["sm_90"], "sm_100") is None  # compiled with features of sm_90 alone
    assert best_target(["sm_80"], "sm_90") is None
    assert best_target(["gfx942"], "gfx950") is None


def test_small_groups_and_unknown_gpus(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"groups of 8 are not made of whole steps.*multiple of 16"):
        export_program(program("insert-qdq(weights=int4 group=8), rtn"), tmp_path / "out", TritonBackend("none"), {})
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match=r"gpu 'sm_91' is unknown \(did you mean 'sm_90'\?\); known: sm_80"):
        make_backend("triton", {"gpu": "sm_90,sm_91"})


def test_without_triton_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> object:
        return None if name == "triton" else object()

    monkeypatch.setattr(launch.importlib.util, "find_spec", absent)
    with pytest.raises(LoweringError, match="triton is not installed; run on Linux: pip install triton"):
        export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tuning_needs_a_gpu(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QCompileError, match="tuning measures kernels on a GPU and torch finds none"):
        TritonBackend().tune(small)


def test_the_manifest_says_what_was_done(small: Path) -> None:
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["notes"][0].startswith("2 products with packed weights in 2 operators")
    assert manifest["target_options"] == {"gpu": "none", "merge": True}
