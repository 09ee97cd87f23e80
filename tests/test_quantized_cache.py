"""A cache of int8 codes, exported and run in onnxruntime: the Program's tokens, and fewer bytes from step to step."""

from __future__ import annotations

from pathlib import Path

import torch

import qcompile
from qcompile import zoo


def test_greedy_decoding_with_a_cache_of_codes_is_the_same_in_onnxruntime(tmp_path: Path) -> None:
    model = qcompile.compile(zoo.path("llama"), {"weights": "int4 group=32", "kv_cache": "int8 sym token dynamic"})
    artifact = model.export("onnx_qcdq", tmp_path / "out")
    kinds = {n: entry for n, entry in artifact.manifest.inputs.items() if n.startswith("past_key_values_0_key")}
    assert {name: entry.dtype for name, entry in kinds.items()} == {
        "past_key_values_0_key": "i8",
        "past_key_values_0_key_scale": "f32",
    }
    prompts = torch.tensor([[1, 40, 41, 200], [1, 7, 300, 12]])
    assert torch.equal(artifact.generate(prompts, 32), model.generate(prompts, 32))
    present = artifact.run_named({"input_ids": prompts})
    stored = sum(t.nbytes for name, t in present.items() if name.startswith("present_"))
    values = sum(t.numel() for name, t in present.items() if t.dtype == torch.int8)
    head_size = present["present_0_key"].shape[-1]
    assert stored == values + 4 * values // head_size  # a float32 cache has 4 * values
