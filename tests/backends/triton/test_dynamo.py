"""torch.compile with the recipe's passes and the target's operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile.dynamo import qcompile_backend
from qcompile.errors import QCompileError
from qcompile.numerics import QuantSpec


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))) + x.shape[0]


def expected(net: Net, x: Tensor, spec: str) -> Tensor:
    up, down = (QuantSpec.parse(spec).quantize(layer.weight.detach()).dequantize() for layer in (net.up, net.down))
    return torch.relu(nn.functional.linear(x, up, net.up.bias)) @ down.t() + x.shape[0]


def test_a_module_is_compiled_by_a_recipe() -> None:
    torch._dynamo.reset()
    net = Net().eval()
    options = {"recipe": {"weights": "int4 group=64"}, "overrides": ["weights.group=32"]}
    compiled = torch.compile(net, backend=qcompile_backend, options=options)
    for rows in (3, 5, 9):  # the second and third are one graph whose size varies
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x).detach(), expected(net, x, "int4 group=32").detach())


def test_the_backend_has_a_name() -> None:
    from importlib.metadata import entry_points

    named = {entry.name: entry.value for entry in entry_points(group="torch_dynamo_backends")}
    if "qcompile" not in named:
        pytest.skip("qcompile is not installed (it is imported from its folder)")
    assert named["qcompile"] == "qcompile.dynamo:qcompile_backend"


def test_an_option_that_does_not_exist() -> None:
    graph = torch.fx.symbolic_trace(Net())
    with pytest.raises(QCompileError, match="backend qcompile has no option 'receipt'; use recipe or overrides"):
        qcompile_backend(graph, [torch.randn(2, 64)], {"receipt": "int4-g128"})
