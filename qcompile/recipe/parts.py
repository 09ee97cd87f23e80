"""Fields of a recipe that hold several specs: for the values inside attention, for keys and values of the cache.

attention: int8 sym token dynamic                 ⟶  q, k and v alike
attention: {kv: int8 sym token dynamic, q: null}  ⟶  k and v alike, the rest float
kv_cache: int8 sym token dynamic                  ⟶  keys and values alike
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

Spec = str | dict[str, str | int | float | bool | None] | None
"""A quantization spec as a recipe holds it: a spec string, its fields, or null for float."""


class Parts(BaseModel):
    """Named specs. A plain spec, or its fields, stands for all of `PLAIN`; a name of `SHORT` for several parts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    PLAIN: ClassVar[tuple[str, ...]] = ()
    SHORT: ClassVar[dict[str, tuple[str, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, data: Any) -> Any:
        """The one form with every part by its own name; of names that overlap, the one of fewer parts holds."""
        if data is None:
            return {}
        if isinstance(data, str) or (isinstance(data, Mapping) and "element" in data):
            return dict.fromkeys(cls.PLAIN, data)
        if not isinstance(data, Mapping):
            return data
        spelled: dict[str, Any] = {}
        for name in sorted(data, key=lambda n: -len(cls.parts_of(n))):
            spelled.update(dict.fromkeys(cls.parts_of(name) or (name,), data[name]))
        return spelled

    @classmethod
    def parts_of(cls, name: str) -> tuple[str, ...]:
        """The parts that a name stands for; none where it is no name."""
        return (name,) if name in cls.model_fields else cls.SHORT.get(name, ())

    @classmethod
    def names(cls) -> list[str]:
        """Every name that may be set."""
        return [*cls.model_fields, *cls.SHORT]

    @property
    def specs(self) -> dict[str, Spec]:
        """Part → spec, of all parts."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def plain(self) -> Any:
        """What reads back as this: null, one spec, or a mapping of the parts that are set."""
        given = {name: spec for name, spec in self.specs.items() if spec is not None}
        if tuple(given) == self.PLAIN and _equal(given.values()):
            return given[self.PLAIN[0]]
        return given or None


class Attention(Parts):
    """Specs of the values inside attention.

    - `q`, `k`, `v`: queries, keys and values as they enter it, rotated where the model rotates them.
    - `softmax`: the weights that it gives each position, between 0 and 1.
    - `qkv`, `kv`, `qkvs`: several of them; a plain spec means `qkv`.
    """

    PLAIN: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    SHORT: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv": ("q", "k", "v"),
        "kv": ("k", "v"),
        "qkvs": ("q", "k", "v", "softmax"),
    }

    q: Spec = None
    k: Spec = None
    v: Spec = None
    softmax: Spec = None


class KVCache(Parts):
    """Specs of what the cache holds: `keys` and `values`; a plain spec means both."""

    PLAIN: ClassVar[tuple[str, ...]] = ("keys", "values")

    keys: Spec = None
    values: Spec = None


PARTS: dict[str, type[Parts]] = {"attention": Attention, "kv_cache": KVCache}
"""The fields of a recipe that have parts."""


def _equal(values: Iterable[Any]) -> bool:
    first, *rest = values
    return all(value == first for value in rest)
