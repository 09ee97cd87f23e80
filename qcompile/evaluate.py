"""How well a model predicts text, and how far it is from another: perplexity, KL divergence, agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qcompile.data.batches import Batches, Passages
from qcompile.errors import QCompileError
from qcompile.generate import held_weights
from qcompile.ir.program import Program
from qcompile.progress import track

if TYPE_CHECKING:
    from rich.table import Table

Model = Callable[[Tensor], Any]
"""Token ids int64 ``[batch, sequence]`` → logits ``[batch, sequence, vocabulary]`` (or an object that has `logits`): a
`Program`, a compiled model, an artifact in its own runtime, a transformers model."""

RESAMPLES = 1000
_LOGIT_BYTES = 256 << 20  # of the logits of one call
_CHUNK = 1 << 22  # logits whose logarithms are held at a time


@dataclass(frozen=True)
class Measure:
    """A mean per token and its standard error over sequences (None with a single one).

    Sequences, not tokens, are taken as independent: the mean is the ratio of two sums over sequences and its error that
    of a ratio estimator (Cochran, Sampling Techniques, section 2.11), so that long sequences weigh by their tokens.
    `interval`: the middle 95% of the means of samples drawn from the sequences, with a seed (the percentile bootstrap,
    Efron 1979).
    """

    mean: float
    stderr: float | None
    interval: tuple[float, float] | None = field(default=None, compare=False)

    @classmethod
    def of(cls, sums: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> Measure:
        """From the sum of each sequence, float64 ``[sequences]``, and its number of tokens."""
        total, sequences = float(counts.sum()), len(counts)
        mean = float(sums.sum()) / total
        if sequences < 2 or not math.isfinite(mean):
            return cls(mean, None)
        residual = float(((sums - mean * counts) ** 2).sum())
        return cls(mean, math.sqrt(residual * sequences / (sequences - 1)) / total, _interval(sums, counts))

    def __str__(self) -> str:
        return f"{self.mean:.5g}" if self.stderr is None else f"{self.mean:.5g} ± {self.stderr:.2g}"


def _interval(sums: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> tuple[float, float]:
    """See `Measure`; sequences are drawn with replacement, as many as there are."""
    random = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        drawn = random.integers(len(counts), size=len(counts))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. Figures against a reference are None where there was none.

    Args:
        nats: −log of the probability of the right token.
        nats_per_character: the same, shared out over characters; None where their number is not known.
        reference_nats: the reference's own.
        excess_nats: the candidate's less the reference's, token by token: its error is that of the difference.
        kl: KL(reference ‖ candidate) of the distributions over the vocabulary, in nats.
        top1: share of tokens where both think the same token likeliest.
        tokens, sequences: how many were scored; `data`, `fingerprint`: which.
    """

    nats: Measure
    nats_per_character: float | None
    reference_nats: Measure | None
    excess_nats: Measure | None
    kl: Measure | None
    top1: Measure | None
    tokens: int
    sequences: int
    data: str
    fingerprint: str

    @property
    def perplexity(self) -> float:
        """exp of the mean of `nats`."""
        return _exp(self.nats.mean)

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of `perplexity`, to first order."""
        return None if self.nats.stderr is None else self.perplexity * self.nats.stderr

    @property
    def reference_perplexity(self) -> float | None:
        """exp of the mean of `reference_nats`."""
        return None if self.reference_nats is None else _exp(self.reference_nats.mean)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "perplexity": self.perplexity,
            "perplexity_stderr": self.perplexity_stderr,
            "reference_perplexity": self.reference_perplexity,
            **asdict(self),
        }

    def table(self) -> Table:
        """For people: `rich` prints it."""
        from rich.table import Table

        table = Table(title=f"{self.tokens:,} tokens of {self.sequences:,} sequences", caption=self.data)
        table.add_column("measure")
        table.add_column("value", justify="right")
        table.add_column("± standard error", justify="right")
        rows: list[tuple[str, float | None, float | None]] = [
            ("perplexity per token", self.perplexity, self.perplexity_stderr),
            ("nats per token", self.nats.mean, self.nats.stderr),
            ("nats per character", self.nats_per_character, None),
            ("reference's perplexity", self.reference_perplexity, None),
        ]
        for name, measure in (
            ("nats per token above the reference's", self.excess_nats),
            ("KL(reference ‖ this) per token, nats", self.kl),
            ("same likeliest token", self.top1),
        ):
            rows.append((name, measure.mean, measure.stderr) if measure is not None else (name, None, None))
        for name, value, error in rows:
            if value is not None:
                table.add_row(name, f"{value:.5g}", "" if error is None else f"{error:.2g}")
        return table

    def __rich__(self) -> Table:
        return self.table()


def evaluate(
    candidate: Model,
    reference: Model | None = None,
    *,
    data: Batches | Passages | Tensor,
    batch: int = 8,
    quiet: bool = False,
) -> Evaluation:
    """Measure `candidate` on `data`, and against `reference` where one is given; deterministic.

    Models are called with the token ids of sequences of one length: nothing is ever padded, because scales that are
    computed at run time would see the padding. Logits are held for one call of each at a time, and no more than
    256 MiB of them where more than one sequence goes in a call; sums are float64, logarithms float32 (float64 where
    the logits are).

    Args:
        candidate, reference: see `Model`.
        data: tokens; rows of batches and tensors are scored from their second token.
        batch: sequences in a call, at most.
        quiet: show no progress.

    Raises:
        QCompileError: logits of the wrong shape, or not numbers.
    """
    passages = Passages.of(data)
    count = len(passages.sequences)
    table = np.zeros((count, len(_COLUMNS)))
    with ExitStack() as stack:
        for model in (candidate, reference):
            program = getattr(model, "program", model)
            if isinstance(program, Program):
                stack.enter_context(held_weights(program))
        groups = _Groups(passages, batch)
        bar = iter(track(range(count), "evaluating", quiet=quiet))
        for group in groups:
            ids = torch.stack([passages.sequences[i] for i in group])
            logits = _logits(candidate, ids, "candidate")
            other = None if reference is None else _logits(reference, ids, "reference")
            if other is not None and other.shape != logits.shape:
                raise QCompileError(
                    f"candidate's logits are {list(logits.shape)}, reference's {list(other.shape)}; "
                    "both must have one vocabulary"
                )
            groups.logit_bytes = logits.shape[-1] * logits.element_size()
            for row, index in enumerate(group):
                first = passages.scored_from[index]
                window = slice(first - 1, ids.shape[1] - 1)
                theirs = None if other is None else other[row, window]
                table[index] = _sums(logits[row, window], theirs, ids[row, first:])
                if not np.isfinite(table[index]).all():
                    _explain(logits[row, window], theirs, index)
                next(bar, None)
        next(bar, None)
    return _result(passages, table, reference is not None)


_COLUMNS = ("tokens", "nats", "reference_nats", "excess", "kl", "top1")


def _result(passages: Passages, table: np.ndarray[Any, Any], against: bool) -> Evaluation:
    counts = table[:, 0]
    measures = dict(zip(_COLUMNS[1:], (Measure.of(column, counts) for column in table.T[1:]), strict=True))
    characters = passages.characters
    return Evaluation(
        nats=measures["nats"],
        nats_per_character=float(table[:, 1].sum()) / characters if characters else None,
        reference_nats=measures["reference_nats"] if against else None,
        excess_nats=measures["excess"] if against else None,
        kl=measures["kl"] if against else None,
        top1=measures["top1"] if against else None,
        tokens=int(counts.sum()),
        sequences=len(table),
        data=passages.describe(),
        fingerprint=passages.fingerprint,
    )


class _Groups:
    """Indices of sequences of one length, as many at a time as `batch` and the size of the logits allow.

    The first call takes a single sequence: it shows how large the vocabulary is.
    """

    def __init__(self, passages: Passages, batch: int) -> None:
        if batch < 1:
            raise QCompileError(f"batch is {batch}; give 1 or more")
        self.batch, self.logit_bytes = batch, 0
        self.by_length: dict[int, list[int]] = {}
        for index, ids in enumerate(passages.sequences):
            self.by_length.setdefault(len(ids), []).append(index)

    def __iter__(self) -> Iterator[list[int]]:
        for length, indices in sorted(self.by_length.items()):
            done = 0
            while done < len(indices):
                size = min(self.batch, _LOGIT_BYTES // (self.logit_bytes * length)) if self.logit_bytes else 1
                size = max(1, size)
                yield indices[done : done + size]
                done += size


@torch.no_grad()
def _logits(model: Model, ids: Tensor, who: str) -> Tensor:
    output = model(ids)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        logits = torch.as_tensor(np.asarray(logits))
    if logits.ndim != 3 or logits.shape[:2] != ids.shape or not logits.is_floating_point():
        raise QCompileError(
            f"{who} returned {logits.dtype}{list(logits.shape)} for token ids {list(ids.shape)}; "
            "it must return floating-point logits [batch, sequence, vocabulary]"
        )
    if int(ids.max()) >= logits.shape[-1]:
        raise QCompileError(
            f"data has token {int(ids.max())}, {who} a vocabulary of {logits.shape[-1]}; use its tokenizer"
        )
    return logits.detach().cpu()


def _sums(logits: Tensor, other: Tensor | None, targets: Tensor) -> list[float]:
    """Sums over the tokens of one sequence, in the order of `_COLUMNS`; logits ``[tokens, vocabulary]``."""
    totals = [0.0] * len(_COLUMNS)
    size = max(1, _CHUNK // logits.shape[-1])
    for at in range(0, len(targets), size):
        chunk = slice(at, at + size)
        log_q = _log_probabilities(logits[chunk])
        nats = -log_q.gather(1, targets[chunk, None])[:, 0].double()
        totals[0] += len(nats)
        totals[1] += float(nats.sum())
        if other is None:
            continue
        log_p = _log_probabilities(other[chunk])
        nats_p = -log_p.gather(1, targets[chunk, None])[:, 0].double()
        totals[2] += float(nats_p.sum())
        totals[3] += float(torch.where(nats == nats_p, 0.0, nats - nats_p).sum())  # ∞ − ∞ is no difference
        p = log_p.exp()
        # what has no probability adds nothing, even where both logarithms are −∞
        terms = torch.where(p > 0, p * (log_p - log_q), 0.0)
        totals[4] += float(terms.sum(dtype=torch.float64))
        totals[5] += float((logits[chunk].argmax(-1) == other[chunk].argmax(-1)).sum())
    return totals


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _explain(logits: Tensor, other: Tensor | None, index: int) -> None:
    """Raise where logits are not numbers; a probability of zero is an infinite loss, and a result."""
    for who, tensor in (("candidate", logits), ("reference", other)):
        if tensor is not None and bool((tensor.isnan() | (tensor == math.inf)).any()):
            bad = (tensor.isnan() | (tensor == math.inf)).any(-1).nonzero()
            raise QCompileError(
                f"{who}'s logits are not finite in sequence {index}, at {len(bad)} of {len(tensor)} tokens (first "
                f"{int(bad[0])}): a scale or an activation overflowed; `qcompile bisect` names the pass"
            )


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def compare_logits(a: Tensor, b: Tensor) -> float:
    """max |a − b| / max |b|, in float64: how far `a` is from the trusted `b`.

    Equal elements, even infinite ones, differ by nothing; any other that is not finite makes the result infinite.
    Raises QCompileError for tensors of unlike shapes.
    """
    if a.shape != b.shape:
        raise QCompileError(f"logits {list(a.shape)} and {list(b.shape)} cannot be compared; make their shapes alike")
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    difference = torch.where(a == b, 0.0, (a - b).abs())
    if not difference.numel() or not bool(difference.any()):
        return 0.0
    scale = float(torch.where(b.isfinite(), b.abs(), 0.0).max())
    worst = float(torch.where(difference.isnan(), math.inf, difference).max())
    return worst / scale if scale > 0 else math.inf
