"""What a run of the engine is expected to take: operations and bytes counted by hand, free memory, refusal."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from calibration.tiny import HIDDEN, SPILLED, TOGETHER, VOCABULARY, WIDTH, decoder, tokens

import qcompile
from qcompile.calibration import engine as engine_module
from qcompile.calibration.costs import Sizes, flops, slice_cost
from qcompile.calibration.engine import Engine
from qcompile.calibration.estimate import Estimate, estimate
from qcompile.calibration.machine import Speed, free_memory, peak_memory, resident, speed
from qcompile.calibration.processes import Processes
from qcompile.calibration.settings import Settings
from qcompile.calibration.slices import Slice
from qcompile.calibration.worker import SegmentPass, Setup
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.pass_base import parse_pipeline
from qcompile.passes.quantize.plain import without_rounding

PACE = Speed(flops=1e9, bytes=1e9)
MARK = "insert-qdq(weights=int8 sym channel)"
SAMPLES, LENGTH = 8, 6


def engine_of(passes: str, settings: Settings | None = None, program: Program | None = None) -> Engine:
    program = program or decoder(2, "f32")
    qcompile.run_passes(program, MARK)
    setup = Setup(program, without_rounding(program), settings or Settings())
    made = [p for p in parse_pipeline(passes) if isinstance(p, SegmentPass)]
    data = [{"input_ids": ids} for ids in tokens(SAMPLES, LENGTH, 3)]
    return Engine(setup, [p.begin(setup) for p in made], data, Processes())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("aten.linear.default(x, w)", 2 * 2 * 3 * 4 * 5),
        ("aten.matmul.default(x, t)", 2 * 2 * 3 * 4 * 5),
        ("aten.addmm.default(b, f, t)", 2 * 6 * 4 * 5),
        ("aten.scaled_dot_product_attention.default(x, x, x)", 2 * 2 * 3 * 3 * (4 + 4)),
        ("aten.einsum.default('bsd,od->bso', [x, w])", 2 * 2 * 3 * 4 * 5),
        ("aten.conv1d.default(x, c)", 2 * (2 * 7 * 3) * (3 * 2)),
        ("aten.gelu.default(x)", 0),
    ],
)
def test_operations_by_hand(body: str, expected: int) -> None:
    program = Program.parse(
        "def main(x: f32[batch, 3, 4], f: f32[tokens, 4], *, w: f32[5, 4], b: f32[5], c: f32[7, 3, 2]):\n"
        "    t = aten.t.default(w)\n"
        f"    y = {body}\n"
        "    return {'y': y, 't': t}"
    )
    node = next(n for n in program.nodes if n.name == "y")
    assert flops(node, Sizes(program, {"x": (2, 3, 4), "f": (6, 4)})) == expected


def test_bytes_alive_by_hand() -> None:
    """Views cost nothing and keep alive what they are views of; weights are counted once."""
    program = Program.parse(
        "def main(x: f32[batch, 4], *, w: f32[8, 4]):\n"
        "    a = aten.linear.default(x, w)\n"  # 3 × 8 floats
        "    v = aten.view.default(a, [-1])\n"
        "    r = aten.relu.default(v)\n"  # 3 × 8 beside them
        "    s = aten.sum.default(r)\n"  # one float, when a is gone
        "    return {'s': s}"
    )
    sizes = Sizes(program, {"x": (3, 4)})
    cost = slice_cost(Slice(program, [], ["s"]), sizes)
    assert cost.weights == 8 * 4 * 4
    assert cost.peak == 2 * 3 * 8 * 4
    assert cost.outputs == 4
    assert cost.flops == 2 * 3 * 8 * 4


def test_sizes_are_solved_for() -> None:
    """The size of what is there already is in no input alone: total = past + sequence."""
    program = Program.parse(
        "def main(ids: i64[batch, sequence], k: f32[batch, past, 4], mask: i64[batch, past + sequence]):\n"
        "    return {'mask': mask}"
    )
    sizes = Sizes(program, {"ids": (2, 3), "mask": (2, 5), "k": (2, 2, 4)})
    assert sizes.shape(program.inputs[2].meta["val"]) == (2, 5)
    fewer = Sizes(program, {"ids": (2, 3), "mask": (2, 5)})
    assert fewer.shape(program.inputs[1].meta["val"]) == (2, 2, 4)


def test_the_parts_of_a_run() -> None:
    """Values of all batches; the sums of what one weight reads; of weights those of a stage."""
    found = estimate(engine_of("gptq"), PACE, 1 << 40)
    rows = SAMPLES * LENGTH
    assert found.bytes["values"] == 4 * rows * (HIDDEN + WIDTH)  # what `down` reads, and the residual stream
    assert found.bytes["hessians"] == 8 * HIDDEN**2
    assert found.bytes["weights"] <= 4 * (VOCABULARY * WIDTH + 4 * WIDTH**2 + 2 * WIDTH)
    assert found.peak >= found.bytes["process"] + found.bytes["values"]
    assert len(found.stages) == len(engine_of("gptq").chain.stages)
    assert math.isclose(sum(found.stages), found.total)
    crossed = estimate(engine_of("gptq(target=float)"), PACE, 1 << 40)
    assert crossed.bytes["hessians"] == 2 * found.bytes["hessians"]
    assert crossed.bytes["values"] == 2 * found.bytes["values"]
    assert crossed.seconds["forward"] > 1.5 * found.seconds["forward"]
    together = estimate(engine_of("gptq", TOGETHER), PACE, 1 << 40)
    assert together.bytes["hessians"] > found.bytes["hessians"]


def test_forward_operations_are_those_of_the_program() -> None:
    """With traffic for nothing: every product but the last that is rounded, and the head, once for each token."""
    engine = engine_of("gptq")
    found = estimate(engine, Speed(1.0, math.inf), 1 << 40)
    rows = SAMPLES * LENGTH
    products = 2 * rows * (2 * 4 * WIDTH**2 + (3 + 2) * WIDTH * HIDDEN)
    attention = 2 * 2 * SAMPLES * LENGTH * LENGTH * 2 * WIDTH
    assert found.seconds["forward"] == products + attention


def test_values_that_go_through_files() -> None:
    found = estimate(engine_of("gptq", SPILLED), PACE, 1 << 40)
    assert found.bytes["values"] == 0
    assert found.spilled == 4 * SAMPLES * LENGTH * (HIDDEN + WIDTH)


def test_what_does_not_fit_is_refused_before_anything_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.calibration.estimate.free_memory", lambda device: 1000)
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("it was run"))
    program = decoder(2, "f32")
    qcompile.run_passes(program, MARK)
    with pytest.raises(QCompileError, match=r"calibration needs about .* GB .*calibration\.memory=") as error:
        qcompile.run_passes(program, "gptq", tokens())
    assert "\n" not in str(error.value)
    assert engine_module.estimate is estimate


def test_the_way_out_fits_the_settings() -> None:
    found = Estimate({"process": 5, "values": 0}, 50, "solving x", 0, {"solve": 1.0}, (1.0,), free=45)
    found.check()
    tight = replace(found, free=44)
    with pytest.raises(QCompileError, match=r"solving x.*calibration\.batch"):
        tight.check()
    with pytest.raises(QCompileError, match=r"true_sequential=true"):
        tight.check(sequential=False)


def test_the_report_has_the_estimate_beside_what_was_measured() -> None:
    program = decoder(1, "f32")
    qcompile.run_passes(program, MARK)
    (report,) = qcompile.run_passes(program, "gptq", tokens())
    figures = report.measured["calibration"]
    assert figures["estimated_seconds"] > 0
    assert figures["estimated_peak_bytes"] > 1e7
    assert 0.3 < figures["estimated_peak_bytes"] / figures["peak_bytes"] < 1.5


def test_plain_data() -> None:
    found = estimate(engine_of("gptq"), PACE, 1 << 40)
    data = found.to_dict()
    assert data["peak_bytes"] == found.peak
    assert data["total_seconds"] == sum(data["seconds"].values())
    assert found.table().row_count == len(found.bytes)


def test_a_run_without_anything_to_do() -> None:
    program = decoder(1, "f32")
    setup = Setup(program, without_rounding(program), Settings())
    (made,) = (p for p in parse_pipeline("gptq") if isinstance(p, SegmentPass))
    found = estimate(Engine(setup, [made.begin(setup)], [{"input_ids": tokens()[0]}], Processes()), PACE, 0)
    found.check()
    assert found.total == 0
    assert found.stages == ()


def test_free_memory_is_that_of_the_narrowest_group(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    inner = groups / "outer" / "inner"
    inner.mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  99 kB\nMemAvailable:     64 kB\n")
    assert free_memory(proc=proc, groups=groups) == 64 << 10
    (proc / "self" / "cgroup").write_text("4:memory:/old\n0::/outer/inner\n")
    assert free_memory(proc=proc, groups=groups) == 64 << 10
    for folder, limit, used in ((inner, "max", 0), (inner.parent, "50000", 30000)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 10000\n")
    assert free_memory(proc=proc, groups=groups) == 50000 - (30000 - 10000)
    assert free_memory() > 1 << 20


def test_this_machine_is_measured_in_reasonable_figures() -> None:
    pace = speed(torch.get_num_threads())
    assert 1e8 < pace.flops < 1e15
    assert 1e7 < pace.bytes < 1e14
    assert speed(torch.get_num_threads()) is pace
    assert 0 <= resident() <= 1.05 * peak_memory()
