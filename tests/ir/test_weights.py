"""WeightStore: reads when touched, records edits, spills, copies and lets go."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.ir.weights import MemorySource, ShardSource, WeightStore


class Counting:
    """A source that counts how often it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.reads = tensor, 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        self.reads += 1
        return self.tensor


def test_nothing_is_read_until_touched() -> None:
    store, source = WeightStore(), Counting(torch.ones(2, 3))
    store.bind("w", source)
    store.edit("w", lambda w: w * 2)
    assert store.meta("w") == ((2, 3), torch.float32)
    assert store.nbytes("w") == 24
    assert ("w" in store, len(store), list(store), 3 in store) == (True, 1, ["w"], False)
    assert source.reads == 0
    assert torch.equal(store["w"], torch.full((2, 3), 2.0))
    assert source.reads == 1


def test_edits_apply_in_order_and_leave_the_source() -> None:
    original = torch.arange(6.0).view(2, 3)
    store = WeightStore.of({"w": original})
    store.edit("w", lambda w: w + 1)
    store.edit("w", lambda w: (w * 10).t(), shape=(3, 2))
    store.edit("w", lambda w: w.double(), dtype=torch.float64)
    assert torch.equal(store["w"], ((original + 1) * 10).t().double())
    assert store.meta("w") == ((3, 2), torch.float64)
    store.edit("w", torch.sum, shape=())
    assert store.meta("w")[0] == ()
    assert store["w"].item() == 210
    assert torch.equal(original, torch.arange(6.0).view(2, 3))


def test_an_edit_that_lies_about_its_shape_is_caught() -> None:
    store = WeightStore.of({"w": torch.ones(2, 3)})
    store.edit("w", lambda w: w.t())
    with pytest.raises(RuntimeError, match=r"weight 'w' read as torch.float32\[3, 2\], declared torch.float32\[2, 3\]"):
        store["w"]


def test_setting_replaces_source_and_edits() -> None:
    store = WeightStore.of({"w": torch.ones(2)})
    store.edit("w", lambda w: w * 5)
    store["w"] = torch.zeros(4, requires_grad=True)
    assert torch.equal(store["w"], torch.zeros(4))
    assert not store["w"].requires_grad


def test_deleting() -> None:
    store = WeightStore.of({"w": torch.ones(2)})
    del store["w"]
    assert "w" not in store
    for missing in (lambda: store["w"], lambda: store.meta("w"), lambda: store.edit("w", torch.neg)):
        with pytest.raises(KeyError):
            missing()
    with pytest.raises(KeyError):
        del store["w"]


def test_writes_beyond_the_budget_spill_and_the_scratch_goes_with_the_store() -> None:
    store = WeightStore(budget=5 << 20)
    tensors = {
        f"w{i}": torch.randn(512, 1024, generator=torch.Generator().manual_seed(i)) for i in range(5)
    }  # 2 MiB each
    for key, tensor in tensors.items():
        store[key] = tensor
    store["small"] = torch.ones(3)
    store["bf16"] = torch.randn(1024, 1024).bfloat16().t()
    assert store._held <= store.budget
    folder = store._scratch.folder
    assert folder is not None
    spilled = Path(folder.name)
    assert len(list(spilled.glob("*.safetensors"))) == 4  # two of five fit
    assert all(torch.equal(store[key], tensor) for key, tensor in tensors.items())
    assert store["bf16"].dtype == torch.bfloat16
    store["w0"] = tensors["w0"] + 1  # freed and held again: the budget counts what is held
    del store["w1"]
    assert store._held == 2 * (1 << 20) + 12
    copy = store.copy()
    del store, folder
    gc.collect()
    assert torch.equal(copy["w4"], tensors["w4"])  # the copy keeps the scratch
    del copy
    gc.collect()
    assert not spilled.exists()


def test_what_the_caller_holds_does_not_count() -> None:
    store = WeightStore.of({"w": torch.ones(1 << 20)}, budget=0)
    assert (store._held, store._scratch.folder) == (0, None)


def test_copies_are_isolated_both_ways() -> None:
    store = WeightStore.of({"a": torch.ones(2), "b": torch.ones(2)})
    copy = store.copy()
    store.edit("a", lambda w: w * 2)
    copy["b"] = torch.zeros(2)
    copy["c"] = torch.zeros(1)
    del store["b"]
    assert torch.equal(copy["a"], torch.ones(2))
    assert torch.equal(store["a"], torch.full((2,), 2.0))
    assert torch.equal(copy["b"], torch.zeros(2))
    assert "c" not in store


def test_caching_reads_once_and_forgets_what_changes() -> None:
    store, source = WeightStore(), Counting(torch.ones(2))
    store.bind("w", source)
    with store.caching():
        first = store["w"]
        with store.caching():
            assert store["w"] is first
        assert store["w"] is first
        assert source.reads == 1
        store.edit("w", lambda w: w * 3)
        assert store["w"][0] == 3
        store["w"] = torch.zeros(2)
        assert store["w"][0] == 0
    store.bind("w", source)
    reads = source.reads
    _ = store["w"], store["w"]
    assert source.reads == reads + 2


def test_ties_are_known_by_their_source() -> None:
    source = MemorySource(torch.ones(2))
    store = WeightStore()
    store.bind("a", source)
    store.bind("b", source)
    store.bind("c", MemorySource(source.tensor))
    assert store.same_source("a", "b")
    assert not store.same_source("a", "c")
    store.edit("b", torch.neg)
    assert not store.same_source("a", "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(4, 3).to(dtype)
    save_file({"x.weight": tensor, "y": torch.ones(1)}, tmp_path / "m.safetensors")
    store = WeightStore()
    store.bind("w", ShardSource(tmp_path / "m.safetensors", "x.weight", (4, 3), dtype))
    assert torch.equal(store["w"].float(), tensor.float())
    store.edit("w", lambda w: w.float() + 1, dtype=torch.float32)
    assert torch.equal(store["w"], tensor.float() + 1)


@given(st.lists(st.sampled_from(["set", "edit", "del", "copy", "read", "swap"]), max_size=12))
def test_behaves_like_a_dict(steps: list[str]) -> None:
    store, plain = WeightStore(budget=0), dict[str, Tensor]()
    others = (store.copy(), dict(plain))
    for index, step in enumerate(steps):
        key = f"w{index % 3}"
        if step == "set":
            store[key] = plain[key] = torch.full((2,), float(index))
        elif step == "edit" and key in plain:
            store.edit(key, lambda w, index=index: w + index)
            plain[key] = plain[key] + index
        elif step == "del" and key in plain:
            del store[key], plain[key]
        elif step == "copy":
            others = (store.copy(), dict(plain))
        elif step == "swap":
            (store, plain), others = others, (store, plain)
        assert sorted(store) == sorted(plain)
        assert all(torch.equal(store[k], plain[k]) for k in plain)


def test_a_run_reads_each_weight_once() -> None:
    program = Program.parse(
        'def main(x: f32[2, 4], *, w: f32[4, 4], v: f32[4]):\n    y = aten.linear.default(x, w, v)\n    return {"y": y}'
    )
    sources = {key: Counting(program.weights[key]) for key in program.weights}
    for key, source in sources.items():
        program.weights.bind(key, source)
    program.verify()
    str(program)
    program.clone()
    assert {s.reads for s in sources.values()} == {0}
    program(torch.ones(2, 4))
    assert {s.reads for s in sources.values()} == {1}
