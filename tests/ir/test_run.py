"""Running: inputs are checked, a decoder's are filled in, failures say where."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import fill

DECODER = """\
def main(
    input_ids: i64[batch, sequence],
    attention_mask: i64[batch, past + sequence],
    position_ids: i64[batch, sequence],
    past_key_values_0_key: f16[batch, 2, past, 8],
):
    p = aten.add.Tensor(input_ids, position_ids)
    m = aten.neg.default(attention_mask)
    k = aten.neg.default(past_key_values_0_key)
    logits = aten.to.dtype(p, torch.float32)
    return {"logits": logits, "present_0_key": k, "mask": m}"""


@pytest.fixture
def decoder() -> Program:
    return Program.parse(DECODER)


def test_fills_an_empty_cache(decoder: Program) -> None:
    feeds = fill(decoder, {"input_ids": torch.tensor([[5, 6, 7], [1, 2, 3]])})
    assert feeds["past_key_values_0_key"].shape == (2, 2, 0, 8)
    assert feeds["past_key_values_0_key"].dtype == torch.float16
    assert torch.equal(feeds["attention_mask"], torch.ones(2, 3, dtype=torch.int64))
    assert feeds["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]


def test_positions_follow_the_cache(decoder: Program) -> None:
    past = torch.zeros(1, 2, 4, 8, dtype=torch.float16)
    feeds = fill(decoder, {"input_ids": torch.tensor([[5, 6]]), "past_key_values_0_key": past})
    assert feeds["attention_mask"].shape == (1, 6)
    assert feeds["position_ids"].tolist() == [[4, 5]]


def test_positions_count_what_the_mask_lets_through(decoder: Program) -> None:
    mask = torch.tensor([[0, 0, 1, 1]])
    feeds = fill(decoder, {"input_ids": torch.tensor([[9, 9, 5, 6]]), "attention_mask": mask})
    assert feeds["position_ids"].tolist() == [[0, 0, 0, 1]]
    assert feeds["attention_mask"] is mask


def test_what_is_given_is_kept(decoder: Program) -> None:
    positions = torch.tensor([[7, 8]])
    feeds = fill(decoder, {"input_ids": torch.tensor([[5, 6]]), "position_ids": positions})
    assert feeds["position_ids"] is positions


@pytest.mark.parametrize("shape", [(0,), (1, 0), (0, 3), (3,), (1, 2, 3)])
def test_an_empty_or_flat_prompt(decoder: Program, shape: tuple[int, ...]) -> None:
    with pytest.raises(QCompileError, match="give at least one token as"):
        decoder(torch.zeros(shape, dtype=torch.int64))


def test_calling_returns_logits_running_returns_all(decoder: Program) -> None:
    ids = torch.tensor([[5, 6]])
    assert decoder(ids).tolist() == [[5.0, 7.0]]
    assert decoder(input_ids=ids).tolist() == [[5.0, 7.0]]
    assert list(decoder.run(fill(decoder, {"input_ids": ids}))) == ["logits", "present_0_key", "mask"]


def test_other_programs_return_their_output_or_outputs() -> None:
    text = 'def main(x: f32[2]):\n    y = aten.neg.default(x)\n    return {"y": y}'
    assert Program.parse(text)(torch.ones(2)).tolist() == [-1, -1]
    both = Program.parse(text.replace('{"y": y}', '{"y": y, "x": x}'))(torch.ones(2))
    assert [t.tolist() for t in both] == [[-1, -1], [1, 1]]


def test_bad_inputs() -> None:
    program = Program.parse(
        'def main(x: f32[n, 2], y: i64[n]):\n    z = aten.neg.default(x)\n    return {"z": z, "y": y}'
    )
    x, y = torch.ones(3, 2), torch.ones(3, dtype=torch.int64)
    cases = [
        ({"x": x}, r"input 'y' is missing; the program takes \['x', 'y'\]"),
        ({"x": x, "y": y, "q": y}, "input 'q' is unknown"),
        ({"x": x.double(), "y": y}, r"input 'x' is torch.float64\[3, 2\]; the program takes f32\[n, 2\]"),
        ({"x": x[0], "y": y}, r"input 'x' is torch.float32\[2\]"),
        ({"x": x, "y": y.int()}, "input 'y' is torch.int32"),
    ]
    for feeds, message in cases:
        with pytest.raises(QCompileError, match=message):
            program.run(feeds)
    with pytest.raises(TypeError, match="3 inputs given, the program has"):
        program(x, y, y)


def test_a_failure_names_the_call() -> None:
    call = "y = aten.linear.default(x, w)  # layers.0.proj"
    program = Program.parse(f'def main(x: f32[n, 2], *, w: f32[3, 2]):\n    {call}\n    return {{"y": y}}')
    with pytest.raises(RuntimeError) as caught:
        program.run({"x": torch.ones(3, 4)})
    assert any("aten.linear.default" in note and "'layers.0.proj'" in note for note in caught.value.__notes__)
