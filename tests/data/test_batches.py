"""Batches with padding, and batches of inputs by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qcompile.data import Batches, InputBatches, Passages, load_batches, load_passages
from qcompile.data.batches import feeds, samples_of, token_mask, tokens_in
from qcompile.errors import QCompileError

ROWS = torch.tensor([[5, 6, 7], [8, 9, 0], [4, 0, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])


def test_with_a_mask_batches_are_inputs_by_name() -> None:
    data = Batches(ROWS, 2, mask=MASK)
    for _ in range(2):
        first, second = data
        assert list(first) == ["input_ids", "attention_mask"]
        assert torch.equal(first["attention_mask"], MASK[:2])
        assert torch.equal(second["input_ids"], ROWS[2:])
        assert first["attention_mask"].dtype == torch.int64
    assert len(data) == 2
    assert data.describe() == "3 × 3 tokens (6 without padding), given tokens"
    assert [tokens_in(batch) for batch in data] == [5, 1]


def test_the_fingerprint_covers_the_mask() -> None:
    plain, masked = Batches(ROWS), Batches(ROWS, mask=MASK)
    other = Batches(ROWS, mask=torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0]]))
    assert len({plain.fingerprint, masked.fingerprint, other.fingerprint}) == 3
    assert masked.fingerprint == Batches(ROWS, 1, "elsewhere", MASK.bool()).fingerprint
    ones = Batches(ROWS, mask=torch.ones_like(ROWS))
    assert ones.mask is None
    assert ones.fingerprint == plain.fingerprint
    assert all(isinstance(batch, Tensor) for batch in ones)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:2], r"mask is torch.int64\[2, 3\]; give integers \[3, 3\]"),
        (MASK.float(), "mask is torch.float32"),
        (2 * MASK, "mask holds 0 to 2; give 1 for tokens"),
        (MASK.flip(1), "mask row 1 does not begin with tokens and end in padding; pad on the right"),
        (torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0]]), "mask row 1 does not begin"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(QCompileError, match=message):
        Batches(ROWS, mask=mask)


def test_what_a_batch_says() -> None:
    assert list(feeds(ROWS)) == ["input_ids"]
    assert token_mask(ROWS) is None
    assert tokens_in(ROWS) == 9
    padded = {"input_ids": ROWS, "attention_mask": MASK}
    assert feeds(padded) is padded
    found = token_mask(padded)
    assert found is not None
    assert torch.equal(found, MASK.bool())
    behind_a_cache = {"input_ids": ROWS, "attention_mask": torch.cat([torch.ones_like(MASK), MASK], 1)}
    found = token_mask(behind_a_cache)
    assert found is not None
    assert torch.equal(found, MASK.bool())
    assert token_mask({"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS)}) is None
    pixels = {"pixel_values": torch.zeros(4, 3, 2, 2)}
    assert token_mask(pixels) is None
    assert tokens_in(pixels) == samples_of(pixels) == 4


def test_inputs_by_name() -> None:
    batches = ({"a": torch.zeros(2, 3)}, {"a": torch.ones(1, 3)})
    data = InputBatches(batches)
    assert [torch.equal(x["a"], y["a"]) for x, y in zip(data, batches, strict=True)] == [True, True]
    assert (len(data), data.samples) == (2, 3)
    assert data.fingerprint == InputBatches(({"a": torch.zeros(2, 3)}, {"a": torch.ones(1, 3)}), "x").fingerprint
    for other in ({"b": torch.ones(1, 3)}, {"a": torch.ones(3, 1)}, {"a": torch.ones(1, 3).half()}):
        assert data.fingerprint != InputBatches((batches[0], other)).fingerprint
    with pytest.raises(QCompileError, match="no samples"):
        InputBatches(())


def test_masks_come_along_from_any_source(tmp_path: object) -> None:
    path = f"{tmp_path}/rows.safetensors"
    save_file({"input_ids": ROWS, "attention_mask": MASK}, path)
    batch = {"input_ids": ROWS, "attention_mask": MASK}
    narrow = [{k: v[:1] for k, v in batch.items()}, {k: v[1:, :2] for k, v in batch.items()}]
    lists = [{k: v.tolist() for k, v in batch.items()}]
    for source in (path, [batch], narrow, lists, [{k: np.asarray(v) for k, v in batch.items()}]):
        data = load_batches(source, samples=3, length=3)
        assert data.fingerprint == Batches(ROWS, mask=MASK).fingerprint
    assert load_batches([batch], samples=3, length=1).mask is None
    scored = load_passages([batch], length=3)
    assert [ids.tolist() for ids in scored.sequences] == [[5, 6, 7], [8, 9]]
    assert [ids.tolist() for ids in Passages.of(Batches(ROWS, mask=MASK)).sequences] == [[5, 6, 7], [8, 9]]


def test_rows_of_a_data_set_are_documents() -> None:
    rows = [{"input_ids": r.tolist(), "attention_mask": m.tolist()} for r, m in zip(ROWS, MASK, strict=True)]
    assert load_batches(rows, samples=1, length=6).tokens.tolist() == [[5, 6, 7, 8, 9, 4]]
    with pytest.raises(QCompileError, match=r"attention_mask is \[2\], input_ids \[3\]; make them alike"):
        load_batches([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}], samples=1, length=3)
    with pytest.raises(QCompileError, match=r"lengths \[2, 3\]; make them one length, or give an attention_mask"):
        load_batches([ROWS, ROWS[:, :2]], samples=1, length=2)
