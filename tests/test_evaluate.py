"""Evaluation against a slow, plain reference in numpy, and what it must refuse."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import qcompile.evaluate as evaluation
from qcompile.data import Batches, Passages
from qcompile.errors import QCompileError
from qcompile.evaluate import Measure, compare_logits, evaluate
from qcompile.ir.program import Program

V = 11


class Table:
    """Logits that depend on the token and its place; it counts and checks its calls."""

    def __init__(self, seed: int, spread: float = 2.0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = (spread * torch.randn(V, V, generator=generator)).to(dtype)
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.calls.append(tuple(ids.shape))
        return self.rows[ids] * torch.linspace(1, 2, ids.shape[1])[:, None].to(self.rows.dtype)


def ragged() -> Passages:
    """Sequences of several lengths, some scored from later on."""
    generator = torch.Generator().manual_seed(4)
    lengths, starts = (5, 9, 5, 2, 9, 5), (1, 4, 1, 1, 8, 2)
    sequences = tuple(torch.randint(0, V, (n,), generator=generator) for n in lengths)
    return Passages(sequences, starts, characters=50, source="made up")


def plain(model: Table, other: Table, passages: Passages) -> dict[str, list[list[float]]]:
    """Token by token, in float64, straight from the definitions."""
    out: dict[str, list[list[float]]] = {"nats": [], "reference": [], "kl": [], "top1": []}
    for ids, first in zip(passages.sequences, passages.scored_from, strict=True):
        rows: dict[str, list[float]] = {name: [] for name in out}
        q_all, p_all = model(ids[None])[0].double().numpy(), other(ids[None])[0].double().numpy()
        for place in range(first, len(ids)):
            q = np.exp(q_all[place - 1]) / np.exp(q_all[place - 1]).sum()
            p = np.exp(p_all[place - 1]) / np.exp(p_all[place - 1]).sum()
            token = int(ids[place])
            rows["nats"].append(-math.log(q[token]))
            rows["reference"].append(-math.log(p[token]))
            rows["kl"].append(sum(p[v] * math.log(p[v] / q[v]) for v in range(V)))
            rows["top1"].append(float(np.argmax(p) == np.argmax(q)))
        for name, values in rows.items():
            out[name].append(values)
    return out


def mean_and_error(values: list[list[float]]) -> tuple[float, float]:
    """Mean per token, and the error of it if sequences were drawn again."""
    tokens = sum(map(len, values))
    mean = sum(map(sum, values)) / tokens
    squares = sum((sum(v) - mean * len(v)) ** 2 for v in values)
    return mean, math.sqrt(len(values) / (len(values) - 1) * squares) / tokens


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
@pytest.mark.parametrize("batch", [1, 8])
def test_against_the_plain_reference(chunk: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_CHUNK", chunk)
    passages, model, other = ragged(), Table(0), Table(1)
    truth = plain(model, other, passages)
    result = evaluate(model, other, data=passages, batch=batch)
    assert result.nats.stderr is not None
    assert (result.nats.mean, result.nats.stderr) == pytest.approx(mean_and_error(truth["nats"]), rel=1e-6)
    assert (result.kl.mean, result.kl.stderr) == pytest.approx(mean_and_error(truth["kl"]), rel=1e-5)
    assert (result.top1.mean, result.top1.stderr) == pytest.approx(mean_and_error(truth["top1"]))
    assert result.reference_nats is not None
    assert result.reference_nats.mean == pytest.approx(mean_and_error(truth["reference"])[0], rel=1e-6)
    excess = [
        [a - b for a, b in zip(x, y, strict=True)] for x, y in zip(truth["nats"], truth["reference"], strict=True)
    ]
    assert (result.excess_nats.mean, result.excess_nats.stderr) == pytest.approx(mean_and_error(excess), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(mean_and_error(truth["nats"])[0]), rel=1e-6)
    assert result.nats_per_character == pytest.approx(sum(map(sum, truth["nats"])) / 50, rel=1e-6)
    assert (result.tokens, result.sequences) == (passages.scored, 6)


def test_a_model_is_nothing_away_from_itself() -> None:
    result = evaluate(Table(0), Table(0), data=ragged())
    assert result.kl == result.excess_nats == Measure(0.0, 0.0)
    assert result.top1 == Measure(1.0, 0.0)


def test_float64_models_are_measured_in_float64() -> None:
    model, near = Table(0, dtype=torch.float64), Table(0, dtype=torch.float64)
    near.rows = near.rows + 1e-7 * torch.randn(V, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = evaluate(near, model, data=ragged())
    assert result.kl is not None
    truth, _ = mean_and_error(plain(near, model, ragged())["kl"])
    assert 1e-16 < result.kl.mean < 1e-12
    assert result.kl.mean == pytest.approx(truth, rel=0.1, abs=1e-16)


def test_nothing_is_padded_and_calls_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Table(0)
    evaluate(model, data=ragged())
    assert model.calls == [(1, 2), (3, 5), (2, 9)]
    monkeypatch.setattr(evaluation, "_LOGIT_BYTES", 2 * 6 * V * 4)  # two rows of six tokens
    model = Table(0)
    evaluate(model, data=torch.zeros(5, 6, dtype=torch.int64))
    assert model.calls == [(1, 6), (2, 6), (2, 6)]


def test_rows_and_batches_give_the_same() -> None:
    rows = torch.randint(0, V, (5, 6), generator=torch.Generator().manual_seed(0))
    by_rows, by_batches = evaluate(Table(0), data=rows), evaluate(Table(0), data=Batches(rows, batch=2))
    assert by_rows == by_batches
    assert by_rows.kl is None
    assert evaluate(Table(0), data=rows[:1]).nats.stderr is None


def test_a_program_and_an_object_with_logits_are_models() -> None:
    program = Program.parse(
        f"def main(input_ids: i64[batch, sequence], *, table: f32[{V}, {V}]):\n"
        '    logits = aten.embedding.default(table, input_ids)\n    return {"logits": logits}',
        {"table": Table(0).rows},
    )

    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    result = evaluate(lambda ids: Output(Table(0).rows[ids]), program, data=ragged())
    assert result.kl == Measure(0.0, 0.0)


def test_an_impossible_token_is_an_infinite_loss_not_an_error() -> None:
    model = Table(0)
    model.rows[:, 3] = -math.inf
    data = torch.tensor([[1, 3, 2], [3, 1, 2]])
    result = evaluate(model, model, data=data)
    assert result.perplexity == math.inf
    assert result.kl == result.excess_nats == Measure(0.0, 0.0)
    against = evaluate(model, Table(0), data=data)
    assert against.kl == Measure(math.inf, None)


def test_plain_data_and_table() -> None:
    result = evaluate(Table(0), Table(1), data=ragged())
    data = json.loads(json.dumps(result.to_dict()))
    assert data["perplexity"] == result.perplexity
    assert data["kl"]["mean"] == result.kl.mean  # type: ignore[union-attr]
    out = io.StringIO()
    Console(file=out, width=100).print(result)
    assert "perplexity per token" in out.getvalue()
    assert "made up" in out.getvalue()


def broken(value: float) -> Table:
    model = Table(0)
    model.rows[2, 3] = value
    return model


@pytest.mark.parametrize(
    ("candidate", "reference", "data", "message"),
    [
        (broken(math.nan), None, torch.tensor([[0, 1, 1], [1, 2, 2]]), "logits are not finite in sequence 1"),
        (Table(0), broken(math.inf), torch.tensor([[2, 2, 2]]), "reference's logits are not finite in sequence 0"),
        (lambda ids: ids, None, torch.tensor([[1, 2]]), "must return floating-point logits"),
        (lambda ids: torch.zeros(1, 1, 3), None, torch.tensor([[1, 2]]), "must return floating-point logits"),
        (lambda ids: torch.zeros(1, 2, 3), Table(0), torch.tensor([[1, 2]]), "both must have one vocabulary"),
        (lambda ids: torch.zeros(1, 2, 3), None, torch.tensor([[1, 5]]), "token 5, candidate a vocabulary of 3"),
        (Table(0), None, torch.tensor([[1]]), "nothing to predict"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(candidate: object, reference: object, data: Tensor, message: str) -> None:
    with pytest.raises(QCompileError, match=message):
        evaluate(candidate, reference, data=data)  # type: ignore[arg-type]


def test_compare_logits() -> None:
    b = torch.tensor([1.0, -4.0, -math.inf])
    assert compare_logits(b, b) == 0
    assert compare_logits(torch.tensor([1.0, -3.0, -math.inf]), b) == 0.25
    assert compare_logits(torch.tensor([1.0, math.nan, -math.inf]), b) == math.inf
    assert compare_logits(torch.tensor([1.0, -4.0, 0.0]), b) == math.inf
    assert compare_logits(torch.ones(2), torch.zeros(2)) == math.inf
    assert compare_logits(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(QCompileError, match="cannot be compared"):
        compare_logits(torch.zeros(2), torch.zeros(3))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Sums of sequences of unlike lengths around a known mean; and the interval is near mean ± 1.96 standard errors."""
    random, inside = np.random.default_rng(1), 0
    for _ in range(200):
        counts = random.integers(5, 50, 60).astype(float)
        measure = Measure.of(counts * 2.0 + random.normal(0, 1, 60) * np.sqrt(counts), counts)
        assert measure.interval is not None
        assert measure.stderr is not None
        low, high = measure.interval
        assert low < measure.mean < high
        assert high - low == pytest.approx(2 * 1.96 * measure.stderr, rel=0.2)
        inside += low <= 2.0 <= high
    assert 0.88 < inside / 200 < 0.99
    assert Measure.of(np.array([1.0]), np.array([2.0])).interval is None
