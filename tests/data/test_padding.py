"""What is measured on padded documents is what is measured on each by itself."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qcompile import run_passes
from qcompile.capture import capture
from qcompile.capture.dtypes import widen
from qcompile.data import Batches
from qcompile.data.padding import Padding
from qcompile.ir.contractions import find_contractions, roles
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.pass_base import Report
from qcompile.passes.permute.permute_by_hessian import second_moments
from qcompile.passes.scale.watch import Peaks, watch
from qcompile.zoo import path

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()


@cache
def embedded(name: str) -> Program:
    program = capture(path(name), dtype=torch.float64)
    widen(program)
    return program


def documents() -> tuple[Batches, list[Tensor]]:
    """Padded with a token that is like no other, and each by itself."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, 90, (1, length), generator=generator) for length in (9, 4, 1, 7)]
    tokens, mask = torch.full((4, 9), 99), torch.zeros(4, 9, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : text.shape[1]], mask[row, : text.shape[1]] = text[0], 1
    return Batches(tokens, 2, mask=mask), texts


def test_statistics_leave_padding_out() -> None:
    program = embedded("llama")
    padded, alone = documents()
    watched = {(c.input, c.input_axis) for c in find_contractions(program)}
    peaks = [{place: Peaks() for place in watched} for _ in range(2)]
    report = Report()
    assert watch(program, peaks[0], padded, report) == 21
    assert watch(program, peaks[1], alone) == 21
    for place in watched:
        assert torch.allclose(peaks[0][place].value, peaks[1][place].value, rtol=1e-12), place
    sums, expected = second_moments(program, padded, report), second_moments(program, alone, report)
    for node, found in sums.items():
        assert torch.allclose(found, expected[node], rtol=1e-10)
    assert report.notes == []
    ignorant = {place: Peaks() for place in watched}
    watch(program, ignorant, [batch["input_ids"] for batch in padded])
    assert any(not torch.allclose(ignorant[place].value, peaks[1][place].value) for place in watched)


def test_static_scales_leave_padding_out() -> None:
    padded, alone = documents()

    def scales(data: object) -> dict[str, Tensor]:
        program = embedded("llama").clone()
        run_passes(program, "insert-qdq(activations=int8 asym static), calibrate", data)  # type: ignore[arg-type]
        return {key: program.weights[key] for key in program.weights if key.endswith((".scale", ".zero_point"))}

    found, expected = scales(padded), scales(alone)
    assert len(found) > 10
    for key, scale in found.items():
        assert torch.allclose(scale.double(), expected[key].double(), rtol=1e-9), key


def test_what_experts_read_keeps_its_padding_and_is_reported() -> None:
    program, report = embedded("moe"), Report()
    products = find_contractions(program)
    kinds = roles(program, products)
    experts = [c for c in products if kinds[c.node] == "expert"]
    others = [c for c in products if kinds[c.node] != "expert" and c.input not in {e.input for e in experts}]
    padded, alone = documents()
    peaks = [{(c.input, c.input_axis): Peaks() for c in products} for _ in range(2)]
    watch(program, peaks[0], padded, report)
    watch(program, peaks[1], alone)
    for c in others:
        assert torch.allclose(*(p[c.input, c.input_axis].value for p in peaks), rtol=1e-12), c.node
    (note,) = report.notes
    assert note.startswith(f"padding counts in {len({c.input for c in experts})} values (")
    assert "experts read it" in note


LAYOUTS = """def main(input_ids: i64[batch, sequence], attention_mask: i64[batch, sequence], *, t: f32[9, 6]):
    x = aten.embedding.default(t, input_ids)
    heads = aten.unflatten.int(x, 2, [2, 3])
    turned = aten.transpose.int(heads, 1, 2)
    back = aten.transpose.int(turned, 2, 3)
    channels = aten.transpose.int(x, 1, 2)
    flat = aten.flatten.using_ints(x, 0, 1)
    scores = aten.matmul.default(turned, back)
    first = aten.select.int(x, 1, 0)
    return {"a": channels, "b": flat, "c": scores, "d": first}
"""


def test_tokens_are_found_in_any_layout() -> None:
    program = Program.parse(LAYOUTS)
    ids = torch.randint(0, 9, MASK.shape, generator=torch.Generator().manual_seed(0))
    padding, found = Padding(program), dict[str, tuple[Tensor, Tensor]]()

    def observe(node: object, value: Tensor) -> None:
        found[node.name] = value, padding.tokens_of(node, value, MASK)  # type: ignore[attr-defined, arg-type]

    run(program, fill(program, {"input_ids": ids}), observe)
    x, kept = found["x"]
    assert torch.equal(kept[0], torch.stack([x[i, j] for i, j in MASK.nonzero().tolist()]))
    for name, back in {
        "turned": (0, 2, 1, 3),
        "channels": (0, 2, 1),
        "back": (0, 3, 1, 2),
        "heads": (0, 1, 2, 3),
    }.items():
        assert torch.equal(found[name][1].permute(back).flatten(2), kept), name
        assert found[name][1].ndim == found[name][0].ndim
    assert torch.equal(found["flat"][1], kept[0])
    for name in ("scores", "first"):
        assert found[name][1] is found[name][0], name
    assert set(padding.whole) >= {"scores", "first"}
    assert "do not say which rows are which tokens" in padding.notes()[0]
    assert padding.tokens_of(program.inputs[0], ids, None) is ids


def test_of_fixed_sizes_the_first_axes_count() -> None:
    program = Program.parse(
        "def main(input_ids: i64[3, 4], attention_mask: i64[3, 4], *, t: f32[9, 6]):\n"
        "    x = aten.embedding.default(t, input_ids)\n    y = aten.flatten.using_ints(x, 0, 1)\n"
        "    z = aten.transpose.int(x, 1, 2)\n"
        '    return {"x": x, "y": y, "z": z}'
    )
    x = torch.arange(72.0).reshape(3, 4, 6)
    padding = Padding(program)
    node = {n.name: n for n in program.nodes}
    assert torch.equal(padding.tokens_of(node["x"], x, MASK), x[MASK][None])
    assert torch.equal(padding.tokens_of(node["y"], x.flatten(0, 1), MASK), x[MASK])
    assert padding.notes() == []
    assert padding.tokens_of(node["z"], x.mT, MASK).shape == (3, 6, 4)
    assert list(padding.whole) == ["z"]
