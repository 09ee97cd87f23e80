"""One process, or several under ``torchrun``: batches are split, sums added up, solves dealt out."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """Work that any process can do: `cost` in any unit, `run` gives tensors and plain data."""

    cost: float
    run: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]


Result = tuple[dict[str, Tensor], dict[str, Any]]


@dataclass(frozen=True)
class Processes:
    """This process among `size`; `rank` 0 is the one that writes."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """Which of `count` batches this process runs: a run of neighbours."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Let every tensor be the sum over all processes, wherever each of them holds it."""
        if self.size > 1:
            device = _device()
            for tensor in tensors:
                there = tensor.to(device)
                dist.all_reduce(there)
                if there is not tensor:
                    tensor.copy_(there)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()

    def number(self, value: int) -> int:
        """The sum of a count over all processes."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(total)
        return int(total)

    def others(self, mine: T) -> list[T]:
        """What each of the other processes has, in the order of their ranks."""
        if self.size == 1:
            return []
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return [each for rank, each in enumerate(found) if rank != self.rank]

    def largest(self, value: int) -> int:
        """The largest over all processes."""
        return max([value, *self.others(value)])

    def union(self, values: Sequence[int]) -> list[int]:
        """What any process has, sorted."""
        return sorted({value for each in [values, *self.others(values)] for value in each})

    def deal(self, jobs: Sequence[Job]) -> list[Result]:
        """Every job's result, in the order of the jobs; the costliest are dealt first, each to who has least to do."""
        if self.size == 1:
            return [job.run() for job in jobs]
        owners, load = [0] * len(jobs), [0.0] * self.size
        for index in sorted(range(len(jobs)), key=lambda i: (-jobs[i].cost, i)):
            owners[index] = min(range(self.size), key=lambda r: (load[r], r))
            load[owners[index]] += jobs[index].cost
        own = {i: job.run() for i, job in enumerate(jobs) if owners[i] == self.rank}
        results: list[Result] = []
        for index, owner in enumerate(owners):
            results.append(_broadcast(own.get(index), owner))
        return results


def _broadcast(result: Result | None, owner: int) -> Result:
    """A result from the process that has it to all."""
    head: list[Any] = [None]
    if result is not None:
        head = [({k: (t.dtype, tuple(t.shape)) for k, t in result[0].items()}, result[1])]
    dist.broadcast_object_list(head, src=owner)
    kinds, facts = head[0]
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in kinds.items():
        tensor = torch.empty(shape, dtype=dtype) if result is None else result[0][name].cpu().contiguous()
        dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=owner)  # bytes: not every dtype can travel
        tensors[name] = tensor
    return tensors, facts


def joined() -> Processes:
    """The processes that ``torchrun`` started, joined when this is first called; one where it did not start any."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    if not dist.is_initialized():
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if torch.cuda.device_count() >= here:  # nccl wants a GPU for each process
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("cpu:gloo,cuda:nccl")
        else:
            dist.init_process_group("gloo")
        atexit.register(_part)
    return Processes(dist.get_rank(), dist.get_world_size())


def first_process() -> bool:
    """Whether this process shows and writes results: rank 0 of those that ``torchrun`` started, or the only one."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or int(os.environ.get("RANK", "0")) == 0


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _device() -> torch.device:
    """Where sums travel."""
    return torch.device("cuda" if "nccl" in str(dist.get_backend_config()) else "cpu")
