"""Convolutions as products of an activation and a weight: axes, groups, and what they do to the result."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qcompile.ir.contractions import find_contractions, find_obstacles, roles
from qcompile.ir.exported import from_exported
from qcompile.ir.program import Program

CONVOLUTIONS: dict[str, tuple[torch.nn.Module, tuple[int, ...], tuple[Any, ...]]] = {
    # module, shape of its input, (op, axis_in, axis_out, input axis, output axis, kernel, groups)
    "conv1d": (torch.nn.Conv1d(4, 6, 3, padding=1), (2, 4, 8), ("conv1d", 1, 0, 1, 1, (2,), 1)),
    "named padding": (torch.nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 8), ("conv1d", 1, 0, 1, 1, (2,), 1)),
    "unbatched": (torch.nn.Conv1d(4, 6, 3), (4, 8), ("conv1d", 1, 0, 0, 0, (2,), 1)),
    "depthwise": (torch.nn.Conv1d(6, 6, 3, groups=6), (2, 6, 8), ("conv1d", 1, 0, 1, 1, (2,), 6)),
    "conv2d": (torch.nn.Conv2d(4, 6, (3, 2), stride=2), (2, 4, 8, 8), ("conv2d", 1, 0, 1, 1, (2, 3), 1)),
    "grouped": (torch.nn.Conv2d(4, 6, 1, groups=2), (2, 4, 8, 8), ("conv2d", 1, 0, 1, 1, (2, 3), 2)),
    "conv3d": (torch.nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3), ("conv3d", 1, 0, 1, 1, (2, 3, 4), 1)),
    "transposed": (
        torch.nn.ConvTranspose1d(4, 6, 2, stride=2),
        (2, 4, 8),
        ("conv_transpose1d", 0, 1, 1, 1, (2,), 1),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    module, shape, expected = CONVOLUTIONS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    p = exported(module, x)
    (c,) = find_contractions(p)
    assert (c.op, c.axis_in, c.axis_out, c.input_axis, c.output_axis, c.kernel, c.groups) == expected
    assert roles(p) == {c.node: "convolution"}
    assert find_obstacles(p) == []
    (y,), bias = p.run({"x": x}).values(), module.bias
    p.weights["weight"] = zeroed(p.weights["weight"], c.axis_out, 3)
    (without,) = p.run({"x": x}).values()
    assert isinstance(bias, torch.Tensor)
    assert torch.allclose(without.select(c.output_axis, 3), bias[3].expand(y.select(c.output_axis, 3).shape))
    rest = [i for i in range(6) if i != 3]
    assert torch.allclose(
        without.index_select(c.output_axis, torch.tensor(rest)), y.index_select(c.output_axis, torch.tensor(rest))
    )


def exported(module: torch.nn.Module, x: torch.Tensor) -> Program:
    with torch.no_grad():
        return from_exported(torch.export.export(Renamed(module.eval()), (x,), strict=False), strip="inner.")


class Renamed(torch.nn.Module):
    """A module whose input is called x."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)


def test_a_convolution_in_the_core_dialect() -> None:
    """What torch.export's decompositions leave of any of them."""
    p = Program.parse(
        "def main(x: f32[2, 4, 8], *, w: f32[6, 2, 3], t: f32[6, 5, 2]):\n"
        "    y = aten.convolution.default(x, w, None, [1], [0], [1], False, [0], 2)\n"
        "    z = aten.convolution.default(y, t, None, [2], [0], [1], True, [0], 1)\n    return {'z': z}"
    )
    found = [(c.axis_in, c.axis_out, c.kernel, c.groups) for c in find_contractions(p)]
    assert found == [(1, 0, (2,), 2), (0, 1, (2,), 1)]


def zeroed(tensor: torch.Tensor, axis: int, place: int) -> torch.Tensor:
    changed = tensor.clone()
    changed.select(axis, place).zero_()
    return changed


VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
WAV2VEC2 = {
    **VIT,
    "conv_dim": (16, 16),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}


@pytest.mark.parametrize(
    ("kind", "config", "shape", "convolutions", "obstacles"),
    [
        ("vit", {**VIT, "image_size": 16, "patch_size": 8}, (2, 3, 16, 16), [("conv2d", (32, 3, 8, 8), 1)], []),
        (
            "wav2vec2",
            WAV2VEC2,
            (2, 400),
            [("conv1d", (16, 1, 3), 1), ("conv1d", (16, 16, 3), 1)],
            ["its weight is computed (_weight_norm, _weight_norm) before it is multiplied"],
        ),
    ],
)
def test_real_architectures(
    kind: str, config: dict[str, Any], shape: tuple[int, ...], convolutions: list[Any], obstacles: list[str]
) -> None:
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(AutoConfig.for_model(kind, **config))
    p = exported(First(model), torch.randn(shape))
    table = roles(p)
    found = find_contractions(p)
    of_role = [(c.op, tuple(c.weight.meta["val"].shape), c.groups) for c in found if table[c.node] == "convolution"]
    assert of_role == convolutions
    assert [o.reason for o in find_obstacles(p)] == obstacles
    assert sum(c.op == "linear" for c in found) >= 6


def test_a_normed_weight_is_a_convolution_once_it_is_folded() -> None:
    from qcompile.pass_manager import PassManager
    from qcompile.passes.cleanup.fold_constants import FoldConstants

    normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(8, 8, 4, groups=2), dim=2)
    p = exported(normed, torch.randn(2, 8, 9))
    assert find_contractions(p) == []
    PassManager([FoldConstants()]).run(p)
    (c,) = find_contractions(p)
    assert (c.op, c.groups, tuple(c.weight.meta["val"].shape)) == ("conv1d", 2, (8, 4, 4))


class First(torch.nn.Module):
    """The first thing that a model of transformers returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x)[0]
