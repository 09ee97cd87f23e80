"""Adding calls and constants to the program that is being rewritten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.ir.weights import WeightStore

aten = torch.ops.aten


@dataclass(frozen=True)
class Derived:
    """A weight computed from others when it is read; a `qcompile.ir.weights.TensorSource`."""

    store: WeightStore
    keys: tuple[str, ...]
    compute: Callable[..., Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        return self.compute(*(self.store[key] for key in self.keys))


class Rewriter:
    """A clone of a program, edited; `source` keeps the weights that derived ones are computed from."""

    def __init__(self, program: Program) -> None:
        self.source = program.weights
        self.program = program.clone()
        self.original: dict[str, str] = {}  # name of a call here → name of the call it stands for in the program
        self._derived: dict[str, fx.Node] = {}
        self._shared: dict[object, fx.Node] = {}

    def call(self, before: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
        """Insert `target(*args)` before a node, on behalf of its module."""
        return self.program.call(target, args, before=before)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all readers of `old` read `new`, which takes its name in what is written."""
        if new.op == "call_function":
            self.original.setdefault(new.name, self.original.get(old.name, old.name))
        self.program.replace(old, new)

    def constant(self, key: str, tensor: Tensor, module: str = "") -> fx.Node:
        """A new small weight; `key` gets a number where it is taken."""
        return self.program.add_weight(self._free(key), tensor, module)

    def derive(
        self,
        key: str,
        keys: tuple[str, ...],
        compute: Callable[..., Tensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> fx.Node:
        """A weight computed from others of the original program, each time it is read; shared by its key."""
        if key not in self._derived:
            source = Derived(self.source, keys, compute, shape, dtype)
            self._derived[key] = self.program.add_weight(key, source, key.rpartition(".")[0])
        return self._derived[key]

    def shared(self, key: object, make: Callable[[], fx.Node]) -> fx.Node:
        """What `make` inserted the first time it was asked for under `key`; readers come in program order."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def as_dtype(self, before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """`node`, cast to `dtype` if it has another."""
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(before, aten.to.dtype, node, dtype)

    def _free(self, key: str) -> str:
        taken, number = key, 1
        while taken in self.program.weights:
            number += 1
            taken = f"{key}_{number}"
        return taken


def base_key(key: str) -> str:
    """The key of the program's weight that a derived one is made from."""
    return key.partition("@")[0]
