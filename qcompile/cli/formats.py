"""`qcompile formats`: what a spec string can say, or what one of them means, costs and loses."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from qcompile.cli.show import console, print_json, working
from qcompile.cli.takers import reasons, uses
from qcompile.numerics.catalogue import (
    GLOSSARY,
    all_elements,
    named_formats,
    resolved,
    span,
    spelled_out,
)
from qcompile.numerics.families import WEIGHT, errors, sample_shape, shape_for
from qcompile.numerics.spec import QuantSpec


def run(words: list[str], as_json: bool) -> None:
    if not words:
        _everything(as_json)
        return
    facts = _facts(QuantSpec.parse(" ".join(words)))
    print_json(facts) if as_json else _explain(facts)


def _everything(as_json: bool) -> None:
    elements, named = all_elements(), named_formats()
    if as_json:
        formats = {name: {"is": is_, "source": source} for name, (is_, source) in named.items()}
        print_json({"elements": [asdict(e) for e in elements], "formats": formats, "words": GLOSSARY})
        return
    out = console()
    table = Table("element", "bits", "what it is", "numbers", "from, to", "other codes", title="elements")
    for e in elements:
        table.add_row(e.name, str(e.bits), e.kind, str(e.values), span(e), e.special)
    out.print(table)
    out.print("and any eXmY of 8 bits at most, e4m3(plain) without a nan, fixed-point integers as int8.6", markup=False)
    table = Table("format", "is short for", "where it is defined", title="formats with a name")
    for name, (is_, source) in named.items():
        table.add_row(name, is_, source)
    out.print(table)
    out.print("MX formats take a scale rule, as mxfp4(even); nvfp4(mse); bfp(block=16 bits=6)", markup=False)
    for title, words in GLOSSARY.items():
        table = Table(title, "meaning")
        for word, meaning in words.items():
            table.add_row(word, meaning)
        out.print(table)
    out.print("qcompile formats SPEC explains one, e.g.: qcompile formats int4 sym group=128 mse", markup=False)


def _facts(spec: QuantSpec) -> dict[str, Any]:
    """Everything there is to say about a spec, as plain data."""
    shape = shape_for(spec, WEIGHT)
    elements = math.prod(shape)
    with working("quantizing random data and asking the targets"):
        lost = errors(spec)
        said = {use: reasons(spec, use) for use in uses(spec)}
    return {
        "spec": str(spec),
        "is": spelled_out(spec),
        "fields": {name: {"value": value, "meaning": meaning} for name, (value, meaning) in resolved(spec).items()},
        "shape": list(shape),
        "codes": {"dtype": _name(spec.storage), "bits": spec.bits},
        "parameters": [
            {
                "name": p.name,
                "shape": list(p.shape),
                "dtype": _name(p.dtype),
                "bits": p.bits,
                "bits_per_weight": p.bits * math.prod(p.shape) / elements,
            }
            for p in spec.parameters(shape)
        ],
        "bits_per_weight": spec.bits_per_element(shape),
        "sample_shape": list(sample_shape(spec)),
        "errors": {kind: {"relative": error, "sqnr_db": _db(error)} for kind, error in lost.items()},
        "targets": {use: {name: list(why) for name, why in told.items()} for use, told in said.items()},
    }


def _explain(facts: dict[str, Any]) -> None:
    out = console()
    title = facts["spec"] if facts["spec"] == facts["is"] else f"{facts['spec']} = {facts['is']}"
    table = Table("field", "value", "meaning", title=title)
    for name, field in facts["fields"].items():
        table.add_row(name, field["value"], field["meaning"])
    out.print(table)
    _stored(facts)
    table = Table("data", "relative error", "SQNR dB", title=f"on random data, {_sizes(facts['sample_shape'])}")
    for kind, error in facts["errors"].items():
        sqnr = "∞" if error["sqnr_db"] is None else f"{error['sqnr_db']:.2f}"
        table.add_row(kind, f"{error['relative']:.2e}", sqnr)
    out.print(table)
    table = Table("target", "as", "takes it", title="targets")
    for use, told in facts["targets"].items():
        for name, why in told.items():
            table.add_row(name, use, "yes" if not why else escape("no: " + "; ".join(why)))
    out.print(table)


def _stored(facts: dict[str, Any]) -> None:
    shape, codes = facts["shape"], facts["codes"]
    table = Table("what", "shape", "dtype", "bits each", "bits a value", title=f"stored, for {_sizes(shape)}")
    table.add_row("codes", _sizes(shape), f"{codes['dtype']}, packed", str(codes["bits"]), str(codes["bits"]))
    for p in facts["parameters"]:
        table.add_row(p["name"], _sizes(p["shape"]), p["dtype"], str(p["bits"]), f"{p['bits_per_weight']:.6f}")
    table.add_row("all", "", "", "", f"{facts['bits_per_weight']:.4f}")
    console().print(table)


def _sizes(shape: list[int]) -> str:
    return " × ".join(map(str, shape))


def _db(error: float) -> float | None:
    """Relative squared error as a signal to noise ratio; None where there is no noise."""
    return -10 * math.log10(error) if error > 0 else None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
