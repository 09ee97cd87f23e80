"""Ranges of segments, one after another, compute what the program computes."""

from __future__ import annotations

import pytest
from mlir_programs import error, llama, prompt
from torch import Tensor

from qcompile.backends.torch_mlir.emit import Naming, emit_module
from qcompile.backends.torch_mlir.lower import entries_of, symbol_of
from qcompile.backends.torch_mlir.shards import Shards, canonical, layer_ranges
from qcompile.errors import LoweringError, RecipeError
from qcompile.ir.program import Program
from qcompile.ir.run import fill


def chained(parts: list[Program], values: dict[str, Tensor]) -> dict[str, Tensor]:
    for part in parts:
        values = values | part.run({node.name: values[node.name] for node in part.inputs})
    return values


@pytest.mark.parametrize("count", [2, 4])
def test_parts_in_a_row(count: int) -> None:
    program = llama(layers=4)
    parts = list(layer_ranges(program, count))
    assert len(parts) == count
    for part in parts:
        part.verify()
    feeds = fill(program, {"input_ids": prompt()})
    expected, found = program.run(feeds), chained(parts, dict(feeds))
    for name in program.output_names:
        assert error(found[name], expected[name]) == 0, name
    keys = [{part.key(n) for n in part.weight_nodes} for part in parts]
    assert len(set.union(*keys)) == len(program.weight_nodes)
    assert all("model.layers.0.mlp.up_proj.weight" not in k for k in keys[1:])


def test_alike_parts_have_one_text() -> None:
    texts = []
    for part in layer_ranges(llama(layers=4), 4):
        keys = canonical(part)
        naming = Naming(lambda n: "model", lambda n, keys=keys: keys[n], lambda n, keys=keys: symbol_of(keys[n]))  # type: ignore[misc]
        texts.append(emit_module(part, entries_of(part), naming, "model", locations=False))
    assert texts[1] == texts[2]
    assert len(set(texts)) == 3  # embedding, two in the middle, head


def test_bad_shards() -> None:
    for text in ("layers", "layers:0", "heads:2", "tensor:-1", ""):
        with pytest.raises(RecipeError, match="use shards=none, layers:2 or tensor:2"):
            Shards.parse(text)
    with pytest.raises(LoweringError, match=r"segments, which layers:99 cannot part"):
        list(layer_ranges(llama(layers=1), 99))
