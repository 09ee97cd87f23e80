"""Fixtures every room uses."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings

import qcompile.ops  # noqa: F401  registers quantize and dequantize before any text names them
from qcompile.drift import drift
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr
from qcompile.pass_base import Pass, Report
from qcompile.pass_manager import PassManager

_PHASES = (Phase.explicit, Phase.generate, Phase.shrink)  # explaining a failure takes minutes
settings.register_profile("house", deadline=None, derandomize=True, max_examples=30, phases=_PHASES)
settings.load_profile("house")
torch.set_num_threads(1)

SIZES = {"batch": 2, "sequence": 5, "past": 3}


@pytest.fixture
def data_folder() -> Path:
    """Small trained models and texts, where the checkout has them beside it."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("QCOMPILE_TEST_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set QCOMPILE_TEST_DATA")
    return folder


@pytest.fixture
def feeds() -> Callable[..., dict[str, torch.Tensor]]:
    """Random inputs for a program; symbolic sizes are taken from SIZES, or 4."""
    return random_feeds


def random_feeds(program: Program, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for node in program.inputs:
        value = node.meta["val"]
        shape = []
        for size in map(dim_expr, value.shape):
            names = {} if isinstance(size, int) else {s: SIZES.get(program.symbols[s], 4) for s in size.free_symbols}
            shape.append(size if isinstance(size, int) else int(size.subs(names)))
        if value.dtype.is_floating_point:
            found[node.name] = torch.randn(shape, generator=generator, dtype=torch.float64).to(value.dtype)
        else:
            found[node.name] = torch.randint(0, 2, shape, generator=generator).to(value.dtype)
    return found


@pytest.fixture
def golden() -> Callable[[Pass, str, str], Report]:
    """Run one pass on the text before and compare with the text after; the function must stay what it was."""

    def check(pass_: Pass, before: str, after: str) -> Report:
        program = Program.parse(textwrap.dedent(before).strip())
        inputs = random_feeds(program)
        expected = program.run(inputs)
        (report,) = PassManager([pass_]).run(program)
        assert str(program) == textwrap.dedent(after).strip()
        assert str(Program.parse(str(program))) == str(program)
        wide = all(
            n.meta["val"].dtype not in (torch.bfloat16, torch.float16) for n in program.graph.nodes if _tensor(n)
        )
        assert drift(program.run(inputs), expected) <= (1e-6 if wide else 0.02)
        return report

    return check


def _tensor(node: Any) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


@pytest.fixture
def left_alone() -> Callable[[Pass, str], list[str]]:
    """Run one pass that must change nothing; the reasons it gives."""

    def check(pass_: Pass, text: str) -> list[str]:
        program = Program.parse(textwrap.dedent(text).strip())
        before = str(program)
        (report,) = PassManager([pass_]).run(program)
        assert str(program) == before
        assert report.rewritten == []
        return [entry.what for entry in report.skipped]

    return check


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., tuple[torch.nn.Module, Program]]:
    """A small random decoder of a transformers architecture without a cache, gains and biases perturbed, as a program
    ``input_ids[batch, sequence] → logits``. The program is a fresh copy; the module is shared."""
    made: dict[str, tuple[torch.nn.Module, Program]] = {}

    def make(name: str, layers: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
        key = f"{name} {layers} {dtype} {sorted(changes.items())}"
        if key not in made:
            made[key] = _decoder(name, layers, dtype, changes)
        module, program = made[key]
        return module, program.clone()

    return make


def _decoder(name: str, layers: int, dtype: torch.dtype, changes: dict[str, Any]) -> tuple[torch.nn.Module, Program]:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    extra = {"num_hidden_layers": layers, "vocab_size": 64, "pad_token_id": None}
    config = AutoConfig.for_model(name, **{**sizes, **extra, **changes})
    config._attn_implementation = "eager" if name == "gemma2" else "sdpa"
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    dynamic = torch.export.Dim.DYNAMIC
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        exported = torch.export.export(
            _Logits(module), (ids,), dynamic_shapes=({0: dynamic, 1: dynamic},), strict=False
        )
    from qcompile.ir.exported import from_exported

    return module, from_exported(exported, strip="model.", output_names=["logits"])


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits  # type: ignore[no-any-return]
