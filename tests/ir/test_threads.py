"""Tasks in threads: order, errors, modes, and what they leave of torch's settings."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from qcompile.hadamard.rotation import Hadamard
from qcompile.ir.edits import AlongAxis, Chain, apply_edits, edited_pieces, large_buffers_kept
from qcompile.ir.threads import in_order


@pytest.fixture(autouse=True, params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order(threads: int) -> None:
    def task(i: int) -> tuple[int, str, int]:
        time.sleep(0.002 * (i % 3))
        return i, threading.current_thread().name, torch.get_num_threads()

    numbers, names, inside = zip(*in_order([partial(task, i) for i in range(20)]), strict=True)
    assert list(numbers) == list(range(20))
    assert len(set(names)) == threads
    assert set(inside) == {1}
    assert torch.get_num_threads() == threads
    new = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    seen: list[int] = []
    new.start()
    new.join()
    assert seen == [threads]  # other new threads are left as they were


def test_an_error_is_raised_in_its_turn_and_the_rest_is_dropped(threads: int) -> None:
    begun: list[int] = []

    def task(i: int) -> int:
        begun.append(i)
        if i == 2:
            raise ValueError("two")
        return i

    results = in_order([partial(task, i) for i in range(100)])
    assert (next(results), next(results)) == (0, 1)
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(begun) < 20


@pytest.mark.parametrize("inference", [False, True])
def test_modes_are_the_callers(inference: bool) -> None:
    with torch.inference_mode(inference), torch.set_grad_enabled(False):
        modes = list(in_order([lambda: (torch.is_inference_mode_enabled(), torch.is_grad_enabled())] * 4))
    assert set(modes) == {(inference, False)}


def test_buffers_serve_one_mode_after_the_other_and_one_weight_after_the_other() -> None:
    rotation, weights = Hadamard(64, 64, 1), [torch.randn(64, 96), torch.randn(64, 32), torch.randn(64, 128)]
    for inference in (True, False, True):
        for weight in weights:
            turn = AlongAxis(0, lambda vectors: rotation.apply(vectors.contiguous(), -1))
            part = AlongAxis(1, lambda vectors: vectors[..., 3:], width=weight.shape[1] - 3)  # a view of a buffer
            edits = (turn, part, AlongAxis(1, lambda vectors: 2 * vectors), AlongAxis(0, torch.clone), turn)
            with torch.inference_mode(inference), large_buffers_kept():
                got = apply_edits(edits, weight, piece_bytes=2048)
                pieces = [p.clone() for p in edited_pieces(Chain((*edits, part.__class__(1, torch.neg))), weight, 2048)]
            matrix = rotation.matrix(torch.float32)
            torch.testing.assert_close(got, 2 * (matrix @ matrix @ weight)[:, 3:])
            assert len(pieces) > 1
            assert torch.equal(torch.cat(pieces), -got)
