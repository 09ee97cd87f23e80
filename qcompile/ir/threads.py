"""Independent tasks on several cores, where the operators of each use one.

An operator that is itself spread over cores waits for the slowest at its end, and spins while it waits: on a busy
machine small operators then cost many times their arithmetic. Tasks of many operators each wait once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")

_AHEAD = 2
"""Results a thread that may wait to be taken."""


def in_order(tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
    """The tasks' results, in their order: as many at a time as torch has threads, a few ahead of what is taken.

    Gradient and inference mode are those of the caller. An error of a task is raised where its result is taken; those
    that were not begun are dropped.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(tasks) < 2:
        for task in tasks:
            yield task()
        return
    pool = _pool(threads)
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    waiting: deque[Future[T]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_in_mode, task, grad, inference))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)


def _in_mode(task: Callable[[], T], grad: bool, inference: bool) -> T:
    with torch.inference_mode(inference), torch.set_grad_enabled(grad):
        return task()


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads whose operators use one core each."""
    pool = ThreadPoolExecutor(threads, "qcompile")
    started = threading.Barrier(threads)

    def alone() -> None:
        torch.get_num_threads()  # a thread's first operator would set its number anew; this does so now
        torch.set_num_threads(1)
        started.wait()

    for future in [pool.submit(alone) for _ in range(threads)]:
        future.result()
    torch.set_num_threads(threads)  # torch has it by thread, but a new thread begins with what was last set in any
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no threads
