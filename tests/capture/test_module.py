"""Modules with example inputs, exported programs, and .pt2 files."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.capture import capture
from qcompile.errors import CaptureError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden: Tensor = x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))
        return hidden if scale is None else hidden * scale


@pytest.fixture
def block() -> Block:
    return Block()


@pytest.mark.parametrize("example", [torch.ones(2, 3, 8), (torch.ones(2, 3, 8),), {"x": torch.ones(2, 3, 8)}])
def test_a_module_on_its_example(block: Block, example: Any) -> None:
    program = qcompile.capture(block, example)  # the package is callable under its own name
    x = torch.randn(1, 7, 8)
    assert block.training
    with torch.no_grad():
        assert torch.equal(program(x), block.eval()(x))


def test_names_of_a_dict(block: Block) -> None:
    program = capture(block, {"x": torch.ones(2, 3, 8), "scale": torch.ones(2, 1, 8)})
    assert [n.name for n in program.inputs] == ["x", "scale"]
    assert "axis 1 is fixed at 1" in program.info["notes"][0]


def test_dtype_of_a_module(block: Block) -> None:
    with pytest.raises(CaptureError, match=r"module\.to"):
        capture(block, torch.ones(2, 3, 8), dtype="float64")
    program = capture(block.double(), torch.ones(2, 3, 8, dtype=torch.float64), dtype="float64")
    assert "f32" not in str(program)


def test_what_export_refuses() -> None:
    class Loop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"torch\.export refuses Loop"):
        capture(Loop(), torch.ones(2, 2))


def saved(block: Block, path: Path) -> Path:
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    x = torch.ones(2, 3, 8)
    torch.export.save(torch.export.export(block.eval(), (x,), dynamic_shapes=(dims,)), path)
    return path


def test_exported_program_and_pt2(block: Block, tmp_path: Path) -> None:
    path, x = saved(block, tmp_path / "m.pt2"), torch.randn(4, 5, 8)
    with torch.no_grad():
        wanted = block(x)
    assert torch.equal(capture(path)(x), wanted)
    assert torch.equal(capture(torch.export.load(path))(x), wanted)


def rewritten(path: Path, name: str, data: bytes) -> Path:
    """The archive with one member replaced or added."""
    out = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for member in old.namelist():
            if member != f"{root}/{name}":
                new.writestr(member, old.read(member))
        new.writestr(f"{root}/{name}", data)
    return out


def member(path: Path, name: str) -> Any:
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read(archive.namelist()[0].partition("/")[0] + "/" + name))


class Bomb:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (self.mark, "w"))


def test_an_archive_that_would_run_code_is_refused(block: Block, tmp_path: Path) -> None:
    path, mark = saved(block, tmp_path / "m.pt2"), tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save((Bomb(str(mark)),), buffer)
    weights = member(path, "data/weights/model_weights_config.json")
    next(iter(weights["config"].values()))["use_pickle"] = True
    constants = {"config": {"c": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}}}
    model = json.dumps(member(path, "models/model.json"))
    evil = model.replace("Symbol('s", f"open('{mark}', 'w') or Symbol('s", 1)
    assert evil != model
    for name, data in (
        ("data/sample_inputs/model.pt", buffer.getvalue()),
        ("data/weights/model_weights_config.json", json.dumps(weights).encode()),
        ("data/weights/model.pt", pickle.dumps(Bomb(str(mark)))),
        ("data/constants/model_constants_config.json", json.dumps(constants).encode()),
        ("data/aotinductor/model/code.so", b""),
        ("models/model.json", evil.encode()),
    ):
        with pytest.raises(CaptureError) as caught:
            capture(rewritten(path, name, data))
        assert "\n" not in str(caught.value), name
        assert not mark.exists(), name


def test_a_broken_archive_is_refused(block: Block, tmp_path: Path) -> None:
    path = saved(block, tmp_path / "m.pt2")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CaptureError, match="no intact archive"):
        capture(path)
