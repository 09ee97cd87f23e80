"""The dispatcher of a bundle on a GPU: its binaries through the driver, its kernels' sources just in time otherwise."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from qcompile.backends.triton.bundle import CHOICES, SOURCES, BinaryEntry, Bundle, Choices, digest, read_json
from qcompile.backends.triton.driver import Driver
from qcompile.backends.triton.launch import Argument, Config, JustInTime, Launch, Variant
from qcompile.errors import ArtifactError

_NULL = ctypes.c_void_p(0)


@dataclass(eq=False)
class BundleDispatcher:
    """Chooses among the configurations that have binaries for `gpu`, tuned ones first, and launches them.

    Args:
        gpu: a target of the bundle; None where it has no binaries for the GPU at hand, and all is compiled just in
        time. driver: loads and launches binaries.  stream: the stream to launch on, asked at each launch.
        fallback: runs what has no binary; None where nothing can, and then that is an error.
    """

    directory: Path
    bundle: Bundle
    gpu: str | None
    driver: Driver | None
    stream: Any
    fallback: JustInTime | None
    _functions: dict[Variant, tuple[ctypes.c_void_p, BinaryEntry]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        entries = self.bundle.kernels.values() if self.gpu is not None else ()
        self._binaries = {e.variant(): e.binaries[self.gpu] for e in entries if self.gpu in e.binaries}
        self._chosen = _tuned(self.directory, self.gpu)

    def choose(self, site: str, candidates: Sequence[Config]) -> Config:
        by_label = {config.label: config for config in candidates}
        if (label := self._chosen.get(site)) in by_label:
            return by_label[str(label)]
        compiled = self.bundle.sites.get(site, {}).get(self.gpu or "", ())
        return next((by_label[label] for label in compiled if label in by_label), candidates[0])

    def launch(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            variant = launch.variant
            if variant in self._binaries and self.driver is not None:
                self._launch(launch, variant)
            elif self.fallback is not None:
                self.fallback.launch([launch])
            else:
                raise ArtifactError(
                    f"the bundle has no binary of {launch.kernel} for {self.gpu or 'this GPU'}, and triton is not "
                    "installed to compile it; export with --gpu for this GPU, or: pip install triton"
                )

    def _launch(self, launch: Launch, variant: Variant) -> None:
        assert self.driver is not None
        function, entry = self._functions.get(variant) or self._load(variant)
        packed = pack_arguments(launch.arguments, variant, entry.hidden)
        self.driver.launch(function, launch.grid, entry.threads, entry.shared, self.stream(), packed)

    def _load(self, variant: Variant) -> tuple[ctypes.c_void_p, BinaryEntry]:
        assert self.driver is not None
        entry = self._binaries[variant]
        code = read_checked(self.directory / entry.file, entry.sha256)
        loaded = self.driver.load(code, entry.symbol, entry.shared), entry
        self._functions[variant] = loaded
        return loaded


def pack_arguments(arguments: Mapping[str, Argument], variant: Variant, hidden: int) -> list[Any]:
    """Arguments as ctypes values: addresses, int32, and a null pointer for each hidden one.

    Raises ArtifactError for an integer that does not fit 32 bits.
    """
    packed: list[Any] = []
    for name, kind, _ in variant.signature:
        value = arguments[name]
        if isinstance(value, Tensor):
            packed.append(ctypes.c_void_p(value.data_ptr()))
        elif kind == "i32" and -(1 << 31) <= value < 1 << 31:
            packed.append(ctypes.c_int32(value))
        else:
            raise ArtifactError(f"{variant.kernel}: {name}={value} does not fit 32 bits; use a shorter prompt or batch")
    return packed + [_NULL] * hidden


def read_checked(path: Path, sha256: str) -> bytes:
    """A file's bytes. Raises ArtifactError where it is missing or not what was written."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; export the artifact again")
    data = path.read_bytes()
    if digest(data) != sha256:
        raise ArtifactError(f"{path} was changed after it was written (its hash differs); export it again")
    return data


def load_sources(directory: Path, bundle: Bundle) -> str:
    """Make the kernels' sources of a bundle importable, each file's hash checked; returns the package's name."""
    found = digest(str(directory.resolve()).encode())[:12]
    package = f"qcompile_bundle_{found}"
    if package not in sys.modules:
        for file, sha256 in bundle.sources.items():
            read_checked(directory / file, sha256)
        folder = directory / SOURCES
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[package] = module
        spec.loader.exec_module(module)
    return package


def best_target(gpus: Sequence[str], name: str) -> str | None:
    """The target of a bundle whose binaries run on a GPU called `name`.

    A CUDA binary runs on its own compute capability and, for those below 9, on later ones of its major version; Triton
    compiles for sm_90 and later with features of that one chip.

    >>> best_target(["sm_80", "sm_90"], "sm_86"), best_target(["sm_90"], "sm_100"), best_target(["gfx942"], "gfx942")
    ('sm_80', None, 'gfx942')
    """
    if name in gpus:
        return name
    if not name.startswith("sm_"):
        return None
    number = int(name[3:])
    older = [int(gpu[3:]) for gpu in gpus if gpu.startswith("sm_") and int(gpu[3:]) < min(90, number)]
    fitting = [n for n in older if n // 10 == number // 10]
    return f"sm_{max(fitting)}" if fitting else None


def _tuned(directory: Path, gpu: str | None) -> dict[str, str]:
    if gpu is None or not (directory / CHOICES).is_file():
        return {}
    return {site: label for site, (label, _) in read_json(directory / CHOICES, Choices).gpus.get(gpu, {}).items()}
