"""Compiling kernels ahead of time, for GPUs that are not here.

Triton's own compiler is called below its just-in-time layer, which wants a GPU. Floating-point contraction is set, not
left to Triton's default, which differs from release to release; line numbers are left out, so that equal kernels give
equal bytes wherever they are compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qcompile.backends.triton.launch import Variant, for_chip, kernel_function, require_triton
from qcompile.backends.triton.targets import GPU
from qcompile.errors import LoweringError

HIDDEN_POINTERS = ("global_scratch_size", "profile_scratch_size")
"""Metadata of the pointers that Triton puts behind a kernel's arguments: there is one for each that it knows of."""


@dataclass(frozen=True)
class Binary:
    """A kernel for one GPU.

    - `name`: its symbol.  `code`: the file's bytes.  `assembly`: PTX or AMDGCN text.
    - `shared`: bytes of shared memory to launch it with.  `threads`: of a program.
    - `hidden`: pointers behind the arguments; null, as the kernels use no scratch memory.
    - `registers`: a thread.  `spilled`: bytes of a thread's registers in memory.
    """

    name: str
    code: bytes
    assembly: str
    shared: int
    threads: int
    hidden: int
    registers: int
    spilled: int


def compile_variant(variant: Variant, gpu: GPU) -> Binary:
    """Compile a kernel for a GPU; a second time it comes out of Triton's cache.

    Raises LoweringError where Triton is not installed, cannot compile it for this GPU, or it needs more shared memory
    than a program gets there.
    """
    require_triton()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_function(variant.kernel)
    constants = for_chip(dict(variant.constants), gpu.chip)
    types = {name: kind for name, kind, _ in variant.signature}
    if unknown := [name for name in kernel.arg_names if name not in types and name not in constants]:
        raise LoweringError(f"kernel {variant.kernel} was given no {unknown[0]!r}")
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {name for name, _, known in variant.signature if known}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in aligned}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True}
    try:
        with _without_line_numbers():
            target = GPUTarget(gpu.backend, gpu.arch, gpu.warp)
            compiled = triton.compile(source, target=target, options=options)
    except Exception as error:  # the compiler raises what its passes raise
        reason = " ".join(str(error).split())[:300]
        raise LoweringError(f"Triton cannot compile {variant.kernel} for {gpu.name}: {reason}") from error
    return _binary(compiled, gpu, variant)


def _binary(compiled: Any, gpu: GPU, variant: Variant) -> Binary:
    metadata = compiled.metadata
    if metadata.shared > gpu.shared_a_program:
        raise LoweringError(
            f"{variant.kernel} needs {metadata.shared} bytes of shared memory on {gpu.name}, a program gets "
            f"{gpu.shared_a_program}; leave this configuration out"
        )
    if any(getattr(metadata, size, 0) for size in HIDDEN_POINTERS):
        raise LoweringError(f"{variant.kernel} for {gpu.name} wants scratch memory, which bundles do not provide")
    code, assembly = compiled.asm[gpu.binary], compiled.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    registers, spilled = _cubin_use(code) if gpu.backend == "cuda" else _hsaco_use(assembly)
    return Binary(
        name=metadata.name,
        code=code,
        assembly=assembly,
        shared=metadata.shared,
        threads=_threads(assembly, gpu),
        hidden=sum(hasattr(metadata, size) for size in HIDDEN_POINTERS),
        registers=registers,
        spilled=spilled,
    )


def _threads(assembly: str, gpu: GPU) -> int:
    """Threads of a program, as the assembly says: warp specialisation may add some to the warps that were asked for."""
    pattern = r"\.reqntid\s+(\d+)" if gpu.backend == "cuda" else r"\.max_flat_workgroup_size:\s*(\d+)"
    found = re.search(pattern, assembly)
    if found is None:
        raise LoweringError(f"Triton's assembly for {gpu.name} does not say how many threads a program has")
    return int(found[1])


def parameters(assembly: str, gpu: GPU) -> list[int]:
    """Bytes of every parameter that a launch passes, Triton's hidden pointers included, read from the assembly."""
    if gpu.backend == "cuda":
        declared = assembly.partition(".visible .entry")[2].partition(")")[0]
        return [int(bits) // 8 for bits in re.findall(r"\.param \.[a-z](\d+)", declared)]
    arguments = assembly.partition(".args:")[2].partition(".group_segment_fixed_size")[0]
    found = re.findall(r"\.size:\s*(\d+)\s+\.value_kind:\s*(\w+)", arguments)
    return [int(size) for size, kind in found if not kind.startswith("hidden_")]  # those the runtime fills in


def _hsaco_use(assembly: str) -> tuple[int, int]:
    vector, spilled = (re.search(rf"\.{key}:\s*(\d+)", assembly) for key in ("vgpr_count", "vgpr_spill_count"))
    return int(vector[1]) if vector else 0, 4 * int(spilled[1]) if spilled else 0


def _cubin_use(code: bytes) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as `cuobjdump`, which comes with Triton, reads them from a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        told = subprocess.run(
            [_cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (0, 0)


@cache
def _cuobjdump() -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


@contextmanager
def _without_line_numbers() -> Iterator[None]:
    import triton

    before = triton.knobs.compilation.disable_line_info
    triton.knobs.compilation.disable_line_info = True
    try:
        yield
    finally:
        triton.knobs.compilation.disable_line_info = before
