"""What this machine has to offer: memory that is free, arithmetic and memory traffic in a second."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qcompile.calibration.integers import product_of_codes
from qcompile.linalg import product

_SIDE, _COPIED = 768, 16 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # options of mallopt(3)
_LARGEST_KEPT, _MOST_KEPT = 64 << 20, 512 << 20


@dataclass(frozen=True)
class Speed:
    """Float32 operations a second in matrix products, and bytes read and written a second by what is no product; how
    much faster products are in bfloat16, and in 8-bit integers.
    """

    flops: float
    bytes: float
    gain: float = 1.0
    integers: float = 1.0


@lru_cache(maxsize=4)
def speed(threads: int, device: str | None = None) -> Speed:
    """Measured within 0.5 s, once for a number of threads (of torch, as they are set now) and a device."""
    here = torch.device(device or "cpu")
    a, b = torch.ones(_SIDE, _SIDE, device=here), torch.ones(_COPIED // 4, device=here)
    squared = _best(lambda: product(a, a), here)
    half = a.bfloat16()
    halved = _best(lambda: torch.mm(half, half), here)
    codes = torch.ones(_SIDE, _SIDE, dtype=torch.int8, device=here)
    counted = _best(lambda: product_of_codes(codes, codes), here)
    added = _best(lambda: torch.add(b, 1.0), here)
    return Speed(2 * _SIDE**3 / squared, 2 * _COPIED / added, squared / halved, squared / counted)


def free_memory(device: str | None = None, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken yet: of the GPU where `device` is one, else of the machine and of every control group
    (version 2) above this process, page cache that can be dropped counted as free.
    """
    if device is not None and torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return min([_machine(proc), *_groups(proc, groups)])


def resident(proc: Path = Path("/proc")) -> int:
    """Bytes that this process holds now; 0 where the system does not say."""
    if (file := proc / "self/statm").exists():
        return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def peak_memory() -> int:
    """Most bytes that this process ever held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def keep_freed() -> None:
    """Have the C library hold freed memory ready for what comes next, where it can (glibc), until `give_back`.

    Otherwise blocks of a few MB, which come and go by the thousand, are taken from the system one by one, and to fill
    in their pages costs a tenth of a whole run. Blocks of `_LARGEST_KEPT` or more still go back at once: kept, they
    would be left in pieces by smaller ones, and the peak would grow.
    """
    tune = getattr(_library(), "mallopt", None)
    if tune is not None:
        tune(_MMAP_THRESHOLD, _LARGEST_KEPT)
        tune(_TRIM_THRESHOLD, _MOST_KEPT)


def give_back() -> None:
    """Return what the C library keeps of freed memory to the system, where it can (glibc).

    Its heap is left in pieces by large tensors that come and go between small ones that stay; the pieces add up.
    """
    trim = getattr(_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def _machine(proc: Path) -> int:
    if (file := proc / "meminfo").exists():
        table = dict(line.split(":") for line in file.read_text().splitlines())
        return int(table["MemAvailable"].split()[0]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(proc: Path, root: Path) -> list[int]:
    file = proc / "self/cgroup"
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line[3:].strip("/") for line in lines if line.startswith("0::")]
    found = []
    for name in names[:1]:
        folder = root / name
        for here in (folder, *folder.parents):
            limit = here / "memory.max"
            if here != root and root not in here.parents:
                break
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                statistics = dict(line.split() for line in (here / "memory.stat").read_text().splitlines())
                used = int((here / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
                found.append(max(0, int(text) - used))
    return found


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of a few runs; the first of all warms up and does not count."""
    shortest = float("inf")
    began = time.perf_counter()
    for number in range(6):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if number:
            shortest = min(shortest, now - start)
            if now - began > 0.1:
                break
    return shortest
