"""To and from torch.export: round trips, ties, in-place operators, files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qcompile.errors import CaptureError
from qcompile.ir.exported import from_exported
from qcompile.ir.program import Program
from qcompile.ir.weights import WeightStore
from qcompile.passes.cleanup.dead_code import DeadCode

DYNAMIC = torch.export.Dim.DYNAMIC


def _export(module: nn.Module, *example: Tensor, dynamic: bool = True) -> torch.export.ExportedProgram:
    shapes = tuple({0: DYNAMIC} for _ in example) if dynamic else None
    return torch.export.export(module.eval(), example, dynamic_shapes=shapes, strict=False)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.down = nn.Linear(6, 4, bias=False)
        self.unused = nn.Linear(4, 4)
        self.register_buffer("shift", torch.randn(4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.down(self.norm(self.up(x)).relu_())
        y.add_(self.shift)
        return {"y": y, "half": y.to(torch.float64) / 2}


@pytest.fixture
def mlp() -> Mlp:
    torch.manual_seed(0)
    module = Mlp()
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.bias)
    return module


def test_round_trip(mlp: Mlp, tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    expected = mlp(x)
    program = Program.from_exported(_export(mlp, torch.randn(3, 4)))
    assert program.output_names == ("y", "half")
    assert set(program.weights) == {"up.weight", "up.bias", "norm.weight", "norm.bias", "down.weight", "shift"}
    assert {program.module_of(n) for n in program.nodes} >= {"up", "norm", "down"}
    assert "_(" not in str(program)  # nothing in place is left
    for name, value in program.run({"x": x}).items():
        torch.testing.assert_close(value, expected[name])
    exported = program.to_exported()
    torch.testing.assert_close(exported.module()(x)["half"], expected["half"])
    torch.export.save(exported, tmp_path / "p.pt2")
    loaded = torch.export.load(tmp_path / "p.pt2")
    torch.testing.assert_close(loaded.module()(x)["y"], expected["y"], rtol=0, atol=0)
    again = Program.from_exported(loaded)
    assert [str(n.target) for n in again.nodes] == [str(n.target) for n in program.nodes]
    assert again.output_names == program.output_names
    assert {again.module_of(n) for n in again.nodes} == {program.module_of(n) for n in program.nodes}
    assert torch.equal(again.run({"x": x})["y"], expected["y"])


def test_the_text_of_an_exported_program_parses(mlp: Mlp) -> None:
    program = Program.from_exported(_export(mlp, torch.randn(3, 4)))
    again = Program.parse(str(program), {key: program.weights[key] for key in program.weights})
    assert str(again) == str(program)
    x = {"x": torch.randn(2, 4)}
    assert torch.equal(again.run(x)["y"], program.run(x)["y"])
    assert torch.equal(again.to_exported().module()(x["x"])[0], program.run(x)["y"])


def test_the_exported_program_is_left_as_it_is(mlp: Mlp) -> None:
    exported = _export(mlp, torch.randn(3, 4))
    before = str(exported.graph)
    program = Program.from_exported(exported)
    program.weights["down.weight"] = torch.zeros(4, 6)
    x = torch.randn(2, 4)
    assert str(exported.graph) == before
    torch.testing.assert_close(exported.module()(x)["y"], mlp(x)["y"])


def test_fake_weights_read_nothing(mlp: Mlp) -> None:
    program = Program.from_exported(_export(mlp, torch.randn(3, 4)))

    class Unreadable:
        shape, dtype = (6, 4), torch.float32

        def read(self) -> Tensor:
            raise AssertionError("read")

    program.weights.bind("up.weight", Unreadable())
    exported = program.to_exported(fake=True)
    assert all(isinstance(t, FakeTensor) for t in exported.state_dict.values())
    assert isinstance(exported.state_dict["up.weight"], nn.Parameter)


def test_tied_weights_become_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))  # type: ignore[no-any-return]

    module = Tied()
    ids = torch.tensor([[1, 2], [3, 4]])
    program = Program.from_exported(_export(module, ids))
    assert list(program.weights) in (["embed.weight"], ["head.weight"])  # torch.export chooses
    assert len(program.weight_nodes[0].users) == 2
    assert program.output_names == ("output",)
    torch.testing.assert_close(program(ids), module(ids))
    torch.testing.assert_close(program.to_exported().module()(ids), module(ids))


def test_weights_may_come_from_a_store(mlp: Mlp) -> None:
    store = WeightStore.of({key: tensor * 0 for key, tensor in mlp.state_dict().items()})
    program = from_exported(_export(mlp, torch.randn(3, 4)), store, input_names=["tokens"], output_names=["a", "b"])
    assert program.output_names == ("a", "b")
    assert program.run({"tokens": torch.ones(2, 4)})["a"].abs().max() == 0
    assert "unused.weight" in program.weights  # the store is its caller's
    DeadCode().run(program)
    assert set(program.weights) == {program.key(node) for node in program.weight_nodes}


def test_prefixes_are_stripped_from_keys_and_modules(mlp: Mlp) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp

        def forward(self, x: Tensor) -> Any:
            return self.model(x)

    program = from_exported(_export(Wrapper(), torch.randn(3, 4)), strip="model.")
    assert "up.weight" in program.weights
    assert {program.module_of(n) for n in program.calls(torch.ops.aten.linear.default)} == {"up", "down"}


def test_a_program_that_changes_a_buffer_is_refused() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x * self.count

    with pytest.raises(CaptureError, match=r"changes 'count' \(buffer_mutation\): state must be inputs and outputs"):
        Program.from_exported(_export(Counter(), torch.randn(3, 4)))


def test_a_program_that_changes_its_input_is_refused() -> None:
    class Eats(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    with pytest.raises(CaptureError, match=r"changes 'x' \(user_input_mutation\)"):
        Program.from_exported(_export(Eats(), torch.randn(3, 4)))


def test_control_flow_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, torch.neg, torch.abs, (x,))  # type: ignore[no-any-return]

    with pytest.raises(CaptureError, match="higher-order operator cond is not supported"):
        Program.from_exported(_export(Branches(), torch.randn(3, 4), dynamic=False))


def test_constants_and_casts() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table = torch.tensor([1.0, 2.0, 3.0, 4.0])
            return (x.float() * table).type_as(x).half().to(torch.float32).to("cpu")

    program = Program.from_exported(_export(Casts(), torch.randn(3, 4)))
    assert [str(n.target) for n in program.nodes] == ["aten.mul.Tensor", "aten.to.dtype", "aten.to.dtype"]
    (key,) = program.weights
    assert program.weights[key].tolist() == [1, 2, 3, 4]
    x = torch.randn(2, 4)
    assert torch.equal(program(x), Casts()(x))


def test_a_cast_that_asks_for_rows_in_memory_makes_them() -> None:
    class Rows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mT.to(torch.float64, memory_format=torch.contiguous_format).view(-1)

    x = torch.randn(3, 4)
    assert torch.equal(Program.from_exported(_export(Rows(), x))(x), Rows()(x))


def test_sizes_are_named_after_the_inputs_they_come_from() -> None:
    class Sizes(nn.Module):
        def forward(self, input_ids: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
            return input_ids * 2, extra.view(-1)

    exported = torch.export.export(
        Sizes(),
        (torch.zeros(2, 3), torch.zeros(5, 4)),
        dynamic_shapes=({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC}),
        strict=False,
    )
    text = str(Program.from_exported(exported))
    assert "def main(input_ids: f32[batch, sequence], extra: f32[extra_0, 4]):" in text
    assert "f32[4*extra_0]" in text
    assert '"output_0"' in text
