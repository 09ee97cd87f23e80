"""The aoti target: an AOTInductor package that computes on packed weights, for CPUs.

Its graph is that of a bundle, whose operators AOTInductor compiles by their references: codes are taken apart, made
numbers and multiplied in its C++. Weights stay beside it, packed, in safetensors by segment, and are handed over when
it is loaded.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qcompile.backend_base import Backend, LoweredFiles, Obstacle, refuse, register_backend
from qcompile.errors import ArtifactError, LoweringError, QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import InputType, fill_inputs, signature
from qcompile.ir.types import dim_expr

PACKAGE = "model.pt2"
_EXAMPLE = {"batch": 2, "sequence": 3, "past": 4}


@register_backend
@dataclass(frozen=True)
class AotiBackend(Backend):
    """An AOTInductor package with packed weights, run by torch on the CPU.

    - `merge`: make products that read one value (q, k and v; gate and up) one product.
    """

    merge: bool = True

    name: ClassVar[str] = "aoti"
    runtime: ClassVar[str] = "AOTInductor"

    def obstacles(self, program: Program) -> list[Obstacle]:
        """What the triton target cannot take, and what is quantized as it runs; no weight is read."""
        from qcompile.backends.onnx_qcdq.recognise import CHOOSE, QUANTIZE
        from qcompile.backends.triton.obstacles import obstacles

        found = obstacles(program)
        named = {obstacle.node for obstacle in found}
        for node in program.calls(CHOOSE, QUANTIZE):
            if node.name not in named:
                reason = "AOTInductor compiles no scales that are chosen as it runs; quantize weights alone"
                found.append(Obstacle(node.name, program.module_of(node), reason))
        return found

    def lower(self, program: Program, directory: Path) -> LoweredFiles:
        """Write ``model.pt2``, the graph and the weights into `directory`.

        Raises LoweringError for an obstacle, and where AOTInductor does not compile the graph (it needs a C++
        compiler).
        """
        from qcompile.backends.triton.bundle import Bundle, write_graph
        from qcompile.backends.triton.lower import stored_tensors, weight_entries, write_shards
        from qcompile.backends.triton.rewrite import rewrite

        refuse(self, self.obstacles(program))
        lowered = rewrite(program, self.merge, experts=False)
        write_graph(str(lowered.program), directory)
        shards = write_shards(lowered.program, directory)
        weights = weight_entries(lowered)
        Bundle(triton=None, gpus=(), shards=shards, weights=weights, kernels={}, sites={}, sources={}).write(directory)
        _compile(lowered.program, directory / PACKAGE)
        notes = (*lowered.notes, f"compiled for this machine's {platform.machine()} processor")
        return LoweredFiles(PACKAGE, stored_tensors(program, lowered), notes)

    def load(self, directory: Path) -> AotiRunner:
        """The package, with its weights in memory."""
        return AotiRunner(directory)

    def stored_codes(self, directory: Path) -> Iterator[tuple[str, Tensor]]:
        """(weight name, codes as int8 or uint8 in the program's layout), unpacked from the files one at a time."""
        from qcompile.backends.triton.reading import stored_codes

        return stored_codes(Path(directory))


def _compile(program: Program, path: Path) -> None:
    exported = program.to_exported()
    exported.example_inputs = (tuple(_examples(program)), {})
    settings = {"aot_inductor.package_constants_in_so": False}
    try:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path), inductor_configs=settings)
    except Exception as error:  # inductor and the compiler it calls raise what they raise
        reason = " ".join(str(error).split())[:300]
        raise LoweringError(f"AOTInductor does not compile the graph: {reason}") from error


def _examples(program: Program) -> Iterator[Tensor]:
    """An input of each kind, of small sizes."""
    sizes = {symbol: _EXAMPLE.get(name, 3) for symbol, name in program.symbols.items()}
    for node in program.inputs:
        fake = node.meta["val"]
        exprs = [dim_expr(size) for size in fake.shape]
        shape = [e if isinstance(e, int) else int(e.subs(sizes)) for e in exprs]
        yield torch.ones(shape, dtype=fake.dtype)


class AotiRunner:
    """A package that is loaded.

    Raises ArtifactError where a file is missing, or the package was compiled for another machine or torch.
    """

    def __init__(self, directory: str | Path) -> None:
        from qcompile.backends.triton.bundle import Bundle, read_graph
        from qcompile.backends.triton.runtime import weight_store

        folder = Path(directory)
        if not (folder / PACKAGE).is_file():
            raise ArtifactError(f"{folder} has no {PACKAGE}; give a directory exported with --target aoti")
        self.program = Program.parse(read_graph(folder), weight_store(folder, Bundle.read(folder), torch.device("cpu")))
        self.inputs: Mapping[str, InputType] = signature(self.program)
        try:
            self.model: Any = torch._inductor.aoti_load_package(str(folder / PACKAGE))
            self._weights = {key: self.program.weights[key] for key in self.program.weights}
            wanted = set(self.model.get_constant_fqns())
            given = {key: tensor for key, tensor in self._weights.items() if key in wanted}
            self.model.load_constants(given, check_full_update=True, user_managed=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"torch {torch.__version__} does not load {folder / PACKAGE}: {reason}") from error

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name; inputs by name, all of them."""
        if missing := [name for name in self.inputs if name not in feeds]:
            raise QCompileError(f"input {missing[0]!r} is missing; the model takes {list(self.inputs)}")
        with torch.no_grad():
            results = self.model(*(feeds[name] for name in self.inputs))
        values = results if isinstance(results, list | tuple) else (results,)
        return dict(zip(self.program.output_names, values, strict=True))

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step of generation: what is not given is filled in, what the model does not take is left out."""
        taken = {name: tensor for name, tensor in feeds.items() if name in self.inputs}
        return self.run(fill_inputs(self.inputs, taken))
