"""Which kernels a graph needs: the plans of its operators, asked with tensors that have no storage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.triton.launch import BUCKETS, Config, Launch, Variant, dispatching
from qcompile.backends.triton.ops.registration import PLANS
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr

PAST = 256
"""Tokens in the cache for which kernels that read it are planned."""


@dataclass
class Recorder:
    """A dispatcher that takes the candidate at `index` and remembers what there was to choose from."""

    index: int = 0
    seen: dict[str, Sequence[Config]] = field(default_factory=dict)

    def choose(self, site: str, candidates: Sequence[Config]) -> Config:
        self.seen[site] = candidates
        return candidates[min(self.index, len(candidates) - 1)]

    def launch(self, launches: Sequence[Launch]) -> None:
        """Nothing runs here."""


@dataclass(frozen=True)
class Needed:
    """Every variant by its key, with the configuration it is named by; and for each site, label → keys of its
    variants."""

    variants: dict[str, tuple[Variant, str]]
    sites: dict[str, dict[str, tuple[str, ...]]]


def needed(program: Program, buckets: Sequence[int] = BUCKETS) -> Needed:
    """The variants that the operators of `program` may launch, for each bucket of rows and each configuration."""
    variants: dict[str, tuple[Variant, str]] = {}
    sites: dict[str, dict[str, tuple[str, ...]]] = {}
    done = set()
    for node in program.nodes:
        if node.target not in PLANS:
            continue
        for rows in buckets:
            arguments = meta_arguments(program, node, rows)
            if (key := (node.target, repr(arguments))) in done:
                continue
            done.add(key)
            for site, label, launches in planned(node.target, arguments):
                keys = []
                for launch in launches:
                    variants[launch.variant.key] = (launch.variant, str(launch.config))
                    keys.append(launch.variant.key)
                sites.setdefault(site, {})[label] = tuple(keys)
    return Needed(variants, sites)


def planned(target: Any, arguments: Sequence[Any]) -> list[tuple[str, str, list[Launch]]]:
    """(site, label of the configuration, launches) for every configuration of an operator on these arguments."""
    found: list[tuple[str, str, list[Launch]]] = []
    recorder = Recorder()
    while True:
        with dispatching(recorder):
            _, launches = PLANS[target](*arguments)
        for site, candidates in recorder.seen.items():
            chosen = candidates[min(recorder.index, len(candidates) - 1)]
            found.append((site, chosen.label, launches))
        if not recorder.seen and launches:
            found.append((f"{target} fixed", launches[0].config.label, launches))
        recorder.index += 1
        if all(recorder.index >= len(candidates) for candidates in recorder.seen.values()):
            return found


def meta_arguments(program: Program, node: fx.Node, rows: int) -> tuple[Any, ...]:
    """The node's arguments with tensors on the meta device, for a prefill of `rows` tokens."""
    sizes = {symbol: {"sequence": rows, "past": PAST}.get(name, 1) for symbol, name in program.symbols.items()}
    if "sequence" not in program.symbols.values() and sizes:
        sizes[next(iter(sizes))] = rows

    def size(dim: Any) -> int:
        expr = dim_expr(dim)
        return expr if isinstance(expr, int) else int(expr.subs(sizes))

    def value(argument: fx.Node) -> Any:
        fake = argument.meta["val"]
        if isinstance(fake, Tensor):
            return torch.empty([size(d) for d in fake.shape], dtype=fake.dtype, device="meta")
        return size(fake)

    return tuple(fx.map_arg(node.args, value))
