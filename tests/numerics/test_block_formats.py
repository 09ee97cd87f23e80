"""Block formats, bit for bit against references built on ml_dtypes: scales, codes, values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import block_formats as oracle
from torch import Tensor

from qcompile.numerics import QTensor, QuantSpec

COUNT = 10_000  # of each of the ten kinds of block
MX = {"mxfp8_e4m3": "e4m3", "mxfp8_e5m2": "e5m2", "mxfp6_e2m3": "e2m3", "mxfp6_e3m2": "e3m2", "mxfp4": "e2m1"}
MX_RULES = [
    *((name, rule) for name in (*MX, "mxint8") for rule in ("floor", "even", "ceil", "rceil", "mse")),
    ("mxfp4", "noclip"),
]


def blocks(size: int, *, finite: bool = False) -> np.ndarray:
    kinds = [kind for kind in oracle.KINDS if not (finite and kind == "nonfinite")]
    return np.concatenate([oracle.make_blocks(kind, 0, COUNT, size) for kind in kinds])


def scale_bits(q: QTensor) -> np.ndarray:
    return q.scale.view(torch.uint8).numpy()


def same_values(got: Tensor, want: np.ndarray, last_places: float = 0) -> None:
    """Equal, nan where nan; `last_places` of the least subnormal are forgiven."""
    assert torch.equal(torch.isnan(got), torch.isnan(torch.tensor(want)))
    assert torch.equal(torch.isinf(got), torch.isinf(torch.tensor(want)))
    difference = torch.nan_to_num(got, posinf=0, neginf=0) - torch.nan_to_num(torch.tensor(want), posinf=0, neginf=0)
    assert float(difference.abs().max()) <= last_places * 2.0**-149


@pytest.mark.parametrize(("name", "rule"), MX_RULES)
def test_mx_equals_the_oracle_on_every_block(name: str, rule: str) -> None:
    x = blocks(32)
    q = QuantSpec.parse(f"{name}({rule})").quantize(torch.tensor(x))
    want = oracle.mx(x, MX.get(name, "int8"), rule)
    assert (scale_bits(q)[:, 0] == want.scale).all()
    known = want.scale != 255
    assert (q.codes.numpy()[known] == want.codes[known]).all()
    # A step that is subnormal holds 4/3 of a power of two with few bits.
    same_values(q.dequantize(), want.values, last_places=4 if rule == "noclip" else 0)
    assert q.codes.shape == x.shape
    assert not q.codes[torch.tensor(~known)].any()  # where the scale is nan, codes are those of 0


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in oracle.KINDS if kind != "nonfinite"])
def test_nvfp4_equals_the_oracle(kind: str, search: bool) -> None:
    x = oracle.make_blocks(kind, 1, COUNT, 16)
    q = QuantSpec.parse("nvfp4(mse)" if search else "nvfp4").quantize(torch.tensor(x))
    want = oracle.nvfp4(x, search=search)
    assert q.parameters["global_scale"].item() == want.outer
    assert (scale_bits(q)[:, 0] == want.scale).all()
    assert (q.codes.numpy() == want.codes).all()
    same_values(q.dequantize(), want.values)


@pytest.mark.parametrize(("bits", "block"), [(8, 8), (8, 32), (6, 16), (4, 16), (2, 4)])
def test_block_floating_point_equals_the_oracle(bits: int, block: int) -> None:
    x = blocks(block)
    q = QuantSpec.parse(f"bfp(block={block} bits={bits})").quantize(torch.tensor(x))
    want = oracle.bfp(x, bits)
    assert (scale_bits(q)[:, 0] == want.scale).all()
    known = want.scale != 255
    assert (q.codes.numpy()[known] == want.codes[known]).all()
    same_values(q.dequantize(), want.values)


@pytest.mark.parametrize(("name", "bits", "block_bytes"), [("mx6", 5, 12), ("mx9", 8, 18)])
def test_micro_exponents_equal_the_oracle(name: str, bits: int, block_bytes: int) -> None:
    x = blocks(16, finite=True)
    q = QuantSpec.parse(name).quantize(torch.tensor(x))
    want = oracle.microexponent(x, bits)
    assert want.micro is not None
    assert (q.parameters["exponent"].numpy()[:, 0] == want.scale).all()
    assert (q.scale.numpy() == want.micro).all()
    assert (q.codes.numpy() == want.codes).all()
    same_values(q.dequantize(), want.values)
    assert q.bits_per_element * 16 == block_bytes * 8


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("nvfp4(mse)", 6.75e-3),
        ("nvfp4", 9.2e-3),
        ("mxfp4(mse)", 1.26e-2),
        ("mxfp4(even)", 1.28e-2),
        ("mxfp4", 1.35e-2),
        ("mxfp4(rceil)", 1.38e-2),
        ("mxfp4(ceil)", 2.1e-2),
    ],
)
def test_error_on_gaussian_blocks(text: str, most: float) -> None:
    size = 16 if text.startswith("nv") else 32
    x = oracle.make_blocks("gaussian", 2, 20_000, size)
    error = oracle.relative_error(x, QuantSpec.parse(text).quantize(torch.tensor(x)).dequantize().numpy())
    assert 0.9 * most < error <= most
