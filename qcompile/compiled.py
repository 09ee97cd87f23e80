"""`CompiledModel`: a program that has been through a recipe; runs, saves, loads, exports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qcompile
from qcompile.artifact import (
    Artifact,
    copy_tokenizer,
    export_program,
    float32_bytes,
    input_entries,
    library_versions,
    mean_bits,
    quantized_weights,
)
from qcompile.atomic import staged_directory
from qcompile.backend_base import make_backend
from qcompile.errors import ArtifactError
from qcompile.generate import ProgramStepper, generate, held_weights
from qcompile.ir.program import Program
from qcompile.ir.types import SHORT
from qcompile.manifest import Manifest, TensorEntry, describe_files
from qcompile.recipe import Recipe
from qcompile.report import CompileReport


@dataclass(frozen=True, eq=False)
class CompiledModel:
    """What `qcompile.compile` returns."""

    program: Program
    recipe: Recipe
    report: CompileReport
    reference: Program | None = None  # the same model before the recipe; None after loading

    def __call__(self, input_ids: Tensor, **named: Tensor) -> Tensor:
        """Logits ``[batch, sequence, vocabulary]`` for token ids ``[batch, sequence]`` (int64).

        Mask, positions and an empty cache are filled in where not given by name.
        """
        logits: Tensor = self.program(input_ids=input_ids, **named)
        return logits

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 32, *, temperature: float = 0.0, seed: int = 0
    ) -> Tensor:
        """Continue prompts ``[batch, sequence]`` with the KV cache, greedily unless `temperature` > 0."""

        with held_weights(self.program):
            return generate(
                ProgramStepper(self.program),
                input_ids,
                max_new_tokens,
                temperature=temperature,
                seed=seed,
                eos_token_id=self.program.info.get("eos_token_id"),
            )

    def save(self, directory: str | Path) -> None:
        """Save program, codes and recipe; `qcompile.load` gives the same model, bit for bit.

        Raises ArtifactError where the directory is not empty or cannot be written.
        """
        from qcompile.capture.saved import save_program

        with staged_directory(directory) as staged:
            save_program(self.program, staged)
            (staged / "recipe.yaml").write_text(str(self.recipe))
            self.report.write(staged / "report.json")
            copy_tokenizer(self.program, staged)
            self._manifest(staged).write(staged)

    def export(self, target: str, directory: str | Path, options: Mapping[str, Any] | None = None) -> Artifact:
        """Lower to `target` (e.g. ``"onnx_qcdq"``), run it in its own runtime, compare, and put it in place.

        Raises LoweringError for what the target cannot take, ArtifactError where runtime and Program disagree.
        """
        backend = make_backend(target, options)
        recipe, proofs = self.recipe.to_dict(), self.report.accumulators()
        return export_program(self.program, directory, backend, recipe, self.report.sqnr(), self.reference, proofs)

    def _manifest(self, directory: Path) -> Manifest:
        tensors = self._tensors()
        files = describe_files(directory)
        return Manifest(
            qcompile=qcompile.__version__,
            kind="model",
            main="program.qir",
            model=self.program.info,
            recipe=self.recipe.to_dict(),
            versions=library_versions(),
            inputs=input_entries(self.program),
            outputs=list(self.program.output_names),
            tensors=tensors,
            bits_per_weight=mean_bits(tensors.values()),
            quantized_bits_per_weight=mean_bits(t for t in tensors.values() if t.spec),
            bytes=sum(f.bytes for f in files.values()),
            float32_bytes=float32_bytes(self.reference or self.program),
            files=files,
        )

    def _tensors(self) -> dict[str, TensorEntry]:
        """Every weight as it is saved, scales, zero-points and outer parameters counted with their codes."""
        from qcompile.capture.packed import packings, weight_parts

        specs, sqnr, store = quantized_weights(self.program), self.report.sqnr(), self.program.weights
        proofs, packed, parts = self.report.accumulators(), packings(self.program), weight_parts(self.program)
        sizes = {key: packed[key].nbytes if key in packed else store.nbytes(key) for key in store}
        taken = {key for keys in parts.values() for key in keys}
        tensors = {}
        for name, keys in [*parts.items(), *((key, [key]) for key in store if key not in taken)]:
            (shape, dtype), packing = store.meta(keys[0]), packed.get(keys[0])
            elements, size = int(torch.Size(shape).numel()), sum(sizes[key] for key in keys)
            tensors[name if name not in tensors else f"{name} (float copy)"] = TensorEntry(
                container=SHORT[dtype] if packing is None else f"{'i' if packing.signed else 'u'}{packing.bits}",
                elements=elements,
                bytes=size,
                bits_per_element=round(8 * size / max(1, elements), 4),
                spec=specs.get(name) if keys[0] != name else None,
                sqnr_db=sqnr.get(name) if keys[0] != name else None,
                accumulator=proofs.get(name) if keys[0] != name else None,
            )
        return tensors


def load(directory: str | Path) -> CompiledModel:
    """Load what `CompiledModel.save` wrote; codes are bit-identical.

    Raises ArtifactError where the directory holds no saved model, or a file of it is missing or was changed.
    """
    from qcompile.capture.saved import load_program

    manifest = Manifest.read(directory)
    if manifest.kind != "model":
        raise ArtifactError(
            f"{directory} is an exported artifact; open it with qcompile.Artifact.open, or load a saved model"
        )
    manifest.check_files(directory)
    program = load_program(Path(directory))
    return CompiledModel(program, Recipe.load(manifest.recipe), CompileReport.read(Path(directory) / "report.json"))
