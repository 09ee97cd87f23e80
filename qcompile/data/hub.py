"""Documents of Hugging Face datasets, through the `datasets` library where it is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qcompile.errors import QCompileError

_SHUFFLED = 1000  # documents of a stream that are shuffled at a time


@dataclass(frozen=True)
class HubDataset:
    """Where a dataset stands and what in it is text.

    Args:
        repo: hub id. `config`: its configuration, if it has several.
        calibration, evaluation: splits; `evaluation_repo` where the second stands elsewhere.
        joined: its rows are lines of one text.
    """

    repo: str
    config: str | None = None
    calibration: str = "train"
    evaluation: str = "test"
    field: str = "text"
    joined: bool = False
    evaluation_repo: str | None = None


KNOWN = {
    "wikitext2": HubDataset("Salesforce/wikitext", "wikitext-2-raw-v1", joined=True),
    "c4": HubDataset("allenai/c4", "en", evaluation="validation"),
    "pile": HubDataset(
        "monology/pile-uncopyrighted", evaluation="validation", evaluation_repo="mit-han-lab/pile-val-backup"
    ),
    "pileval": HubDataset("mit-han-lab/pile-val-backup", calibration="validation", evaluation="validation"),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "sample-10BT", evaluation="train"),
    "cnn_dailymail": HubDataset("abisee/cnn_dailymail", "3.0.0", field="article"),
}


def find_dataset(name: str) -> HubDataset:
    """A dataset by its short name, or any hub id: ``owner/name``, ``owner/name:config``, ``owner/name:config:split``.

    Raises QCompileError for a name that is neither.
    """
    if name in KNOWN:
        return KNOWN[name]
    repo, *rest = name.split(":")
    if "/" not in repo or len(rest) > 2:
        raise QCompileError(
            f"data {name!r} is no file and no known dataset; give 'generated', a path, one of {', '.join(KNOWN)}, "
            "or a hub id owner/name[:config[:split]]"
        )
    config = rest[0] if rest and rest[0] else None
    if len(rest) == 2:
        return HubDataset(repo, config, calibration=rest[1], evaluation=rest[1])
    return HubDataset(repo, config)


def hub_documents(name: str, evaluation: bool, seed: int, field: str | None = None) -> Iterator[str]:
    """Texts of a dataset: for calibration shuffled by `seed`, for evaluation in order. Long ones are streamed.

    Raises QCompileError where `datasets` is missing, the hub cannot be reached, or there is no such text in it.
    """
    dataset = find_dataset(name)
    try:
        load_dataset = importlib.import_module("datasets").load_dataset  # not a dependency
    except ImportError:
        raise QCompileError(
            f"dataset {name!r} needs the datasets package: pip install datasets, or give a text file or 'generated'"
        ) from None
    repo = dataset.evaluation_repo or dataset.repo if evaluation else dataset.repo
    split = dataset.evaluation if evaluation else dataset.calibration
    try:
        rows = load_dataset(repo, dataset.config, split=split, streaming=not dataset.joined)
        if not evaluation and not dataset.joined:
            rows = rows.shuffle(seed=seed, buffer_size=_SHUFFLED)
        texts = _texts(rows, name, field or dataset.field)
        if dataset.joined:
            yield "\n\n".join(texts)
        else:
            yield from texts
    except QCompileError:
        raise
    except Exception as error:  # the library lets the errors of several network libraries through
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise QCompileError(
            f"dataset {name!r} ({repo}, split {split!r}) could not be read: {reason}; give a text file or 'generated'"
        ) from error


def _texts(rows: Any, name: str, field: str) -> Iterator[str]:
    for row in rows:
        if not isinstance(row.get(field), str):
            raise QCompileError(f"dataset {name!r} has no text under {field!r}; it has {sorted(row)}: give field=")
        yield row[field]
