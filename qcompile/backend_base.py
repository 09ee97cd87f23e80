"""What a backend is: it says first what it cannot take, writes files, and runs them in the runtime they are for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from qcompile.errors import LoweringError, RecipeError
from qcompile.ir.program import Program
from qcompile.pass_base import make_dataclass, nearest


@dataclass(frozen=True)
class Obstacle:
    """Something in a program that a target cannot take."""

    node: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.node} (module {self.module or 'top'}): {self.reason}"


@dataclass(frozen=True)
class StoredTensor:
    """How one weight lies in an artifact."""

    name: str
    container: str  # element type it is stored in, e.g. "int4", "float32"
    elements: int
    bytes: int  # codes, scales and zero-points together

    @property
    def bits_per_element(self) -> float:
        """Bits that one element costs, scales and zero-points included."""
        return 8 * self.bytes / max(1, self.elements)


@dataclass(frozen=True)
class LoweredFiles:
    """What `Backend.lower` wrote."""

    main: str  # the file a user opens, relative to the directory
    tensors: tuple[StoredTensor, ...]
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)  # how it was compiled: for what, with which flags


class Runner(Protocol):
    """An artifact loaded in its runtime."""

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; inputs by name, as the Program calls them."""
        ...


@runtime_checkable
class StepRunner(Protocol):
    """A runner with a way of its own to go on step by step."""

    def stepper(self, room: int) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
        """A stepper (see `qcompile.generate`) for one generation of at most `room` tokens, prompt included."""
        ...


@dataclass(frozen=True)
class Backend(ABC):
    """A target. Its fields are its options."""

    name: ClassVar[str]
    runtime: ClassVar[str]  # what an artifact runs in, for people

    def require(self) -> None:  # noqa: B027  most targets need nothing more than qcompile does
        """Raise LoweringError, with what to install, where something that lowering needs is missing."""

    @abstractmethod
    def obstacles(self, program: Program) -> list[Obstacle]:
        """Everything in `program` that this target cannot take; empty if it can be lowered."""

    @abstractmethod
    def lower(self, program: Program, directory: Path) -> LoweredFiles:
        """Write the artifact's files into an existing, empty directory."""

    def cannot_run(self) -> str | None:
        """Why an artifact cannot be run here, so that it is written and not compared; None where it can."""
        return None

    @abstractmethod
    def load(self, directory: Path) -> Runner:
        """Load an artifact of this backend in its runtime."""

    @abstractmethod
    def stored_codes(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """The codes as they lie in the artifact, unpacked: (weight name, integer tensor in the Program's layout)."""

    def tune(self, directory: Path) -> list[str]:
        """Measure an artifact's choices on this machine and write the best back into it; what was chosen, a line each.

        Raises LoweringError for a target that leaves nothing to choose.
        """
        raise LoweringError(f"{self.name} artifacts have nothing to tune")

    def first_difference(self, program: Program, directory: Path, feeds: Mapping[str, Tensor], tolerance: float) -> str:
        """Name the first tensor of `program` that the runtime computes otherwise; "unknown" where it can't be told."""
        return "unknown"


BACKENDS: dict[str, type[Backend]] = {}
B = TypeVar("B", bound=type[Backend])


def register_backend(cls: B) -> B:
    """Make `cls` reachable by its `name`. Raises ValueError if the name is taken by another class."""
    other = BACKENDS.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"backend name {cls.name!r} is taken by {other.__module__}; {cls.__module__} must choose another"
        )
    BACKENDS[cls.name] = cls
    return cls


def all_backends() -> dict[str, type[Backend]]:
    """Every backend by name: those in the backends room, and outsiders' (entry points of ``qcompile.backends``)."""
    import importlib
    import pkgutil
    from importlib.metadata import entry_points

    import qcompile.backends

    for module in pkgutil.iter_modules(qcompile.backends.__path__, "qcompile.backends."):
        importlib.import_module(module.name)
    for entry in entry_points(group="qcompile.backends"):
        entry.load()
    return dict(sorted(BACKENDS.items()))


def make_backend(name: str, options: Mapping[str, Any] | None = None) -> Backend:
    """The backend of that name with these options. Raises RecipeError naming the nearest name or option."""
    known = all_backends()
    if name not in known:
        raise RecipeError(f"target {name!r} does not exist{nearest(name, known)}; known: {', '.join(known)}")
    made = make_dataclass(known[name], options or {}, f"target {name!r}")
    assert isinstance(made, Backend)
    return made


def refuse(backend: Backend, obstacles: list[Obstacle]) -> None:
    """Raise LoweringError naming the first obstacle (and how many there are), if there is any."""
    if obstacles:
        more = f" (and {len(obstacles) - 1} more; `qcompile plan --target {backend.name}` lists them)"
        raise LoweringError(f"{backend.name} cannot take {obstacles[0]}{more if len(obstacles) > 1 else ''}")
