"""What a pass is: a frozen dataclass with a name, found by that name, that edits a program and says what it did."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar, cast

from torch import fx

from qcompile.errors import RecipeError
from qcompile.ir.program import Program

Where = fx.Node | str
"""What a report speaks of: a node (shown by its module and name) or any name."""


@dataclass(frozen=True)
class Entry:
    """One line of a report: a place and what is said of it."""

    where: str
    what: str


@dataclass
class Report:
    """What one pass did: places it rewrote, places it left alone with the reason, and what it measured."""

    pass_name: str = ""
    rewritten: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spaces: list[Entry] = field(default_factory=list)  # every channel space and what became of it, alike ones once
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    drift: float | None = None  # max |Δoutput| / max |output| that the pass caused, where it was checked

    def rewrote(self, where: Where, what: str = "") -> None:
        """Say that a place was changed."""
        self.rewritten.append(Entry(place(where), what))

    def skip(self, where: Where, reason: str) -> None:
        """Say that a place the pass is about was left alone, and why."""
        self.skipped.append(Entry(place(where), reason))

    def note(self, text: str) -> None:
        """Say anything else a user should know."""
        self.notes.append(text)

    def measure(self, where: Where, values: Mapping[str, float]) -> None:
        """Record figures of a place, e.g. ``{"sqnr_db": 19.3}``."""
        self.measured.setdefault(place(where), {}).update(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)


def place(where: Where) -> str:
    """How a report names a node: ``module (node)``, or the name itself."""
    if isinstance(where, str):
        return where
    module = str(where.meta.get("module", ""))
    return f"{module} ({where.name})" if module else where.name


@dataclass(frozen=True)
class Pass(ABC):
    """A named, frozen graph transformation. `str(p)` parses back with `parse_pass`."""

    name: ClassVar[str]
    preserves_function: ClassVar[bool] = True  # exact in real arithmetic; the pass manager may check it
    rounds_weights: ClassVar[bool] = False  # turns simulated weight quantization into stored codes

    @abstractmethod
    def run(self, program: Program) -> Report:
        """Edit `program` in place and say what changed."""

    def __str__(self) -> str:
        shown = [
            f"{f.name}={_flow(getattr(self, f.name))}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != _default(f)
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


@dataclass(frozen=True)
class CalibratedPass(Pass):
    """A pass that looks at what flows through the program on calibration batches."""

    preserves_function: ClassVar[bool] = False

    def run(self, program: Program) -> Report:
        """Refused: this pass needs data."""
        raise RecipeError(f"pass {self.name!r} needs calibration data; give data= or a recipe with calibration:")

    @abstractmethod
    def run_calibrated(self, program: Program, batches: Iterable[Any]) -> Report:
        """Edit `program` in place, having run `batches` through it: each a `qcompile.data.batches.Batch`.

        That is token ids ``[batch, sequence]`` or inputs by name; ``fill(program, feeds(batch))`` takes either.
        """


PASSES: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=type[Pass])


def register(cls: P) -> P:
    """Make `cls` reachable by its `name` from recipes and the command line. Raises ValueError if the name is taken."""
    other = PASSES.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"pass name {cls.name!r} is taken by {other.__module__}; {cls.__module__} must choose another")
    PASSES[cls.name] = cls
    return cls


def all_passes() -> dict[str, type[Pass]]:
    """Every pass by name: those in the passes room, and outsiders' (entry points of group ``qcompile.passes``)."""
    _load_passes()
    return dict(sorted(PASSES.items()))


@functools.cache
def _load_passes() -> None:
    """Import what registers passes; once, for looking through the installed distributions takes a while."""
    import importlib
    import pkgutil
    from importlib.metadata import entry_points

    import qcompile.passes

    for module in pkgutil.walk_packages(qcompile.passes.__path__, "qcompile.passes."):
        importlib.import_module(module.name)
    for entry in entry_points(group="qcompile.passes"):
        entry.load()


def parse_pass(text: str) -> Pass:
    """The pass that `text` spells, e.g. ``rotate(mode=hadamard, block=32)``; values are YAML.

    Raises RecipeError for a name or an option that does not exist (with the nearest that does) or a value of the
    wrong type.
    """
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise RecipeError(f"pass {text!r} is not written like name or name(option=value, …)")
    name, inside = match.group(1), match.group(2) or ""
    known = all_passes()
    if name not in known:
        raise RecipeError(f"pass {name!r} does not exist{nearest(name, known)}; `qcompile passes` lists them")
    options = {}
    for part in split_top(inside):
        option, equals, value = part.partition("=")
        if not equals:
            raise RecipeError(f"pass {name!r}: {part!r} is not written like option=value")
        if (option := option.strip()) in options:
            raise RecipeError(f"pass {name!r}: option {option!r} is given twice")
        options[option] = _from_flow(value)
    return make_pass(known[name], options)


def parse_pipeline(text: str) -> list[Pass]:
    """The passes that a comma-separated list spells, in order."""
    return [parse_pass(part) for part in split_top(text)]


def make_pass(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    """Build a pass from option values, each checked against its field's annotated type."""
    made = make_dataclass(cls, options, f"pass {cls.name!r}")
    assert isinstance(made, Pass)
    return made


def make_dataclass(cls: type[Any], options: Mapping[str, Any], called: str) -> Any:
    """Build a dataclass from plain values. Raises RecipeError for an option it lacks or a value of the wrong type."""
    from pydantic import ValidationError

    names = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise RecipeError(f"{called} has no option {option!r}{nearest(option, names)}; {has}")
    try:
        return _adapter(cast(Hashable, cls)).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecipeError(f"{called}, option {where}: {first['msg']} (given {first['input']!r})") from None


@functools.cache
def _adapter(cls: Hashable) -> Any:
    """What checks the options of `cls`; made once, for that takes longer than all its checks."""
    from pydantic import TypeAdapter

    return TypeAdapter(cast(type[Any], cls))


def nearest(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where something known is near `word`, else nothing."""
    close = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def split_top(text: str) -> list[str]:
    """Split at the commas that stand in no bracket and no quotes."""
    parts, depth, quote, start, escaped = [], 0, "", 0, False
    for index, char in enumerate(text):
        if escaped:
            escaped = False
        elif quote:
            escaped = char == "\\" and quote == '"'
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in [*parts, text[start:]] if part.strip()]


def _flow(value: Any) -> str:
    """A value as one line of YAML, as it is written inside a list."""
    import yaml

    text = yaml.dump([_plain(value)], Dumper=_flow_dumper(), default_flow_style=True, width=10**9, sort_keys=False)
    return str(text).strip()[1:-1]


@functools.cache
def _flow_dumper() -> Any:
    """Writes text with a quote, parenthesis, backslash or line break in it in double quotes; other text YAML itself
    quotes where it must. So nothing inside means anything to `split_top`."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        plain = re.fullmatch(r"[ !#-&*-\[\]-~]+", value)  # printable ASCII but ' ( ) " and the backslash
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')

    Dumper.add_representer(str, text)
    return Dumper


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [f for f in dataclasses.fields(value) if getattr(value, f.name) != _default(f)]
        return {f.name: _plain(getattr(value, f.name)) for f in shown}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _from_flow(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{text.strip()!r} is not a YAML value: {str(error).splitlines()[0]}") from None


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default
