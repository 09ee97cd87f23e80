"""Lowering: the graph on packed weights, its tensors by segment, its kernels compiled, and the table of all that."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qcompile.backend_base import LoweredFiles, StoredTensor, refuse
from qcompile.backends.triton.binaries import compiled_sites, write_binaries
from qcompile.backends.triton.bundle import GRAPH, SOURCES, Bundle, WeightEntry, digest, write_graph
from qcompile.backends.triton.enumerate_launches import needed
from qcompile.backends.triton.launch import require_triton
from qcompile.backends.triton.obstacles import obstacles
from qcompile.backends.triton.rewrite import Rewritten, rewrite
from qcompile.backends.triton.segments import segments_of
from qcompile.backends.triton.targets import parse_gpus
from qcompile.ir.program import Program
from qcompile.progress import track

if TYPE_CHECKING:
    from qcompile.backends.triton.backend import TritonBackend

_KERNELS = Path(__file__).parent / "kernels"


def lower(backend: TritonBackend, program: Program, directory: Path) -> LoweredFiles:
    """See `TritonBackend.lower`."""
    require_triton()
    import triton

    refuse(backend, obstacles(program))
    gpus = parse_gpus(backend.gpu)
    lowered = rewrite(program, backend.merge)
    write_graph(str(lowered.program), directory)
    shards = write_shards(lowered.program, directory)
    wanted = needed(lowered.program)
    entries = write_binaries(wanted, gpus, directory)
    bundle = Bundle(
        triton=triton.__version__,
        gpus=tuple(gpu.name for gpu in gpus),
        shards=shards,
        weights=weight_entries(lowered),
        kernels=entries,
        sites=compiled_sites(wanted, entries, gpus),
        sources=copy_sources(directory),
    )
    bundle.write(directory)
    count = sum(len(entry.binaries) for entry in entries.values())
    compiled = f"{count} binaries of {len(entries)} kernels for {', '.join(bundle.gpus)}" if gpus else "no binaries"
    spilled = [e.file for entry in entries.values() for e in entry.binaries.values() if e.spilled]
    notes = [*lowered.notes, compiled] + ([f"{len(spilled)} binaries spill registers"] if spilled else [])
    return LoweredFiles(GRAPH, stored_tensors(program, lowered), tuple(notes), {"triton": triton.__version__})


def write_shards(program: Program, directory: Path) -> dict[str, tuple[str, ...]]:
    """Write every tensor of the graph, a file a segment; returns the keys in each file. One segment is in memory."""
    from safetensors.torch import save_file

    by_segment: dict[int, list[str]] = {}
    for key, segment in segments_of(program).items():
        by_segment.setdefault(segment, []).append(key)
    (directory / "weights").mkdir()
    shards = {}
    for segment, keys in track(sorted(by_segment.items()), "packing weights"):
        file = f"weights/segment-{segment:03d}.safetensors"
        tensors = {key: program.weights[key].contiguous() for key in keys}
        save_file({key: t.clone() if t._is_view() else t for key, t in tensors.items()}, directory / file)
        shards[file] = tuple(keys)
    return shards


def copy_sources(directory: Path) -> dict[str, str]:
    """Copy the kernels into the bundle; file → hash."""
    (directory / SOURCES).mkdir(parents=True)
    sources = {}
    for path in sorted(_KERNELS.glob("*.py")):
        data = path.read_bytes()
        (directory / SOURCES / path.name).write_bytes(data)
        sources[f"{SOURCES}/{path.name}"] = digest(data)
    return sources


def weight_entries(lowered: Rewritten) -> dict[str, WeightEntry]:
    """The table of packed weights."""
    return {
        w.name: WeightEntry(
            format=w.format,
            planes=w.planes,
            start=w.start,
            stop=w.stop,
            transposed=w.transposed,
            stacked=w.stacked,
        )
        for w in lowered.packed
    }


def stored_tensors(program: Program, lowered: Rewritten) -> tuple[StoredTensor, ...]:
    """Every weight with the bytes that are written for it; those of merged ones are shared out by their outputs."""
    store, packed = lowered.program.weights, {w.name: w for w in lowered.packed}
    taken = {key for w in lowered.packed for key in w.stored}
    found = []
    for name, w in packed.items():
        shape, _ = program.weights.meta(f"{name}.codes")
        share = (w.stop - w.start) / w.columns
        size = round(share * sum(store.nbytes(key) for key in w.stored))
        found.append(StoredTensor(name, _container(w.format), torch.Size(shape).numel(), size))
    rest = [key for key in store if key not in taken]
    for key in rest:
        name = key.removesuffix(".codes")
        if key.endswith(_PARTS) and f"{key.rpartition('.')[0]}.codes" in rest:
            continue
        shape, dtype = store.meta(key)
        size = sum(store.nbytes(k) for k in rest if k == key or (name != key and k.startswith(f"{name}.")))
        label = name if name != key or f"{name}.codes" not in program.weights else f"{key} (float copy)"
        found.append(StoredTensor(label, str(dtype).removeprefix("torch."), torch.Size(shape).numel(), size))
    return tuple(found)


_PARTS = (".scale", ".zero_point")


def _container(format: str) -> str:
    """``int4``; a code that is stored wider says so: ``int3 in 4 bits``."""
    element, bits = format.split()[0], int(format.split()[1].partition("=")[2])
    return element if str(bits) in element or not element.startswith(("int", "uint")) else f"{element} in {bits} bits"
