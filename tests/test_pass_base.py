"""Passes by name: strings that parse back, errors that help, outsiders' passes, reports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.pass_base import (
    PASSES,
    CalibratedPass,
    Pass,
    Report,
    _load_passes,
    all_passes,
    make_pass,
    parse_pass,
    parse_pipeline,
    place,
    register,
    split_top,
)


@dataclass(frozen=True)
class Nested:
    low: int = 0
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Everything(Pass):
    """A pass with an option of every type."""

    name: ClassVar[str] = "test-everything"
    count: int = 3
    ratio: float = 0.5
    on: bool = True
    mode: Literal["fast", "exact"] = "fast"
    label: str = ""
    layers: tuple[int, ...] = ()
    pattern: str | None = None
    table: dict[str, float] = field(default_factory=dict)
    nested: Nested = Nested()

    def run(self, program: Program) -> Report:
        return Report()


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = all_passes()
    register(Everything)
    yield
    PASSES.clear()
    PASSES.update(before)


TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        "null",
        "true",
        "1",
        "1e3",
        "a, b",
        "it's",
        '"',
        "(",
        "]",
        "a=b",
        "#x",
        "layers.*.q",
        " x ",
        "~",
        "-",
        "\\",
        '\\", ',
        "\n",
    ]
)


@given(
    count=st.integers(),
    ratio=st.floats(allow_nan=False),
    on=st.booleans(),
    mode=st.sampled_from(["fast", "exact"]),
    label=TEXT,
    layers=st.lists(st.integers(), max_size=3).map(tuple),
    pattern=st.none() | TEXT,
    table=st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=2),
    nested=st.builds(Nested, st.integers(), st.lists(TEXT, max_size=2).map(tuple)),
)
def test_any_options_print_and_parse_back(**options: Any) -> None:
    register(Everything)
    pass_ = Everything(**options)
    assert parse_pass(str(pass_)) == pass_
    assert parse_pipeline(f"dead-code, {pass_},dead-code()")[1] == pass_


def test_defaults_are_not_printed() -> None:
    assert str(Everything()) == "test-everything"
    assert str(Everything(count=4, on=False)) == "test-everything(count=4, on=false)"


def test_text_is_quoted_only_where_it_must_be() -> None:
    shown = {"int4 sym group=32": "int4 sym group=32", "a,b": "'a,b'", "it's": '"it\'s"', "null": "'null'", "(": '"("'}
    for text, printed in shown.items():
        assert str(Everything(label=text)) == f"test-everything(label={printed})"


@pytest.mark.parametrize("spelling", ["test-everything", "test-everything()", "  test-everything ( ) "])
def test_spellings(spelling: str) -> None:
    assert parse_pass(spelling) == Everything()


ERRORS = {
    "test-everythin": "pass 'test-everythin' does not exist; did you mean 'test-everything'?",
    "raise-norm": "did you mean 'raise-norms'?",
    "zzzzzz": r"pass 'zzzzzz' does not exist; `qcompile passes` lists them",
    "test-everything(cuont=3)": "has no option 'cuont'; did you mean 'count'\\?; it has count, ratio",
    "dead-code(x=3)": "has no option 'x'; it has none",
    "test-everything(count=many)": r"option count: Input should be a valid integer.*\(given 'many'\)",
    "test-everything(mode=slow)": "option mode: Input should be 'fast' or 'exact'",
    "test-everything(layers=[1, x])": "option layers.1: .*given 'x'",
    "test-everything(3)": "'3' is not written like option=value",
    "test-everything(label={)": "is not",
    "test-everything(table={a: [)": "is not",
    "what is this": "is not written like name or name",
    "": "is not written like",
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_name_the_way_out(text: str) -> None:
    with pytest.raises(RecipeError, match=ERRORS[text]) as caught:
        parse_pass(text)
    assert "\n" not in str(caught.value)


def test_options_given_twice_are_an_error() -> None:
    with pytest.raises(RecipeError, match="option 'count' is given twice"):
        parse_pass("test-everything(count=1, count=2)")


def test_options_from_a_mapping_are_checked_alike() -> None:
    assert make_pass(Everything, {"count": 7, "nested": {"low": 2}}) == Everything(count=7, nested=Nested(low=2))
    with pytest.raises(RecipeError, match=r"option nested\.low"):
        make_pass(Everything, {"nested": {"low": "x"}})


def test_splitting_respects_brackets_and_quotes() -> None:
    assert split_top("a, b(c=[1, 2], d='x, y'), , e(f={g: 1, h: 2})") == [
        "a",
        "b(c=[1, 2], d='x, y')",
        "e(f={g: 1, h: 2})",
    ]


def test_every_shipped_pass_prints_and_parses_back_and_has_a_picture() -> None:
    known = all_passes()
    assert {"raise-norms", "dead-code", "fold-constants", "drop-identities", "inject-outliers"} <= set(known)
    for name, cls in known.items():
        assert cls.name == name
        assert (cls.__doc__ or "").strip()
        made = cls()
        assert parse_pass(str(made)) == made


def test_a_name_is_taken_once() -> None:
    assert register(Everything) is Everything  # the same class again is no clash
    with pytest.raises(
        ValueError, match=r"pass name 'test-everything' is taken by .*test_pass_base; .* must choose another"
    ):

        @register
        @dataclass(frozen=True)
        class Another(Pass):
            name: ClassVar[str] = "test-everything"

            def run(self, program: Program) -> Report:
                return Report()


def test_an_outsiders_entry_point_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Entry(EntryPoint):
        def load(self) -> Any:
            @register
            @dataclass(frozen=True)
            class Outsider(Pass):
                name: ClassVar[str] = "test-outsider"

                def run(self, program: Program) -> Report:
                    return Report()

            loaded.append(Outsider)
            return Outsider

    def entry_points(group: str) -> list[EntryPoint]:
        return [Entry("anything", "outside:Outsider", group)] if group == "qcompile.passes" else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    _load_passes.cache_clear()
    assert type(parse_pass("test-outsider")) is loaded[0]


def test_reports_name_modules_and_become_json() -> None:
    program = Program.parse('def main(x: f32[2]):\n    y = aten.neg.default(x)  # layers.0\n    return {"y": y}')
    (node,) = program.nodes
    report = Report("some-pass")
    report.rewrote(node, "negated")
    report.skip("elsewhere", "a reason")
    report.note("mind this")
    report.measure(node, {"sqnr_db": 19.5})
    report.measure(node, {"bits": 4})
    assert (place(node), place(program.inputs[0])) == ("layers.0 (y)", "x")
    data = json.loads(json.dumps(report.to_dict()))
    assert data["rewritten"] == [{"where": "layers.0 (y)", "what": "negated"}]
    assert data["skipped"] == [{"where": "elsewhere", "what": "a reason"}]
    assert data["measured"] == {"layers.0 (y)": {"sqnr_db": 19.5, "bits": 4}}
    assert data["notes"] == ["mind this"]


def test_a_calibrated_pass_refuses_to_run_without_data() -> None:
    @dataclass(frozen=True)
    class Needs(CalibratedPass):
        name: ClassVar[str] = "test-needs"

        def run_calibrated(self, program: Program, batches: Iterable[Tensor]) -> Report:
            return Report()

    with pytest.raises(RecipeError, match="pass 'test-needs' needs calibration data"):
        Needs().run(Program.parse('def main(x: f32[2]):\n    return {"x": x}'))
    assert not Needs.preserves_function
    assert torch.is_tensor(torch.ones(1))
