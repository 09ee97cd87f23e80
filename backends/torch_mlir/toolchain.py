"""iree-compile and iree-runtime: whether they are there, with which flags modules are compiled, and what went wrong."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.errors import LoweringError, QCompileError, nearest

INSTALL = "pip install 'qcompile[iree]'"


@dataclass(frozen=True)
class Attempt:
    """One run of the compiler."""

    module: str
    flags: tuple[str, ...]
    seconds: float
    error: str | None = None  # None: it worked

    def entry(self) -> dict[str, Any]:
        """For a manifest."""
        found: dict[str, Any] = {"module": self.module, "flags": list(self.flags), "seconds": round(self.seconds, 2)}
        return found if self.error is None else {**found, "error": self.error}


def missing() -> str | None:
    """Which package is not installed, and how to get it; None where both are."""
    for module, package in (("iree.compiler", "iree-base-compiler"), ("iree.runtime", "iree-base-runtime")):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # no package iree at all
            found = False
        if not found:
            return f"{package} is not installed; run: {INSTALL}"
    return None


def versions() -> dict[str, str]:
    """Versions of what is installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("iree-base-compiler", "iree-base-runtime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def cpu_flags(cpu: str, devices: int) -> list[str]:
    """Flags for the CPU target on so many logical devices."""
    place = ["--iree-hal-target-device=local"]
    if devices > 1:
        place = [f"--iree-hal-target-device=__device_{i}=local[{i}]" for i in range(devices)]
    backend = ["--iree-hal-local-target-device-backends=llvm-cpu", f"--iree-llvmcpu-target-cpu={cpu}"]
    return ["--iree-input-type=torch", *place, *backend]


def cpu_target(cpu: str) -> tuple[str, tuple[str, ...]]:
    """What the compiler takes `cpu` for: its name (that of this machine for ``host``), and the features it may use.

    Raises LoweringError for a name that the compiler does not know.
    """
    from iree.compiler import CompilerToolError, compile_str

    flags = [*cpu_flags(cpu, 1), "--compile-to=preprocessing"]
    try:
        text = compile_str("module {}", extra_args=flags).decode()
    except CompilerToolError as error:
        known = re.search(r"List of accepted CPUs: (.*)", str(error))
        several = known[1].split(", ") if known else []
        raise LoweringError(
            f"cpu={cpu!r} is no CPU that iree-compile knows{nearest(cpu, several)}; use host or one of: "
            f"{', '.join(several[-12:])}"
        ) from None
    name, features = re.search(r'cpu = "([^"]*)"', text), re.search(r'cpu_features = "([^"]*)"', text)
    last: dict[str, bool] = {}
    for word in features[1].split(",") if features else ():
        last[word[1:]] = word[0] == "+"  # a later word overrides an earlier one
    return name[1] if name else cpu, tuple(sorted(word for word, on in last.items() if on))


def lacking(features: Sequence[str]) -> list[str]:
    """Vector instructions among `features` that this machine's CPU lacks; nothing where that is not known."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    have = {re.sub(r"\W|_", "", flag) for flag in flags[1].split()} if flags else set()
    wanted = [f for f in features if f.startswith(("avx", "amx", "fma", "f16c"))]
    return [f for f in wanted if have and re.sub(r"\W|_", "", f) not in have]


NO_FUSION = "--iree-dispatch-creation-enable-aggressive-fusion=false"
"""A norm, the largest of its values and their rounding in one loop take more stack than a thread has."""


def compile_module(mlir: Path, out: Path, flags: Sequence[str], level: str, data_tiling: bool) -> list[Attempt]:
    """Compile a file of MLIR to `out`; where it fails, again with less fusion, and without data tiling.

    Raises LoweringError with the compiler's first error, named by node and module, where nothing works.
    """
    attempts: list[Attempt] = []
    for tiling in (True, False) if data_tiling else (False,):
        for less in ([], [NO_FUSION]):
            tried = [*flags, f"--iree-opt-level={level}", f"--iree-opt-data-tiling={str(tiling).lower()}", *less]
            attempts.append(attempt(mlir, out, tried))
            error = attempts[-1].error
            if error is None:
                return attempts
            if "legalize" in error or "expected" in error:
                break  # what it does not know it does not learn
        else:
            continue
        break
    raise LoweringError(f"iree-compile {versions()['iree-base-compiler']} refuses {mlir.name}: {attempts[-1].error}")


def attempt(mlir: Path, out: Path, flags: list[str]) -> Attempt:
    """Compile a file of MLIR to `out` with these flags."""
    import time

    from iree.compiler import CompilerToolError, compile_file

    start = time.perf_counter()
    try:
        compile_file(str(mlir), output_file=str(out), extra_args=flags)
    except CompilerToolError as error:
        return Attempt(mlir.name, tuple(flags), time.perf_counter() - start, first_error(str(error)))
    return Attempt(mlir.name, tuple(flags), time.perf_counter() - start)


def first_error(text: str) -> str:
    """The compiler's first complaint on one line: operator, and the node and module that it came from.

    >>> first_error('loc("x (module m)"): error: failed to legalize operation \\'torch.aten.diff\\': …')
    "failed to legalize operation 'torch.aten.diff': … at x (module m)"
    """
    lines = [line for line in text.splitlines() if "error:" in line] or text.splitlines()[-1:]
    line = lines[0] if lines else "it gave no reason"
    place = re.search(r'"([^"]*\(module [^"]*\))"', text)
    message = line.partition("error:")[2].strip() or line
    message = message if len(message) < 300 else f"{message[:300]}…"
    return message + (f" at {place[1]}" if place else "")


def write_bytecode(mlir: Path, out: Path) -> None:
    """Write a module's bytecode beside its text."""
    from iree.compiler import ir

    with ir.Context(), out.open("wb") as file:
        ir.Module.parse(mlir.read_text()).operation.write_bytecode(file)


def known_operator(name: str) -> bool:
    """Whether the installed compiler's torch dialect has an operator of this name."""
    from iree.compiler import ir

    with ir.Context() as context:
        return bool(context.is_registered_operation(name))


def require_runtime() -> None:
    """Raise QCompileError unless iree-base-runtime can be imported."""
    if (reason := missing()) is not None:
        raise QCompileError(reason)
