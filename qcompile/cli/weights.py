"""`qcompile inspect --spec`: what specs would do to each weight of a file, one tensor in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from qcompile.capture.files import find_directory, read_header, read_shards
from qcompile.cli.show import console, print_json
from qcompile.errors import CaptureError, SpecError
from qcompile.ir.weights import TensorSource
from qcompile.numerics.qtensor import quantize_tensor
from qcompile.numerics.spec import QuantSpec
from qcompile.progress import track

_SLICE = 1 << 20


@dataclass(frozen=True)
class Loss:
    """What a spec costs on a tensor, or on several: stored bits, and the squares of the values and of what is lost."""

    bits: float
    elements: int
    signal: float
    noise: float

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.bits + other.bits,
            self.elements + other.elements,
            self.signal + other.signal,
            self.noise + other.noise,
        )

    @property
    def relative(self) -> float | None:
        """Squared error over squared values; None for zeros."""
        return self.noise / self.signal if self.signal > 0 else None

    @property
    def sqnr_db(self) -> float | None:
        """None where nothing is lost."""
        return -10 * math.log10(self.relative) if self.relative else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "bits_per_weight": self.bits / self.elements,
            "relative_error": self.relative,
            "sqnr_db": self.sqnr_db,
        }


@dataclass(frozen=True)
class Row:
    """A tensor: its largest magnitude, that over its root mean square (None for zeros), and by spec its loss or why it
    does not fit.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    amax: float
    outliers: float | None
    losses: Mapping[str, Loss | str]

    def to_dict(self) -> dict[str, Any]:
        finite = math.isfinite(self.amax)
        specs = {s: {"reason": x} if isinstance(x, str) else x.to_dict() for s, x in self.losses.items()}
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "amax": self.amax if finite else None,
            "amax_over_rms": self.outliers,
            "specs": specs,
        }


def run(path: str, title: str, texts: Sequence[str], as_json: bool) -> None:
    specs = list(dict.fromkeys(QuantSpec.parse(text) for text in texts))
    sources = _sources(path)
    rows = [measure(name, sources[name], specs) for name in track(sorted(sources, key=_natural), "quantizing weights")]
    overall = {str(spec): _overall(rows, str(spec)) for spec in specs}
    if as_json:
        found = {
            s: {"tensors": count, **({} if total is None else total.to_dict())} for s, (count, total) in overall.items()
        }
        print_json({"weights": title, "tensors": [row.to_dict() for row in rows], "overall": found})
        return
    _print(title, rows, overall)


def measure(name: str, source: TensorSource, specs: Sequence[QuantSpec]) -> Row:
    """Read one tensor and quantize it with every spec."""
    x = source.read()
    if x.dtype != torch.float64:
        x = x.to(torch.float32)
    amax = float(x.abs().max()) if x.numel() else 0.0
    dtype = str(source.dtype).removeprefix("torch.")
    if not math.isfinite(amax):
        reason = "holds nan or infinity; find their source"
        return Row(name, source.shape, dtype, amax, None, dict.fromkeys(map(str, specs), reason))
    signal = _squares(x, None)
    outliers = amax / math.sqrt(signal / x.numel()) if signal > 0 else None
    return Row(name, source.shape, dtype, amax, outliers, {str(spec): _loss(x, spec, signal) for spec in specs})


def _loss(x: Tensor, spec: QuantSpec, signal: float) -> Loss | str:
    if not x.numel():
        return "has no elements"
    try:
        q = quantize_tensor(x, spec)
    except SpecError as error:
        return str(error).removeprefix(f"{spec}: ")
    return Loss(q.bits_per_element * x.numel(), x.numel(), signal, _squares(x, q.dequantize(x.dtype)))


def _squares(x: Tensor, y: Tensor | None) -> float:
    """The sum of x^2, or of (x - y)^2, in float64, a slice at a time."""
    total, flat = 0.0, x.reshape(-1)
    for start in range(0, x.numel(), _SLICE):
        part = flat[start : start + _SLICE].to(torch.float64)
        if y is not None:
            part = part - y.reshape(-1)[start : start + _SLICE]
        total += float(part.square().sum())
    return total


def _sources(path: str) -> dict[str, TensorSource]:
    """The float tensors of two axes or more, by name; CaptureError where there are none."""
    file = Path(path).expanduser()
    if file.suffix != ".safetensors" or file.is_dir():
        found = read_shards(find_directory(path))
    elif file.is_file():
        found = read_header(file)
    else:
        raise CaptureError(f"{path} does not exist; give a .safetensors file or a model directory")
    kept: dict[str, TensorSource] = {
        name: source for name, source in found.items() if source.dtype.is_floating_point and len(source.shape) > 1
    }
    if not kept:
        kinds = ", ".join(sorted({str(s.dtype).removeprefix("torch.") for s in found.values()})) or "nothing"
        raise CaptureError(f"{path} holds no float tensor of two or more axes, only {kinds}; give the float model")
    return kept


def _overall(rows: Sequence[Row], spec: str) -> tuple[int, Loss | None]:
    """How many tensors fit, and the loss over all of them; None where there are none."""
    losses = [loss for row in rows if isinstance(loss := row.losses[spec], Loss)]
    return len(losses), sum(losses[1:], losses[0]) if losses else None


def _print(title: str, rows: Sequence[Row], overall: Mapping[str, tuple[int, Loss | None]]) -> None:
    alone = len(overall) == 1
    table = Table(title=escape(f"{title}: {next(iter(overall))}" if alone else title))
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", no_wrap=True)
    titles = ["bits per weight", "relative error", "SQNR dB"] if alone else list(overall)
    table.add_column("amax", justify="right")
    table.add_column("amax/rms", justify="right")
    for name in titles:
        # As narrow as a cell and the heading's longest word allow: names of tensors are long.
        table.add_column(name, justify="right", width=max(6 if alone else 12, *map(len, name.split())))
    reasons: dict[str, int] = {}
    for row in rows:
        ratio = "" if row.outliers is None else f"{row.outliers:.1f}"
        cells = [cell for loss in row.losses.values() for cell in _cells(loss, alone, reasons)]
        table.add_row(escape(row.name), _sizes(row.shape), f"{row.amax:.3g}", ratio, *cells)
    if overall:
        counts = [f"{count} of {len(rows)}" for count, _ in overall.values()]
        cells = [cell for _, total in overall.values() for cell in _cells(total or "", alone, reasons)]
        table.add_section()
        table.add_row("tensors that fit", "", "", "", *counts, style="bold")
        table.add_row("all of these", "", "", "", *cells, style="bold")
    out = console()
    out.print(table)
    if len(overall) > 1:
        out.print("SQNR in dB, bits per weight in brackets")
    for reason, number in reasons.items():
        out.print(f"*{number} {reason}", markup=False)


def _cells(loss: Loss | str, alone: bool, reasons: dict[str, int]) -> list[str]:
    """What the table says of one tensor and one spec: three cells for a spec alone, one where there are several."""
    if isinstance(loss, str):
        mark = f"*{reasons.setdefault(loss, len(reasons) + 1)}" if loss else ""
        return [mark, "", ""] if alone else [mark]
    bits = f"{loss.bits / loss.elements:.{3 if alone else 2}f}"
    if loss.relative is None:
        return [bits, "zeros", ""] if alone else [f"zeros ({bits})"]
    db = "exact" if loss.sqnr_db is None else f"{loss.sqnr_db:.2f}"
    return [bits, f"{loss.relative:.2e}", db] if alone else [f"{db} ({bits})"]


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
