"""Weight edits: they compose, round once, and take no more memory than they must."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile.capture.saved import load_program, save_program
from qcompile.errors import QCompileError
from qcompile.ir.edits import AlongAxis, Chain, WeightEdit, apply_edits, edited_pieces
from qcompile.ir.program import Program
from qcompile.ir.weights import WeightStore


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scale(axis: int, factors: Tensor) -> AlongAxis:
    return AlongAxis(axis, lambda v: v * factors.to(v.dtype))


def mix(axis: int, matrix: Tensor) -> AlongAxis:
    return AlongAxis(axis, lambda v: v @ matrix.to(v.dtype).T, len(matrix))


def dyadic(*shape: int, seed: int = 0) -> Tensor:
    """Numbers whose products and sums are exact in float32."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).double() / 4


@dataclass(frozen=True, eq=False)
class Outer(WeightEdit):
    """Needs the whole weight."""

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor + tensor.mean()


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", [(1, 1), (0, 0), (0, 1), (-1, -2), (1, 0, 1)])
def test_a_row_of_edits_is_one_rounding_of_the_exact_result(dtype: torch.dtype, axes: tuple[int, ...]) -> None:
    weight = dyadic(6, 10).to(dtype)
    store, exact = WeightStore.of({"w": weight}), weight.double()
    for number, axis in enumerate(axes):
        matrix = dyadic(exact.shape[axis], exact.shape[axis], seed=number)
        store.transform("w", mix(axis, matrix / 2))
        exact = (exact.movedim(axis, -1) @ (matrix / 2).T).movedim(-1, axis)
    assert torch.equal(exact.float().double(), exact)  # the premise: float32 is exact here
    assert torch.equal(store["w"], exact.to(dtype))


def test_edits_that_each_round_would_differ() -> None:
    weight, thirds = random(64, 64).bfloat16(), torch.full((64,), 1 / 3, dtype=torch.float64)
    store, every = WeightStore.of({"w": weight}), WeightStore.of({"w": weight})
    for _ in range(4):
        store.transform("w", scale(1, thirds))
        every.edit("w", lambda w: (w.float() / 3).bfloat16())
    store.transform("w", scale(0, torch.full((64,), 81.0)))
    every.edit("w", lambda w: w * 81)
    assert torch.equal(store["w"], weight)
    assert not torch.equal(every["w"], weight)


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@given(shapes, st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 200))
def test_pieces_agree_with_the_whole(shape: tuple[int, ...], steps: list[tuple[int, int]], piece: int) -> None:
    weight, edits = dyadic(*shape), list[WeightEdit]()
    exact = weight
    for axis, width in steps:
        axis %= len(shape)
        matrix = dyadic(width, exact.shape[axis], seed=width)
        edits.append(mix(axis - len(shape), matrix) if width % 2 else mix(axis, matrix))
        exact = (exact.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
    assert torch.equal(apply_edits(edits, weight, piece_bytes=piece), exact)
    pieces = [part.clone() for part in edited_pieces(Chain(tuple(edits)), weight, piece_bytes=piece)]
    assert torch.equal(torch.cat(pieces), exact)


def test_an_edit_without_an_axis_gets_the_whole_weight() -> None:
    weight = dyadic(5, 4).float()
    edits = [scale(1, torch.full((4,), 2.0)), Outer(None), scale(1, torch.full((4,), 0.5))]
    double = weight * 2
    assert torch.allclose(apply_edits(edits, weight, piece_bytes=16), (double + double.mean()) / 2)
    assert len(list(edited_pieces(Chain(tuple(edits)), weight, piece_bytes=16))) == 5
    assert len(list(edited_pieces(Chain(tuple(edits[:2])), weight, piece_bytes=16))) == 1


def test_a_write_ends_the_row() -> None:
    weight = torch.full((2, 2), 1.0).bfloat16()
    store, third = WeightStore.of({"w": weight}), torch.full((2,), 1 / 3)
    store.transform("w", scale(0, third))
    store["w"] = store["w"]  # rounded here
    store.transform("w", scale(0, 3 * torch.ones(2)))
    assert torch.equal(store["w"], ((weight / 3).bfloat16().float() * 3).bfloat16())
    store.edit("w", lambda w: w.half(), dtype=torch.float16)  # and so does a recorded function
    store.transform("w", scale(1, third))
    assert store["w"].dtype == torch.float16


def test_copies_and_ties() -> None:
    store = WeightStore.of({"w": torch.ones(2, 2)})
    two = scale(0, torch.full((2,), 2.0))
    store.transform("w", two)
    copy = store.copy()
    copy.transform("w", two)
    assert (store["w"][0, 0].item(), copy["w"][0, 0].item()) == (2, 4)
    with store.caching():
        assert store["w"] is store["w"]
        assert next(store.pieces("w")) is store["w"]
        store.transform("w", two)
        assert store["w"][0, 0] == 4
    store.bind("v", store._entries["w"].source)
    assert not store.same_source("w", "v")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.bool])
def test_codes_take_no_edits(dtype: torch.dtype) -> None:
    store = WeightStore.of({"w": torch.ones(2).to(dtype)})
    with pytest.raises(QCompileError, match=f"weight 'w' holds {dtype}, which takes no edits"):
        store.transform("w", scale(0, torch.ones(2)))


