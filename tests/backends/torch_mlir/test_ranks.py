"""Products dealt out over ranks: the same results in torch, whole heads and groups, and no weight whole twice."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from mlir_programs import error, llama, prompt, quantized
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

import qcompile
from qcompile.backends.torch_mlir import ops
from qcompile.backends.torch_mlir.kernels import CONTAINER
from qcompile.backends.torch_mlir.prelower import prelower
from qcompile.backends.torch_mlir.ranks import assign, deal
from qcompile.backends.torch_mlir.split import Split, viewed
from qcompile.backends.torch_mlir.tensor import share
from qcompile.backends.torch_mlir.weights import DEVICE, stored
from qcompile.ir.program import Program

SMALL = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shared(program: Program, ranks: int) -> tuple[Program, tuple[str, ...]]:
    found, notes = share(prelower(program, "packed").program, ranks)
    found.verify()
    ids = prompt()
    assert error(found(ids), program(ids)) < 5e-6
    return found, notes


def bytes_of(program: Program) -> list[int]:
    """Bytes of codes that each rank has."""
    found: Counter[int] = Counter()
    for node in program.weight_nodes:
        if CONTAINER in node.meta:
            found[node.meta.get(DEVICE, 0)] += stored(node, "").nbytes
    return [found[rank] for rank in sorted(found)]


@pytest.mark.parametrize(
    ("weights", "activations"),
    [(None, None), ("int4 asym group=16", None), ("int8 asym channel", "int8 asym token dynamic")],
)
def test_llama(weights: str | None, activations: str | None) -> None:
    program, notes = shared(quantized(llama(), weights, activations), 2)
    assert notes == ()
    assert program.calls(ops.TRANSFER)
    if weights is not None:
        first, second = bytes_of(program)
        assert first == second


def test_uneven() -> None:
    program, notes = shared(quantized(llama(heads=6, kv_heads=3, hidden=96, inner=80), "int4 sym group=16"), 2)
    assert notes == ()
    first, second = bytes_of(program)
    assert first < second < 2 * first + 1  # one head of three, and two of five groups
    program, notes = shared(quantized(llama(heads=6, kv_heads=3, hidden=96, inner=80), "int4 sym group=16"), 3)
    assert notes == ()


def test_groups_are_not_cut() -> None:
    program = prelower(quantized(llama(), "int4 sym group=32"), "packed").program
    found = assign(program, 2)
    ends = {program.module_of(n).rpartition(".")[2]: [r[0][1] for r in runs] for n, runs in found.sinks.items()}
    assert ends == {"o_proj": [32, 64], "down_proj": [32, 96]}  # of three groups, one and two


def test_fused_projections() -> None:
    size = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    phi = Phi3Config(hidden_size=64, intermediate_size=96, max_position_embeddings=64, **size, **SMALL)
    gpt = GPT2Config(n_embd=64, n_layer=1, n_head=4, n_positions=64, **{**SMALL, "pad_token_id": None})
    for config in (phi, gpt):
        torch.manual_seed(0)
        captured = qcompile.capture(AutoModelForCausalLM.from_config(config).eval())
        program, notes = shared(quantized(captured, "int4 sym group=16"), 2)
        assert notes == ()
        first, second = bytes_of(program)
        assert first == second


def test_units() -> None:
    assert deal([(0, 8)], 4, 2) == (((0, 4),), ((4, 8),))
    assert deal([(0, 9), (9, 12)], 3, 2) == (((0, 3), (9, 10)), ((3, 9), (10, 12)))
    heads = Split(2, (((0, 32),), ((32, 64),)))
    assert viewed(heads, [2, 5, 64], [2, 5, 4, 16]) == Split(2, (((0, 2),), ((2, 4),)))
    assert viewed(heads, [2, 5, 64], [2, 5, 1, 64]) == Split(3, heads.runs)
    assert viewed(Split(2, (((0, 24),), ((24, 64),))), [2, 5, 64], [2, 5, 4, 16]) is None
    grouped = Split(1, (((0, 1),), ((1, 2),)))
    assert viewed(grouped, [3, 2, 2, 5, 16], [3, 4, 5, 16]) == Split(1, (((0, 2),), ((2, 4),)))
