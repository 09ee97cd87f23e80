"""Lowering: obstacles, then shards, each rewritten, written as MLIR and parameter files, and compiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from qcompile.backend_base import LoweredFiles, StoredTensor, refuse
from qcompile.backends.onnx_qcdq.rewriting import base_key
from qcompile.backends.torch_mlir import gpus, toolchain
from qcompile.backends.torch_mlir.brevitas import OFFSET, OPERATOR, to_brevitas
from qcompile.backends.torch_mlir.emit import Entry, Naming, emit_module, emit_torch
from qcompile.backends.torch_mlir.kernels import CONTAINER
from qcompile.backends.torch_mlir.obstacles import obstacles
from qcompile.backends.torch_mlir.params import write_parameters
from qcompile.backends.torch_mlir.plan import DECODE, MAIN, PREFILL, Codes, Module, Piece, Plan
from qcompile.backends.torch_mlir.prelower import Prelowered, prelower
from qcompile.backends.torch_mlir.shards import Shards, canonical, layer_ranges
from qcompile.backends.torch_mlir.tensor import share
from qcompile.backends.torch_mlir.values import TRANSPOSED
from qcompile.backends.torch_mlir.weights import DEVICE, SLICED, stored
from qcompile.ir.program import Program

if TYPE_CHECKING:
    from qcompile.backends.torch_mlir.backend import TorchMlirBackend

_PARTS = re.compile(r"\.(codes|scale|zero_point|scale_step|scale_offset|zero_step|zero_offset|global_scale|exponent)$")


@dataclass
class _State:
    """What is known while modules are written, one after another."""

    backend: TorchMlirBackend
    source: Program
    directory: Path
    modules: list[Module]
    codes: dict[str, Codes]
    sizes: dict[str, list[Any]]  # weight → container, elements, bytes
    attempts: list[toolchain.Attempt]
    texts: dict[str, Module]  # text without locations → the module that was compiled from it
    compiles: bool
    notes: list[str] = field(default_factory=list)
    built: list[gpus.Built] = field(default_factory=list)  # for other targets than the CPU
    products: int = 0
    integer: int = 0


def lower(backend: TorchMlirBackend, program: Program, directory: Path) -> LoweredFiles:
    """See `TorchMlirBackend.lower`."""
    refuse(backend, obstacles(program))
    shards = Shards.parse(backend.shards)
    reason = backend.cannot_run()
    cpu, features = (backend.cpu, ()) if reason else toolchain.cpu_target(backend.cpu)
    state = _State(backend, program, directory, [], {}, {}, [], {}, reason is None)
    for index, part in enumerate(layer_ranges(program, shards.layers)):
        prelowered = prelower(part, backend.packing)
        state.products += prelowered.products
        state.integer += prelowered.integer_products
        if backend.dialect == "brevitas":
            _interchange(state, prelowered)
        else:
            _module(state, prelowered, f"shard_{index}" if shards.layers > 1 else "model", shards)
    plan = Plan(modules=state.modules, codes=state.codes, cpu=cpu, cpu_features=list(features))
    plan.write(directory)
    tensors = tuple(StoredTensor(name, *entry) for name, entry in state.sizes.items())
    build = {
        "cpu": cpu,
        "devices": sum(m.devices for m in state.modules),
        "modules": len(state.modules),
        "compiled": len({m.vmfb for m in state.modules if m.vmfb}),
        "attempts": [attempt.entry() for attempt in state.attempts],
        "also": [built.entry() for built in state.built],
    }
    versions = toolchain.versions()
    return LoweredFiles(state.modules[0].mlir, tensors, tuple(_notes(state, reason)), versions, build)


def _notes(state: _State, reason: str | None) -> Iterator[str]:
    yield f"{state.products} products with quantized weights, {state.integer} of them on integers"
    yield from state.notes
    if reason is not None:
        yield f"MLIR and parameter files were written, not compiled and not run: {reason}"
    for attempt in state.attempts:
        if attempt.error is not None:
            yield f"compiled again with other flags (see build): {attempt.module}: {attempt.error}"
    yield from gpus.notes(state.built)


def entries_of(program: Program) -> list[Entry]:
    """Functions: one for any sizes, and one for a token of one sequence where the program has a cache."""
    named = {name: symbol for symbol, name in program.symbols.items()}
    if not {"batch", "sequence", "past"} <= set(named):
        return [Entry(MAIN)]
    return [Entry(PREFILL), Entry(DECODE, {named["batch"]: 1, named["sequence"]: 1})]


def _module(state: _State, prelowered: Prelowered, name: str, shards: Shards) -> None:
    """Write one module and its parameters; compile it unless one like it was."""
    program, directory, ranks = prelowered.program, state.directory, shards.ranks
    if ranks > 1:
        program, notes = share(program, ranks)
        state.notes += notes
    keys = canonical(program) if shards.layers > 1 else {n: program.key(n) for n in program.weight_nodes}
    files = (
        {f"rank{i}": f"rank_{i}.safetensors" for i in range(ranks)} if ranks > 1 else {"model": f"{name}.safetensors"}
    )
    scopes = list(files)

    def scope(node: fx.Node) -> str:
        return scopes[int(node.meta.get(DEVICE, 0))]

    for which, file in files.items():
        items = [stored(node, keys[node]) for node in program.weight_nodes if scope(node) == which]
        write_parameters(directory / file, program, items)
    _record(state, program, lambda node: files[scope(node)], keys)
    naming = Naming(
        scope=scope,
        key=lambda node: keys[node],
        symbol=lambda node: symbol_of(keys[node]),
        device=lambda node: node.meta.get(DEVICE, 0) if ranks > 1 else None,
    )
    entries = entries_of(program)
    bare = emit_module(program, entries, naming, "model", locations=False)
    same = state.texts.get(bare)
    if same is None:
        (directory / f"{name}.mlir").write_text(emit_module(program, entries, naming, "model"))
        vmfb = _compile(state, name, ranks) if state.compiles else None
        mlir = f"{name}.mlir"
    else:
        mlir, vmfb = same.mlir, same.vmfb
    module = Module(
        mlir=mlir,
        vmfb=vmfb,
        parameters=files,
        devices=ranks,
        inputs=[n.name for n in program.inputs],
        outputs=list(program.output_names),
        functions=[entry.name for entry in entries],
    )
    state.texts.setdefault(bare, module)
    state.modules.append(module)


def _interchange(state: _State, prelowered: Prelowered) -> None:
    """Write the program with `quant.matmul_rhs_group_quant`, and the operands of that."""
    program, count = to_brevitas(prelowered.program)
    state.notes.append(f"{count} products as {OPERATOR}")
    keys = {n: program.key(n) for n in program.weight_nodes}
    file = "model.safetensors"
    write_parameters(state.directory / file, program, [stored(n, keys[n]) for n in program.weight_nodes])
    _record(state, program, lambda node: file, keys)
    naming = Naming(scope=lambda node: "model", key=lambda node: keys[node], symbol=lambda node: node.name)
    (state.directory / "model.mlir").write_text(emit_torch(program, Entry(MAIN), naming, "model"))
    inputs, outputs = [n.name for n in program.inputs], list(program.output_names)
    module = Module(
        mlir="model.mlir",
        vmfb=None,
        parameters={"model": file},
        devices=1,
        inputs=inputs,
        outputs=outputs,
        functions=[MAIN],
        weights=[keys[n] for n in program.weight_nodes],
    )
    state.modules.append(module)


def symbol_of(key: str) -> str:
    """The name of a weight's global: its key, with what MLIR takes in no plain name replaced."""
    return re.sub(r"[^A-Za-z0-9_$.]", "_", key if key[0].isalpha() else f"_{key}")