@dataclass(frozen=True, eq=False)
class Bad(WeightEdit):
    shape: tuple[int, ...] | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor[..., :1]

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.shape or shape


def test_edits_that_are_wrong_about_themselves() -> None:
    store = WeightStore.of({"w": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"Bad acts along axis 2 of a weight of shape \[2, 3\]"):
        store.transform("w", Bad(2))
    with pytest.raises(ValueError, match=r"Bad makes \[4, 3\] of \[2, 3\], more than its axis 1 changes"):
        store.transform("w", Bad(1, (4, 3)))
    store.transform("w", Bad(1))
    with pytest.raises(RuntimeError, match=r"returned \[2, 1\], declared \[2, 3\]") as caught:
        store["w"]
    assert caught.value.__notes__ == ["in weight 'w'"]


def test_float16_that_overflows_is_an_error() -> None:
    store = WeightStore.of({"w": torch.tensor([[1.0, float("inf")]]).half()})
    store.transform("w", scale(1, torch.tensor([1e3, 1.0])))
    assert store["w"].tolist() == [[1e3, float("inf")]]
    store.transform("w", scale(1, torch.tensor([1e3, 1.0])))
    with pytest.raises(QCompileError, match=r"an edited weight reaches 1e\+06, beyond float16; capture with dtype="):
        store["w"]


TEXT = """\
def main(x: bf16[2, 6], *, w: bf16[4, 6], v: bf16[4]):
    y: bf16[2, 4] = aten.linear.default(x, w, v)
    return {"y": y}"""


def test_programs(tmp_path: Path) -> None:
    program = Program.parse(TEXT)
    clone = program.clone()
    node = program.weight_node("w")
    assert node is not None
    before, factors = program.weight(node), random(6)
    program.edit_weight(node, scale(1, factors))
    program.edit_weight(node, scale(1, 1 / factors))
    assert torch.equal(program.weight(node), before)
    widen = torch.cat([torch.eye(6), torch.zeros(2, 6)])
    program.edit_weight(node, mix(1, widen))
    assert program.type_of(node) == "bf16[4, 8]"
    assert torch.equal(program.weight(node), torch.nn.functional.pad(before, (0, 2)))
    assert torch.equal(clone.weights["w"], before)
    program.set_arg(program.nodes[0], "input", program.inputs[0])
    program.inputs[0].meta["val"] = program.fake((2, 8), torch.bfloat16)
    save_program(program, tmp_path / "saved")
    assert torch.equal(load_program(tmp_path / "saved").weights["w"], program.weight(node))


class Largest(TorchDispatchMode):
    """The largest float32 storage that an operator returns, in bytes."""

    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype == torch.float32:
            self.peak = max(self.peak, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize(
    ("shape", "axes"), [((4096, 64), (1, 1)), ((64, 4096), (0,)), ((32, 64, 128), (2, 1)), ((2, 2048, 64), (2,))]
)
def test_no_whole_weight_is_held_in_float32(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    weight = random(*shape).bfloat16()
    edits = [scale(axis, torch.full((shape[axis],), 2.0)) for axis in axes]
    with Largest() as seen:
        result = apply_edits(edits, weight, piece_bytes=64 << 10)
    assert torch.equal(result, weight * 2 ** len(axes))
    assert 0 < seen.peak <= 64 << 10


def measured(script: str, *arguments: object) -> int:
    """Bytes by which the peak resident memory of a fresh process grew in `script` behind its line ``start()``."""
    prelude = """
        import resource, sys
        import torch
        from pathlib import Path
        from qcompile.capture.shards import write_store
        from qcompile.ir.edits import AlongAxis
        from qcompile.ir.weights import ShardSource, WeightStore

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        def start():
            global base
            base = peak()
    """
    text = textwrap.dedent(prelude) + textwrap.dedent(script) + "\nprint(peak() - base)\n"
    command = [sys.executable, "-c", text, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_writing_an_edited_weight_takes_the_memory_of_its_source(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    size = 96 << 20
    save_file({"w": torch.ones(12 << 10, 4 << 10, dtype=torch.bfloat16)}, tmp_path / "in.safetensors")
    grew = measured(
        """
        shape, folder = (12 << 10, 4 << 10), Path(sys.argv[1])
        store = WeightStore()
        store.bind("w", ShardSource(folder / "in.safetensors", "w", shape, torch.bfloat16))
        store.transform("w", AlongAxis(1, lambda v: v * 2))
        store.transform("w", AlongAxis(1, lambda v: v.flip(-1)))
        list(WeightStore.of({"w": torch.ones(2, 2)}).pieces("w"))
        start()
        write_store(store, ["w"], folder, 1 << 40)
        """,
        tmp_path,
    )
    assert grew < size + (
        160 << 20
    )  # the mapped source and some pieces; whole, it is 96 MiB of result and 192 MiB of float32 more


def test_lambdas_are_not_needed() -> None:
    functions: list[Callable[[Tensor], Tensor]] = [torch.neg, torch.abs]
    store = WeightStore.of({"w": torch.ones(3)})
    for fn in functions:
        store.transform("w", AlongAxis(0, fn))
    assert torch.equal(store["w"], torch.ones(3))
