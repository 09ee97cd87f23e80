"""Artifacts in iree-runtime: every form, both kinds of shards, and what is wrong with a directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlir_programs import error, llama, products, prompt, quantized
from test_prelower import INTEGERS, MIXED, WEIGHTS

import qcompile
from qcompile.artifact import Artifact
from qcompile.backends.torch_mlir import TorchMlirBackend, toolchain
from qcompile.backends.torch_mlir.plan import PLAN, Plan
from qcompile.backends.torch_mlir.runtime import IreeRunner
from qcompile.errors import ArtifactError, LoweringError, QCompileError, RecipeError
from qcompile.generate import ProgramStepper, generate
from qcompile.ir.program import Program
from qcompile.ir.run import fill

Exported = Callable[[str], tuple[Program, Artifact]]

FAST = TorchMlirBackend(opt_level="O2")


def globals_of(directory: Path, flags: list[str]) -> list[str]:
    """Every tensor that the compiled module keeps: its globals, before they become bytes."""
    import subprocess

    import iree.compiler

    tool = Path(iree.compiler.__file__).parent / "_mlir_libs" / "iree-compile"
    command = [str(tool), str(directory / "model.mlir"), *flags, "--compile-to=flow"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line for line in text.splitlines() if "util.global private" in line and "tensor<" in line]


def test_every_form_runs_on_packed_weights(iree: None, tmp_path: Path) -> None:
    # A scale for every column of every row takes more room than the weight: that one is unpacked at load.
    layers = {name: (spec, None) for name, spec in WEIGHTS.items() if name != "columns"} | {
        f"i_{k}": v for k, v in (INTEGERS | MIXED).items()
    }
    program = products(layers)
    files = TorchMlirBackend().lower(program, tmp_path)
    runner = TorchMlirBackend().load(tmp_path)
    for shape in ((2, 5, 64), (1, 1, 64)):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        expected, ours = program.run({"x": x}), runner.run({"x": x})
        for name in expected:
            assert error(ours[name], expected[name]) < 3e-6, name
    for name, codes in TorchMlirBackend().stored_codes(tmp_path):
        assert torch.equal(codes, program.weights[f"{name}.codes"]), name
    bits = {t.name: t.bits_per_element for t in files.tensors}
    assert bits["g16.weight"] == 4 + 32 / 16
    assert bits["two.weight"] == 2 + 32 / 32 + 8 / 32
    assert bits["mx.weight"] == pytest.approx(4 + 8 / 32 + 8 * 256 * 4 / (48 * 64))
    kept = globals_of(tmp_path, files.build["attempts"][-1]["flags"])
    assert any("48x4x16xi4" in line for line in kept)
    assert not [line for line in kept if "48x4x16xf32" in line or "48x64xf32" in line or "48x2x32xf32" in line]
    assert runner.statistics()["held"] == 0  # weights are mapped; nothing was made of them


@pytest.mark.parametrize("shards", ["none", "layers:2", "tensor:2"])
def test_a_decoder(shards: str, exported: Exported) -> None:
    program, artifact = exported(shards)
    agreement = artifact.manifest.agreement
    assert agreement is not None
    assert agreement.max_relative_error < 1e-5
    for length in (1, 2, 7, 64):
        ids = prompt(length, batch=1)
        assert error(artifact.run(ids), program(ids)) < 1e-5, length
    ids = prompt(5, batch=1)
    assert torch.equal(artifact.generate(ids, 32), generate(ProgramStepper(program), ids, 32))
    assert torch.equal(
        artifact.generate(ids, 8, temperature=1.0, seed=3), artifact.generate(ids, 8, temperature=1.0, seed=3)
    )
    qcompile.verify(artifact.directory)
    build = artifact.manifest.build
    assert build["devices"] == (1 if shards == "none" else 2)
    assert "--iree-opt-level=O3" in build["attempts"][0]["flags"]
    assert build["cpu"] not in ("host", "")


def test_shards_are_told_apart(exported: Exported, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(exported("tensor:2")[1].directory, directory)
    with pytest.raises(QCompileError, match="compiled for 2 devices, not devices=3; give 2"):
        IreeRunner(directory, devices=3)
    file = directory / "rank_1.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"rank_1.safetensors was changed after it was written"):
        qcompile.verify(directory)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match=r"rank_1.safetensors has .* bytes, the manifest says"):
        qcompile.verify(directory)
    with pytest.raises(ArtifactError, match=r"rank_1.safetensors is no parameter file"):
        IreeRunner(directory)
    file.unlink()
    with pytest.raises(ArtifactError, match=r"rank_1.safetensors is missing; export the artifact again"):
        IreeRunner(directory)


def test_a_cpu_it_was_not_built_for(exported: Exported, tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(exported("none")[1].directory, directory)
    plan = Plan.read(directory)
    plan.model_copy(update={"cpu": "moon", "cpu_features": ["avx99", "sse2"]}).write(directory)
    with pytest.raises(ArtifactError, match="compiled for moon, and this CPU has no avx99"):
        IreeRunner(directory)
    (directory / PLAN).unlink()
    with pytest.raises(ArtifactError, match=r"has no plan.json; give a directory exported with --target torch_mlir"):
        IreeRunner(directory)


def test_inputs_are_checked(exported: Exported) -> None:
    runner = exported("layers:2")[1].runner
    with pytest.raises(QCompileError, match="input 'extra' is unknown"):
        runner.run({"input_ids": prompt(), "extra": prompt()})
    with pytest.raises(QCompileError, match="is missing; the artifact takes"):
        runner.run({"input_ids": prompt()})


def test_the_first_difference_is_named(exported: Exported) -> None:
    program, artifact = exported("none")
    feeds = fill(program, {"input_ids": prompt()})
    assert artifact.backend.first_difference(program, artifact.directory, feeds, 1e-3) == "unknown"
    for key, wanted in (
        ("lm_head.weight", "logits, which linear"),
        ("model.layers.1.input_layernorm.weight", "present_1"),
    ):
        other = program.clone()
        other.weights[key] = other.weights[key] * 1.5
        found = artifact.backend.first_difference(other, artifact.directory, feeds, 1e-3)
        assert found.startswith(wanted), found


def test_bad_cpus_and_options(iree: None, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=r"cpu='znver44' is no CPU that iree-compile knows .*did you mean 'znver4'"):
        replace(FAST, cpu="znver44").lower(llama(layers=1), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match="use packing=packed or packing=unpacked"):
        TorchMlirBackend(packing="dense")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="use O0, O1, O2 or O3"):
        TorchMlirBackend(opt_level="O9")
    with pytest.raises(RecipeError, match="use shards=none"):
        TorchMlirBackend(dialect="brevitas", shards="layers:2")


def test_a_failure_with_data_tiling_is_tried_again_without(
    iree: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(mlir: Path, out: Path, flags: list[str]) -> toolchain.Attempt:
        fails = "--iree-opt-data-tiling=true" in flags
        out.write_bytes(b"")
        return toolchain.Attempt(mlir.name, tuple(flags), 0.1, "stack" if fails else None)

    monkeypatch.setattr(toolchain, "attempt", attempt)
    files = TorchMlirBackend().lower(products({"a": (None, None)}), tmp_path)
    assert [a.get("error") for a in files.build["attempts"]] == ["stack", "stack", None]
    assert "compiled again with other flags (see build): model.mlir: stack" in files.notes


def test_the_compilers_error_names_the_node(iree: None, tmp_path: Path) -> None:
    text = "def main(x: f32[4, 4]):\n    y = aten.erfinv.default(x)  # some.module\n    return {'y': y}"
    with pytest.raises(
        LoweringError, match=r"iree-compile .* refuses model.mlir: .*erfinv.* at y \(module some.module\)"
    ):
        FAST.lower(Program.parse(text), tmp_path)


def test_without_iree_text_and_shards_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "iree-base-compiler is not installed; run: pip install 'qcompile[iree]'"
    monkeypatch.setattr(toolchain, "missing", lambda: reason)
    program = quantized(llama(layers=1), "int4 sym group=16")
    artifact = qcompile.artifact.export_program(program, tmp_path / "out", TorchMlirBackend(shards="tensor:2"), {})
    assert {"model.mlir", "rank_0.safetensors", "rank_1.safetensors", "plan.json"} <= set(artifact.manifest.files)
    assert artifact.manifest.agreement is None
    assert any(reason in note for note in artifact.manifest.notes)
    assert qcompile.verify(artifact.directory).manifest.build["attempts"] == []
    monkeypatch.undo()
    if toolchain.missing() is None:
        with pytest.raises(ArtifactError, match=r"MLIR that was not compiled; pip install 'qcompile\[iree\]'"):
            artifact.run(prompt())


def test_the_interchange_dialect(tmp_path: Path) -> None:
    program = quantized(llama(layers=1), "int4 asym group=16")
    backend = TorchMlirBackend(dialect="brevitas")
    artifact = qcompile.artifact.export_program(program, tmp_path / "out", backend, {})
    text = artifact.main.read_text()
    assert text.count('torch.operator "quant.matmul_rhs_group_quant"') == 7
    assert "util." not in text
    assert "!torch.vtensor<[64,32],ui8>, !torch.vtensor<[64,4,1],f32>, !torch.vtensor<[64,4,1],f32>" in text
    names = dict(backend.stored_codes(artifact.directory))
    assert len(names) == 7
    for name, codes in names.items():
        assert torch.equal(codes, program.weights[f"{name}.codes"]), name
    assert any("no compiler lowers" in note for note in artifact.manifest.notes)
    with pytest.raises(LoweringError, match="use dialect=iree"):
        backend.lower(quantized(llama(layers=1), "nf4 group=16"), tmp_path)
