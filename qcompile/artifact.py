"""Artifacts: a lowered program in a directory with a manifest, checked in the runtime it is for."""

from __future__ import annotations

import hashlib
import platform
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qcompile
from qcompile.atomic import check_target, staged_directory
from qcompile.backend_base import Backend, LoweredFiles, Runner, StepRunner, make_backend, refuse
from qcompile.errors import ArtifactError
from qcompile.ir.program import Program
from qcompile.ir.run import InputType, fill_inputs, signature
from qcompile.ir.types import DTYPES, SHORT
from qcompile.manifest import AccumulatorEntry, Agreement, InputEntry, Manifest, TensorEntry, describe_files

REFERENCE = "reference.safetensors"  # prompts and the Program's logits on them
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
)
_PROMPTS, _PROMPT_LENGTH, _MAX_REFERENCE = 2, 12, 16 << 20

WEIGHT_ONLY_TOLERANCE = 1e-3  # max |Δlogit| / max |logit|
ACTIVATION_TOLERANCE = 1e-1  # a runtime may round an activation the other way; every flip moves the logits a little


@dataclass(frozen=True)
class Artifact:
    """An exported model in its directory.

    >>> Artifact.open("nowhere")
    Traceback (most recent call last):
    qcompile.errors.ArtifactError: nowhere has no manifest.json: it is no qcompile artifact; give the exported directory
    """

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: str | Path) -> Artifact:
        """Open an artifact. Raises ArtifactError where the directory holds none."""
        manifest = Manifest.read(directory)
        if manifest.kind != "artifact":
            raise ArtifactError(
                f"{directory} holds a saved model, no artifact; load it with qcompile.load and export it"
            )
        return cls(Path(directory), manifest)

    @property
    def main(self) -> Path:
        """The file a runtime opens."""
        return self.directory / self.manifest.main

    @property
    def info(self) -> dict[str, Any]:
        """What is known of the model: type, special tokens, context length."""
        tokenizer = {"tokenizer": str(self.directory)} if (self.directory / "tokenizer.json").exists() else {}
        return {**self.manifest.model, **tokenizer}

    @cached_property
    def runner(self) -> Runner:
        """The artifact loaded in its runtime."""
        return self.backend.load(self.directory)

    @property
    def backend(self) -> Backend:
        """The backend that wrote it."""
        assert self.manifest.target is not None
        return make_backend(self.manifest.target, self.manifest.target_options)

    def run_named(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs by name; inputs by name, those of a decoder filled in where not given."""
        kinds = {n: InputType(DTYPES[e.dtype], tuple(e.sizes)) for n, e in self.manifest.inputs.items()}
        return self.runner.run(fill_inputs(kinds, feeds))

    def run(self, input_ids: Tensor) -> Tensor:
        """Logits ``[batch, sequence, vocabulary]`` for token ids ``[batch, sequence]`` (the first output of others)."""
        outputs = self.run_named({next(iter(self.manifest.inputs)): input_ids})
        return outputs["logits"] if "logits" in outputs else next(iter(outputs.values()))

    __call__ = run

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 32, *, temperature: float = 0.0, seed: int = 0
    ) -> Tensor:
        """Continue a prompt ``[batch, sequence]`` in the artifact's own runtime, greedily unless `temperature` > 0."""
        from qcompile.generate import generate

        def step(feeds: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return self.run_named({name: tensor for name, tensor in feeds.items() if name in self.manifest.inputs})

        stepping = self.runner if isinstance(self.runner, StepRunner) else None
        return generate(
            step if stepping is None else stepping.stepper(input_ids.shape[1] + max_new_tokens),
            input_ids,
            max_new_tokens,
            temperature=temperature,
            seed=seed,
            eos_token_id=self.info.get("eos_token_id"),
            max_positions=self.info.get("max_positions"),
        )


def export_program(
    program: Program,
    directory: str | Path,
    backend: Backend,
    recipe: Mapping[str, Any],
    sqnr: Mapping[str, float] | None = None,
    source: Program | None = None,
    proofs: Mapping[str, AccumulatorEntry] | None = None,
) -> Artifact:
    """Lower `program`, run the result in its runtime, compare, and only then put it in place.

    Args:
        recipe: stored in the manifest, so that the artifact can be made again.
        sqnr: weight name → decibels, for the manifest.
        source: the program before quantization, for the size it is compared with.
        proofs: weight name → that its sums fit an accumulator, for the manifest.

    Raises:
        LoweringError: the target cannot take something; nothing is written.
        ArtifactError: the directory cannot be written, or the runtime disagrees with the Program.
    """
    directory = Path(directory).absolute()
    check_target(directory)
    backend.require()
    refuse(backend, backend.obstacles(program))
    with staged_directory(directory) as staged:
        lowered = backend.lower(program, staged)
        copy_tokenizer(program, staged)
        reference = _reference(program, staged)
        why = backend.cannot_run()
        agreement = None if why else _agreement(program, backend, staged, reference)
        figures = dict(sqnr or {}), dict(proofs or {})
        manifest = _manifest(program, backend, lowered, dict(recipe), figures, source or program, agreement, staged)
        manifest.write(staged)
    return Artifact(directory, manifest)


def verify(directory: str | Path) -> Artifact:
    """Check a directory: every file's hash, every weight's codes, and the logits in its runtime.

    Raises ArtifactError naming the first file or tensor that differs. Returns the artifact.
    """
    manifest = Manifest.read(directory)
    manifest.check_files(directory)
    if manifest.kind == "model":
        from qcompile.compiled import load

        load(directory).program.verify()
        return Artifact(Path(directory), manifest)
    artifact = Artifact.open(directory)
    for name, codes in artifact.backend.stored_codes(artifact.directory):
        entry = manifest.tensors.get(name)
        if entry is None or entry.codes_sha256 != tensor_hash(codes):
            raise ArtifactError(f"{directory}: the codes of {name!r} are not those that were computed; export it again")
    if manifest.agreement is not None:
        from safetensors.torch import load_file

        stored = load_file(Path(directory) / REFERENCE)
        error, _ = _compare(artifact.run_named({k: v for k, v in stored.items() if k in manifest.inputs}), stored)
        if not error <= manifest.agreement.tolerance:
            raise ArtifactError(
                f"{directory}: {manifest.agreement.runtime} gives outputs that differ by {error:.1e} of their maximum "
                f"from the Program's (tolerance {manifest.agreement.tolerance:.0e}); export it again with the runtime "
                "that is installed"
            )
    return artifact


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes in row-major order, hexadecimal."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def _reference(program: Program, directory: Path) -> dict[str, Tensor]:
    """Random prompts (seeded) and the Program's outputs on them, stored beside the model."""
    from safetensors.torch import save_file

    if "input_ids" in {n.name for n in program.inputs}:
        vocabulary = int(program.info.get("vocab_size") or 2)
        length = max(2, min(_PROMPT_LENGTH, _MAX_REFERENCE // (4 * _PROMPTS * vocabulary)))
        random = torch.Generator().manual_seed(0)
        feeds = {"input_ids": torch.randint(0, vocabulary, (_PROMPTS, length), generator=random)}
        outputs = {"logits": program(feeds["input_ids"])}
    else:
        feeds = {n: torch.randn([d or 2 for d in k.sizes]).to(k.dtype) for n, k in signature(program).items()}
        outputs = {f"{n}": t for n, t in program.run(feeds).items()}
    stored = {**feeds, **{k: v.contiguous() for k, v in outputs.items()}}
    save_file(stored, directory / REFERENCE)
    return stored


def _agreement(program: Program, backend: Backend, directory: Path, reference: dict[str, Tensor]) -> Agreement:
    kinds = signature(program)
    feeds = fill_inputs(kinds, {k: v for k, v in reference.items() if k in kinds})
    error, top1 = _compare(backend.load(directory).run(feeds), reference)
    tolerance = ACTIVATION_TOLERANCE if _quantizes_activations(program) else WEIGHT_ONLY_TOLERANCE
    if not error <= tolerance:
        where = backend.first_difference(program, directory, feeds, tolerance)
        raise ArtifactError(
            f"{backend.runtime} disagrees with the Program: outputs differ by {error:.1e} of their maximum (tolerance "
            f"{tolerance:.0e}); the first tensor that differs is {where}; nothing was written"
        )
    shape = list(next(iter(reference.values())).shape)
    return Agreement(runtime=backend.runtime, max_relative_error=error, top1=top1, tolerance=tolerance, prompts=shape)


def _compare(now: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> tuple[float, float]:
    """max |Δ| / max |reference| over the outputs that both have, and the share of equal arg-maxima."""
    worst, equal, count = 0.0, 0, 0
    for name, new in now.items():
        old = reference.get(name)
        if old is None or not old.is_floating_point():
            continue
        moved = (new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-300)
        worst = max(worst, float(torch.nan_to_num(moved, nan=float("inf"))))
        equal += int((new.argmax(-1) == old.argmax(-1)).sum())
        count += old[..., 0].numel()
    return worst, equal / max(1, count)


def _quantizes_activations(program: Program) -> bool:
    return bool(program.calls(torch.ops.qcompile.quantize.default))


def _manifest(
    program: Program,
    backend: Backend,
    lowered: LoweredFiles,
    recipe: dict[str, Any],
    figures: tuple[dict[str, float], dict[str, AccumulatorEntry]],
    source: Program,
    agreement: Agreement | None,
    directory: Path,
) -> Manifest:
    import dataclasses

    specs, (sqnr, proofs) = quantized_weights(program), figures
    tensors = {
        t.name: TensorEntry(
            container=t.container,
            elements=t.elements,
            bytes=t.bytes,
            bits_per_element=round(t.bits_per_element, 4),
            spec=specs.get(t.name),
            sqnr_db=sqnr.get(t.name),
            codes_sha256=tensor_hash(program.weights[f"{t.name}.codes"]) if t.name in specs else None,
            accumulator=proofs.get(t.name),
        )
        for t in lowered.tensors
    }
    files = describe_files(directory)
    options = {f.name: getattr(backend, f.name) for f in dataclasses.fields(backend)}
    return Manifest(
        qcompile=qcompile.__version__,
        kind="artifact",
        target=backend.name,
        target_options=options,
        main=lowered.main,
        model=program.info,
        recipe=recipe,
        versions={**library_versions(), **lowered.versions},
        inputs=input_entries(program),
        outputs=list(program.output_names),
        tensors=tensors,
        bits_per_weight=mean_bits(tensors.values()),
        quantized_bits_per_weight=mean_bits([t for t in tensors.values() if t.spec]),
        bytes=sum(f.bytes for n, f in files.items() if n != REFERENCE),
        float32_bytes=float32_bytes(source),
        agreement=agreement,
        notes=list(lowered.notes),
        build=dict(lowered.build),
        files=files,
    )


def mean_bits(tensors: Iterable[TensorEntry]) -> float:
    """Bits per element over all of `tensors`, scales and zero-points included."""
    tensors = list(tensors)
    elements = sum(t.elements for t in tensors)
    return round(8 * sum(t.bytes for t in tensors) / elements, 4) if elements else 0.0


def quantized_weights(program: Program) -> dict[str, str]:
    """Name of each weight that is stored as codes → its spec."""
    found = {}
    for node in program.calls(torch.ops.qcompile.dequantize.default):
        codes = program.arg(node, "codes")
        if program.is_weight(codes):
            found[program.key(codes).removesuffix(".codes")] = str(program.arg(node, "spec"))
    return found


def float32_bytes(program: Program) -> int:
    """Bytes of the program's weights if each element took four."""
    return sum(4 * node.meta["val"].numel() for node in program.weight_nodes)


def input_entries(program: Program) -> dict[str, InputEntry]:
    """The inputs as a manifest has them."""
    return {n: InputEntry(dtype=SHORT[k.dtype], sizes=list(k.sizes)) for n, k in signature(program).items()}


def library_versions() -> dict[str, str]:
    """Versions that decide what an artifact looks like."""
    from importlib.metadata import version

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": version("transformers")}


def copy_tokenizer(program: Program, directory: Path) -> None:
    """Copy what a text interface needs from the directory that the program was captured from, where there is one."""
    source = program.info.get("tokenizer")
    for name in _TOKENIZER_FILES if source else ():
        if (path := Path(str(source)) / name).is_file():
            shutil.copyfile(path, directory / name)
