"""A bundle that is loaded: runs its graph, quantized operators on one of three executors, everything else in torch.

cpu       the operators' references in plain torch
jit       their kernels, compiled by Triton on this machine from the bundle's sources
binary    the binaries of the bundle, through the GPU's driver
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx

import qcompile.backends.triton.ops  # noqa: F401  registers the operators that the graph names
from qcompile.backends.triton.bundle import Bundle, read_graph
from qcompile.backends.triton.driver import CUDA, HIP, Driver
from qcompile.backends.triton.launch import JustInTime, dispatching
from qcompile.backends.triton.launcher import BundleDispatcher, best_target, load_sources
from qcompile.backends.triton.ops.weight_only import holding
from qcompile.errors import ArtifactError, QCompileError
from qcompile.generate import CACHED_BELOW, generate
from qcompile.ir.program import Program
from qcompile.ir.run import fill_inputs, run, signature
from qcompile.ir.weights import MemorySource, ShardSource, WeightStore

if TYPE_CHECKING:
    from qcompile.backends.triton.session import Session

Executor: TypeAlias = Literal["auto", "cpu", "jit", "binary"]


class TritonRunner:
    """A bundle in memory.

    Args:
        directory: the artifact.
        executor: `auto` takes the bundle's binaries on a GPU that they are for, else compiles just in time on a GPU,
            else runs on the CPU.

    Raises:
        ArtifactError: the bundle is missing, damaged or newer than this qcompile; it does not fit the GPU; it has no
            binaries for the GPU, and they are asked for or Triton is not installed.
        QCompileError: a GPU is asked for and there is none.
    """

    def __init__(self, directory: str | Path, executor: Executor = "auto") -> None:
        if executor not in get_args(Executor):
            raise QCompileError(f"executor {executor!r} is unknown; use {', '.join(get_args(Executor))}")
        self.directory = Path(directory)
        self.bundle = Bundle.read(self.directory)
        text = read_graph(self.directory)
        gpu = torch.cuda.is_available()
        if executor in ("jit", "binary") and not gpu:
            raise QCompileError(f"executor={executor} needs a GPU and torch finds none; use executor=cpu")
        self.device = torch.device("cuda" if gpu and executor != "cpu" else "cpu")
        self.dispatcher = None if self.device.type == "cpu" else gpu_dispatcher(self.directory, self.bundle, executor)
        self.program = Program.parse(text, weight_store(self.directory, self.bundle, self.device))
        _move_devices(self.program, self.device)
        small = sum(self.program.weights.nbytes(key) for key in self.program.weights) <= CACHED_BELOW // 8
        self._held: dict[object, Tensor] | None = {} if small else None  # values of weights, on a CPU
        self.inputs = signature(self.program)
        self.outputs = list(self.program.output_names)

    @property
    def executor(self) -> str:
        """What runs the quantized operators."""
        if self.dispatcher is None:
            return "cpu"
        return "jit" if self.dispatcher.gpu is None else f"binary ({self.dispatcher.gpu})"

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, where the inputs were; inputs by name.

        Raises QCompileError for an input that is missing, unknown or of another rank or dtype than declared, and
        ArtifactError where the GPU's memory is too small.
        """
        there = {name: tensor.to(self.device) for name, tensor in feeds.items()}
        home = next((tensor.device for tensor in feeds.values()), self.device)
        return {name: tensor.to(home) for name, tensor in self.run_there(there).items()}

    def run_there(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `run`, with inputs and outputs on `device`."""
        try:
            with holding(self._held) if self.dispatcher is None else dispatching(self.dispatcher):
                return run(self.program, feeds)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition(". GPU")[0]
            raise ArtifactError(f"the GPU is out of memory: {reason}; shorten the prompt or the batch") from None

    def __call__(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step of generation: what is not given is filled in, what the model does not take is left out."""
        taken = {name: tensor for name, tensor in feeds.items() if name in self.inputs}
        return self.run(fill_inputs(self.inputs, taken))

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits ``[batch, sequence, vocabulary]`` for token ids int64 ``[batch, sequence]``."""
        return self({"input_ids": input_ids})["logits"]

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 32, eos_token_id: int | Sequence[int] | None = None
    ) -> Tensor:
        """Continue prompts int64 ``[batch, prompt]`` greedily with the cache; int64 ``[batch, prompt + new]``.

        Each step is a CUDA graph on a GPU (see `session`).
        """
        step = self.stepper(input_ids.shape[1] + max_new_tokens)
        return generate(step, input_ids, max_new_tokens, eos_token_id=eos_token_id)

    def stepper(self, room: int) -> Session:
        """Steps of one generation of at most `room` tokens."""
        from qcompile.backends.triton.session import Session

        return Session(self, room)


def gpu_dispatcher(directory: Path, bundle: Bundle, executor: Executor = "auto") -> BundleDispatcher:
    """The dispatcher for the GPU at hand. Raises ArtifactError where nothing can run its kernels."""
    name = gpu_name()
    target = None if executor == "jit" else best_target(bundle.gpus, name)
    if executor == "binary" and target is None:
        has = ", ".join(bundle.gpus) or "none"
        raise ArtifactError(f"the bundle has binaries for {has}, this GPU is {name}; export with --gpu {name}")
    fallback = None
    if importlib.util.find_spec("triton") is not None:
        fallback = JustInTime(load_sources(directory, bundle))
    elif target is None:
        raise ArtifactError(
            f"the bundle has no binaries for {name} and triton is not installed to compile its kernels; export with "
            f"--gpu {name}, or: pip install triton"
        )
    driver = None if target is None else Driver(HIP if torch.version.hip else CUDA)
    return BundleDispatcher(directory, bundle, target, driver, _stream, fallback)


def gpu_name() -> str:
    """The current GPU as targets are called: ``sm_90``, ``gfx942``."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


def weight_store(directory: Path, bundle: Bundle, device: torch.device) -> WeightStore:
    """The tensors of the graph: on a GPU all of them; on a CPU those of a model that is small, else read when touched.

    Raises ArtifactError for a shard that is missing or damaged, and where they do not fit the GPU.
    """
    from safetensors import SafetensorError, safe_open

    files = {directory / file: keys for file, keys in bundle.shards.items()}
    for path in files:
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; export the artifact again")
    size = sum(path.stat().st_size for path in files)
    if device.type == "cuda":
        check_memory(size, torch.cuda.mem_get_info()[0])
    store = WeightStore()
    for path, keys in files.items():
        try:
            with safe_open(path, framework="pt", device=str(device)) as shard:
                for key in keys:
                    tensor = shard.get_tensor(key)
                    held = device.type == "cuda" or size <= CACHED_BELOW
                    source = ShardSource(path, key, tuple(tensor.shape), tensor.dtype)
                    store.bind(key, MemorySource(tensor) if held else source)
        except SafetensorError as error:
            raise ArtifactError(f"{path} cannot be read ({error}); export the artifact again") from None
    return store


def check_memory(needed: int, free: int) -> None:
    """Raise ArtifactError where weights of `needed` bytes do not fit `free` bytes of a GPU's memory."""
    if needed > free:
        raise ArtifactError(
            f"the weights need {needed / 1e9:.2f} GB of GPU memory and {free / 1e9:.2f} GB are free; free some, use a "
            "GPU with more, or executor=cpu"
        )


def _move_devices(program: Program, device: torch.device) -> None:
    """Let calls that make tensors make them on `device`."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in program.nodes:
        node.args = fx.node.map_aggregate(node.args, moved)
        node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
