"""`Plan`: which place gets which spec and why, with its size, before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from qcompile.ir.contractions import Contraction, Embedding, Obstacle, Role
from qcompile.numerics.spec import QuantSpec

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Site:
    """One contraction or embedding and what becomes of it; an embedding has no `activations`.

    Specs are on the axes of the stored weight, of the activation that is read, and of the result.
    """

    name: str  # the module, or the weight where a module has several
    module: str
    op: str
    role: Role
    key: str  # the weight's key
    shape: tuple[int, ...]
    weights: QuantSpec | None
    activations: QuantSpec | None
    outputs: QuantSpec | None
    why: str
    float_bytes: int
    reader: Contraction | Embedding = field(repr=False, compare=False)

    @property
    def bits(self) -> float:
        """Bits per weight, scales and zero-points included."""
        if self.weights is not None:
            return self.weights.bits_per_element(self.shape)
        return self.float_bytes * 8 / max(_count(self.shape), 1)

    @property
    def bytes(self) -> int:
        """Bytes of the weight as planned, packed."""
        return self.float_bytes if self.weights is None else _packed(self.weights, self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "name": self.name,
            "module": self.module,
            "op": self.op,
            "role": self.role,
            "weight": self.key,
            "shape": list(self.shape),
            "weights": None if self.weights is None else str(self.weights),
            "activations": None if self.activations is None else str(self.activations),
            "outputs": None if self.outputs is None else str(self.outputs),
            "why": self.why,
            "bits": self.bits,
            "bytes": self.bytes,
        }


@dataclass(frozen=True)
class Decision:
    """What becomes of values inside attention, or of the cache, at one place."""

    name: str  # the place, as reports call it
    field: str  # of the recipe: attention or kv_cache
    what: str | None  # what is done to which value; None where it is left as it is
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"name": self.name, "field": self.field, "what": self.what, "why": self.why}


@dataclass(frozen=True)
class Plan:
    """What a recipe does to a program: one site a contraction or embedding, in program order.

    `values` are the decisions about attention and the cache, empty where the recipe has nothing to say of them.
    `bytes_before` and `bytes_after` are the sizes of all weights, norms included; a weight that stays float for another
    reader counts both ways. `obstacles` are products with weights that cannot be quantized.
    """

    sites: tuple[Site, ...]
    obstacles: tuple[Obstacle, ...]
    bytes_before: int
    bytes_after: int
    values: tuple[Decision, ...] = ()

    @property
    def average_bits(self) -> float:
        """Bits per weight over the distinct weights of all sites, scales and zero-points included."""
        distinct = {(s.key, s.weights): s for s in self.sites}.values()
        count = sum(_count(s.shape) for s in distinct)
        return sum(s.bits * _count(s.shape) for s in distinct) / max(count, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "values": [value.to_dict() for value in self.values],
            "obstacles": [{"module": _where(o), "reason": o.reason} for o in self.obstacles],
            "average_bits": self.average_bits,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def table(self) -> Table:
        """The plan as a table for a terminal; the column of results is left out where none is quantized."""
        from rich.table import Table

        outputs = any(s.outputs is not None for s in self.sites)
        tables = sum(s.role == "embedding" for s in self.sites)
        places = f"{len(self.sites) - tables} products" + (f" and {tables} embeddings" if tables else "")
        table = Table(
            title=f"{self.bytes_before / 1e6:.2f} MB ⟶ {self.bytes_after / 1e6:.2f} MB",
            caption=f"{self.average_bits:.2f} bits per weight on average over {places}",
        )
        headings = ("place", "op", "role", "shape", "weights", "activations", *(["outputs"] if outputs else []))
        for heading in (*headings, "bits", "why"):
            table.add_column(heading, justify="right" if heading == "bits" else "left")
        for s in self.sites:
            specs = [s.weights, "" if s.role == "embedding" else s.activations, *([s.outputs] if outputs else [])]
            shown = ("float" if spec is None else str(spec) for spec in specs)
            table.add_row(s.name, s.op, s.role, "×".join(map(str, s.shape)), *shown, f"{s.bits:.2f}", s.why)
        blank = [""] * outputs
        for v in self.values:
            table.add_row(v.name, v.field, "", "", "", v.what or "float", *blank, "", v.why)
        for o in self.obstacles:
            table.add_row(_where(o), "", "", "", "float", "float", *blank, "", o.reason)
        return table


def _where(obstacle: Obstacle) -> str:
    return str(obstacle.node.meta.get("module", "")) or obstacle.node.name


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _packed(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    return -(-round(spec.bits_per_element(shape) * _count(shape)) // 8)