def _compile(state: _State, name: str, devices: int) -> str:
    backend, directory = state.backend, state.directory
    flags = [*toolchain.cpu_flags(backend.cpu, devices), *backend.flags]
    out = f"{name}.vmfb"
    state.attempts += toolchain.compile_module(
        directory / f"{name}.mlir", directory / out, flags, backend.opt_level, backend.data_tiling
    )
    toolchain.write_bytecode(directory / f"{name}.mlir", directory / f"{name}.mlirbc")
    others = gpus.parse_gpus(backend.also)
    state.built += gpus.build(others, directory / f"{name}.mlir", devices, backend.opt_level, backend.flags)
    return out


def _record(state: _State, program: Program, file: Callable[[fx.Node], str], keys: dict[fx.Node, str]) -> None:
    """Note how each weight lies in the files, and what it costs."""
    for node in program.weight_nodes:
        key = base_key(program.key(node))
        if key not in state.source.weights:
            continue  # a table that formats share
        item = stored(node, keys[node])
        weight = _PARTS.sub("", key) if f"{_PARTS.sub('', key)}.codes" in state.source.weights else key
        entry = state.sizes.setdefault(weight, ["", 0, 0])
        entry[2] += item.nbytes
        if OFFSET in node.meta:
            bits, signed = node.meta[OFFSET]
            entry[:2] = [f"uint{bits}", _elements(state, key)]
            turned = TRANSPOSED in program.key(node)
            shape = list(state.source.weights.meta(key)[0])
            shape = shape[::-1] if turned else shape
            piece = Piece(file=file(node), key=item.key)
            state.codes[weight] = Codes(
                bits=bits, signed=signed, shape=shape, transposed=turned, offset=True, pieces=[piece]
            )
        elif CONTAINER in node.meta:
            entry[:2] = [_container(node), _elements(state, key)]
            _note_codes(state, weight, node, Piece(file=file(node), key=item.key), program.key(node))
        elif weight == key:
            entry[:2] = [str(item.dtype).removeprefix("torch."), _elements(state, key)]


def _container(node: fx.Node) -> str:
    sign = "" if node.meta["val"].dtype == torch.int8 else "u"
    return f"{sign}int{node.meta[CONTAINER][0]}"


def _elements(state: _State, key: str) -> int:
    return int(torch.Size(state.source.weights.meta(key)[0]).numel())


def _note_codes(state: _State, weight: str, node: fx.Node, piece: Piece, key: str) -> None:
    """Add where codes, or a rank's part of them, lie."""
    turned = f"{TRANSPOSED}@" in f"{key}@"
    if SLICED in node.meta:
        axis, runs = node.meta[SLICED]
        piece = piece.model_copy(update={"axis": axis, "runs": list(runs)})
    elif "@" in key.replace(TRANSPOSED, ""):
        return  # another rank's copy of the whole
    shape = list(state.source.weights.meta(f"{weight}.codes")[0])
    bits = node.meta[CONTAINER][0]
    known = state.codes.get(weight)
    if known is not None and (known.pieces[0].axis is None or known.transposed != turned):
        return  # read in two ways, and noted in one
    state.codes[weight] = Codes(
        bits=bits,
        signed=node.meta["val"].dtype == torch.int8,
        shape=shape[::-1] if turned else shape,
        transposed=turned,
        pieces=[*(known.pieces if known else []), piece],
    )
