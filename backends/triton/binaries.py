"""Compiling what a graph needs into files of a bundle, with the table that a launcher reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qcompile.backends.triton.aot import Binary, compile_variant
from qcompile.backends.triton.bundle import ArgumentEntry, BinaryEntry, KernelEntry, digest
from qcompile.backends.triton.enumerate_launches import Needed
from qcompile.backends.triton.launch import Variant
from qcompile.backends.triton.targets import GPU, occupancy
from qcompile.errors import LoweringError
from qcompile.progress import track

_TILES = ("BLOCK_M", "BLOCK_N", "PARTIAL", "STAGES", "SCALE_FIRST", "RUNS")
"""Constants that a configuration decides: they stand in a file's name, not in its folder's."""


def write_binaries(needed: Needed, gpus: Sequence[GPU], directory: Path) -> dict[str, KernelEntry]:
    """Compile every variant for every GPU; by the variant's key, what was written, and why where nothing was.

    Raises LoweringError for a site that is left without any binary for one of the GPUs.
    """
    jobs = list(needed.variants.items()) if gpus else []
    entries = {
        key: _entry(key, variant, config, gpus, directory) for key, (variant, config) in track(jobs, "compiling")
    }
    for site, labels in needed.sites.items() if gpus else ():
        for gpu in gpus:
            if not any(all(gpu.name in entries[k].binaries for k in keys) for keys in labels.values()):
                key = next(iter(labels.values()))[0]
                raise LoweringError(f"no configuration for {gpu.name} at {site}: {entries[key].left_out[gpu.name]}")
    return entries


def compiled_sites(
    needed: Needed, entries: dict[str, KernelEntry], gpus: Sequence[GPU]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Site → GPU → labels of the configurations all of whose kernels have a binary, those that spill registers last."""

    def fit(gpu: GPU, labels: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
        whole = [label for label, keys in labels.items() if all(gpu.name in entries[k].binaries for k in keys)]
        return tuple(sorted(whole, key=lambda label: any(entries[k].binaries[gpu.name].spilled for k in labels[label])))

    return {site: {gpu.name: fit(gpu, labels) for gpu in gpus} for site, labels in needed.sites.items()}


def folder_of(variant: Variant) -> str:
    """`family.function-0123abcd`: variants that differ only in their configuration share a folder."""
    constants = tuple((name, value) for name, value in variant.constants if name not in _TILES)
    same = Variant(variant.kernel, variant.signature, constants, 0, 0)
    return f"{variant.kernel}-{same.key[:8]}"


def _entry(key: str, variant: Variant, config: str, gpus: Sequence[GPU], directory: Path) -> KernelEntry:
    binaries, left_out = {}, {}
    for gpu in gpus:
        try:
            binary = compile_variant(variant, gpu)
        except LoweringError as error:
            left_out[gpu.name] = str(error)
            continue
        file = f"kernels/{folder_of(variant)}/{gpu.name}/{config}.{gpu.binary}"
        if (directory / file).exists():
            file = f"kernels/{folder_of(variant)}/{gpu.name}/{config}-{key[:6]}.{gpu.binary}"
        binaries[gpu.name] = _write(binary, gpu, variant, directory, file)
    arguments = tuple(ArgumentEntry(name=n, type=t, aligned=a) for n, t, a in variant.signature)
    return KernelEntry(
        kernel=variant.kernel,
        config=config,
        arguments=arguments,
        constants=dict(variant.constants),
        warps=variant.warps,
        stages=variant.stages,
        binaries=binaries,
        left_out=left_out,
    )


def _write(binary: Binary, gpu: GPU, variant: Variant, directory: Path, file: str) -> BinaryEntry:
    path = directory / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(binary.code)
    if gpu.backend == "cuda":
        path.with_suffix(".ptx").write_text(binary.assembly)
    return BinaryEntry(
        file=file,
        sha256=digest(binary.code),
        symbol=binary.name,
        threads=binary.threads,
        shared=binary.shared,
        hidden=binary.hidden,
        registers=binary.registers,
        spilled=binary.spilled,
        occupancy=round(occupancy(gpu, binary.threads // gpu.warp, binary.registers, binary.shared), 3),
    )
