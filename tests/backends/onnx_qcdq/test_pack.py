"""Codes lie in the files bit for bit as ONNX says, and come back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from qcompile.backends.onnx_qcdq.gathers import pair
from qcompile.backends.onnx_qcdq.pack import container, lazy
from qcompile.errors import SpecError


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (2, False), (4, True), (4, False), (8, True)])
def test_onnx_reads_what_was_packed(bits: int, signed: bool, tmp_path: Path) -> None:
    kind = container(bits, signed, 25)
    codes = torch.arange(-128, 127, dtype=torch.int16).to(torch.int8).reshape(5, 51)
    low = -(1 << (bits - 1)) if signed else 0
    codes = ((codes.int() % (1 << bits)) + low).to(torch.int8 if signed else torch.uint8)
    value = ir.Value(
        name="w", shape=ir.Shape([5, 51]), type=ir.TensorType(kind), const_value=lazy("w", lambda: codes, kind, (5, 51))
    )
    graph = ir.Graph([], [], nodes=[], initializers=[value], opset_imports={"": 25}, name="g")
    ir.save(ir.Model(graph, ir_version=13), tmp_path / "m.onnx", external_data="m.data", size_threshold_bytes=0)
    (initializer,) = onnx.load(tmp_path / "m.onnx").graph.initializer
    assert initializer.data_type == kind.value
    read = numpy_helper.to_array(initializer).astype(np.int32)
    assert np.array_equal(read, codes.numpy().astype(np.int32))


def test_a_code_that_its_container_cannot_hold_is_not_written() -> None:
    tensor = lazy("w", lambda: torch.tensor([[7, 8]], dtype=torch.int8), ir.DataType.INT4, (1, 2))
    with pytest.raises(SpecError, match="the value 8 lies outside -8 to 7"):
        tensor.tobytes()


def test_container_is_the_smallest() -> None:
    assert container(3, True, 21).name == "INT4"
    assert container(2, False, 21).name == "UINT4"
    assert container(2, False, 25).name == "UINT2"
    assert container(5, True, 25).name == "INT8"


def test_pairs_hold_signed_codes_with_eight_added() -> None:
    assert pair(torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)).tolist() == [[0xF0, 0x78]]
    assert pair(torch.tensor([[1, 15]], dtype=torch.uint8)).tolist() == [[0xF1]]


def test_nothing_is_read_before_it_is_written() -> None:
    reads = []

    def read() -> torch.Tensor:
        reads.append(1)
        return torch.zeros(4, 4, dtype=torch.int8)

    tensor = lazy("w", read, ir.DataType.INT4, (4, 4))
    assert (tensor.nbytes, list(tensor.shape), reads) == (8, [4, 4], [])
    assert tensor.tobytes() == bytes(8)
    assert reads == [1]
