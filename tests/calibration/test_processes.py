"""Two processes under torchrun give what one gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from calibration import split, tiny

from qcompile.calibration.processes import Job, Processes

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this build of torch has no gloo"
)


def torchrun(*command: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    line = [sys.executable, *start, "--master-port", str(port), *command]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(line, capture_output=True, text=True, timeout=timeout, env=quiet)


def test_two_processes_give_the_codes_of_one(tmp_path: Path) -> None:
    done = torchrun(str(Path(split.__file__)), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found, told = torch.load(tmp_path / "found.pt")
    expected, here = split.rounded()
    assert tiny.same(found, expected)
    assert told == here
    assert here["dense"][0] == 48
    assert all(0 < here[where]["tokens_max"] < 180 for where in ("first", "second"))
    (folder,) = (tmp_path / "resume").iterdir()
    assert not list(folder.glob("boundary*"))


def test_the_command_line_writes_once(tmp_path: Path) -> None:
    """Two processes, one artifact, printed once."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("llama", num_hidden_layers=1, vocab_size=64, max_position_embeddings=64, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    options = ["--recipe", "gptq-int4", "--no-evaluate"]
    for setting in ("weights.group=32", "calibration.samples=3", "calibration.length=16", "calibration.batch=1"):
        options += ["--set", setting]
    done = torchrun("-m", "qcompile", "export", str(tmp_path / "model"), *options, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bits per weight") == 1
    assert done.stderr.count("capturing and compiling") == 1
    assert (tmp_path / "two" / "manifest.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "two"]


def test_batches_are_dealt_out_whole() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 2, 5, 20):
            dealt = [i for rank in range(size) for i in Processes(rank, size).mine(count)]
            assert dealt == list(range(count))
            shares = [len(Processes(rank, size).mine(count)) for rank in range(size)]
            assert max(shares) - min(shares) <= 1


def test_one_process_does_all_jobs_in_order() -> None:
    jobs = [Job(cost, lambda cost=cost: ({"c": torch.tensor(cost)}, {"cost": cost})) for cost in (1.0, 3.0, 2.0)]  # type: ignore[misc]
    assert [facts["cost"] for _, facts in Processes().deal(jobs)] == [1.0, 3.0, 2.0]
