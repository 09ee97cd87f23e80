"""Finding every product of an activation and a weight, whatever the layout, and never by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qcompile.ir.contractions import find_contractions, find_embeddings, find_obstacles, roles
from qcompile.ir.exported import from_exported
from qcompile.ir.program import Program

# body, type of the weight, then (op, axis_in, axis_out, experts, length of the path, input axis, output axis)
FOUND: dict[str, tuple[str, str, tuple[Any, ...]]] = {
    "linear": ("y = aten.linear.default(x, w)", "f32[6, 4]", ("linear", 1, 0, None, 0, 2, 2)),
    "addmm": (
        "v = aten.view.default(x, [15, 4])\n    b = aten.sum.dim_IntList(w, [0])\n    y = aten.addmm.default(b, v, w)",
        "f32[4, 6]",
        ("addmm", 0, 1, None, 0, 1, 1),
    ),
    "mm after t": (
        "v = aten.view.default(x, [15, 4])\n    t = aten.t.default(w)\n    y = aten.mm.default(v, t)",
        "f32[6, 4]",
        ("mm", 1, 0, None, 1, 1, 1),
    ),
    "matmul numpy_T": (
        "t = aten.numpy_T.default(w)\n    y = aten.matmul.default(x, t)",
        "f32[6, 4]",
        ("matmul", 1, 0, None, 1, 2, 2),
    ),
    "matmul on the left": ("y = aten.matmul.default(w, x)", "f32[6, 5]", ("matmul", 1, 0, None, 0, 1, 1)),
    "cast": (
        "d = aten.to.dtype(x, torch.float64)\n    c = aten.to.dtype(w, torch.float64)\n"
        "    y = aten.linear.default(d, c)",
        "f32[6, 4]",
        ("linear", 1, 0, None, 1, 2, 2),
    ),
    "bmm [E, in, out]": ("y = aten.bmm.default(x, w)", "f32[3, 4, 6]", ("bmm", 1, 2, 0, 0, 2, 2)),
    "bmm of permuted [in, E, out]": (
        "p = aten.permute.default(w, [1, 0, 2])\n    y = aten.bmm.default(x, p)",
        "f32[4, 3, 6]",
        ("bmm", 0, 2, 1, 1, 2, 2),
    ),
    "baddbmm": (
        "b = aten.new_zeros.default(x, [1, 1, 1])\n    y = aten.baddbmm.default(b, x, w)",
        "f32[3, 4, 6]",
        ("baddbmm", 1, 2, 0, 0, 2, 2),
    ),
    "gathered experts, weight on the left": (
        "g = aten.index.Tensor(w, [i])\n    r = aten.reshape.default(x, [15, 4])\n"
        "    u = aten.unsqueeze.default(r, -1)\n    y = aten.bmm.default(g, u)",
        "f32[2, 6, 4]",
        ("bmm", 2, 1, 0, 1, 1, 1),
    ),
    "one expert selected": (
        "s = aten.select.int(w, 0, 1)\n    y = aten.linear.default(x, s)",
        "f32[2, 6, 4]",
        ("linear", 2, 1, 0, 1, 2, 2),
    ),
    "slice, expand, squeeze": (
        "s = aten.slice.Tensor(w, 1, 0, 6)\n    q = aten.squeeze.dim(s, 0)\n    y = aten.linear.default(x, q)",
        "f32[1, 8, 4]",
        ("linear", 2, 1, 0, 2, 2, 2),
    ),
    "split": (
        "c = aten.split.Tensor(w, 6)\n    g = operator.getitem(c, 1)\n    y = aten.linear.default(x, g)",
        "f32[12, 4]",
        ("linear", 1, 0, None, 2, 2, 2),
    ),
    "unbind": (
        "c = aten.unbind.int(w)\n    g = operator.getitem(c, 1)\n    y = aten.linear.default(x, g)",
        "f32[2, 6, 4]",
        ("linear", 2, 1, 0, 2, 2, 2),
    ),
    "a vector": ("y = aten.matmul.default(vec, w)", "f32[4, 6]", ("matmul", 0, 1, None, 0, 0, 0)),
    "a matrix and a vector": ("y = aten.matmul.default(w, vec)", "f32[6, 4]", ("matmul", 1, 0, None, 0, 0, 0)),
    "einsum": ('y = aten.einsum.default("abc,dc->dba", [x, w])', "f32[6, 4]", ("einsum", 1, 0, None, 0, 2, 0)),
    "einsum with an ellipsis": (
        'y = aten.einsum.default("hd, ...d -> ...h", [w, x])',
        "f32[6, 4]",
        ("einsum", 1, 0, None, 0, 2, 2),
    ),
    "einsum that leaves its result to the order of letters": (
        'y = aten.einsum.default("...d,dh", [x, w])',
        "f32[4, 6]",
        ("einsum", 0, 1, None, 0, 2, 2),
    ),
    "einsum of experts": (
        'y = aten.einsum.default("etd,edh->eth", [x, w])',
        "f32[3, 4, 6]",
        ("einsum", 1, 2, 0, 0, 2, 2),
    ),
    "quantized": (
        'p = qcompile.choose_qparams.default(w, "int8 sym")\n    s = operator.getitem(p, 0)\n'
        '    c = qcompile.quantize.default(w, s, None, "int8 sym")\n'
        '    d = qcompile.dequantize.default(c, s, None, "int8 sym")\n    y = aten.linear.default(x, d)',
        "f32[6, 4]",
        ("linear", 1, 0, None, 2, 2, 2),
    ),
}


def program(body: str, weight: str, output: str = "y") -> Program:
    head = f"def main(x: f32[3, 5, 4], i: i64[15], vec: f32[4], *, w: {weight}):"
    return Program.parse(f'{head}\n    {body}\n    return {{"{output}": y}}')


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    body, weight, expected = FOUND[name]
    p = program(body, weight)
    (c,) = find_contractions(p)
    assert (c.op, c.axis_in, c.axis_out, c.experts, len(c.path), c.input_axis, c.output_axis) == expected
    assert (c.kernel, c.groups, c.axes) == ((), 1, (c.axis_out, c.axis_in))
    assert c.weight.name == "w"
    assert c.node.name == "y"
    assert find_obstacles(p) == []


@pytest.mark.parametrize("name", [n for n in FOUND if n not in ("quantized", "addmm", "cast")])
def test_axes_mean_what_they_say(name: str) -> None:
    """A zero at a place of the summed axis of the weight does what a zero there in the activation does, and one at a
    place of its output axis makes the result zero there."""
    body, weight, _ = FOUND[name]
    p = program(body, weight)
    (c,) = find_contractions(p)
    torch.manual_seed(0)
    feeds = {"x": torch.randn(3, 5, 4), "i": torch.randint(0, 2, (15,)), "vec": torch.randn(4)}
    original, expected = p.weights["w"].clone(), p.run(feeds)["y"]

    def run_without(axis: int, place: int) -> torch.Tensor:
        p.weights["w"] = zeroed(original, axis, place)
        return p.run(feeds)["y"]

    of_weight, of_output = run_without(c.axis_in, 2), run_without(c.axis_out, 3)
    p.weights["w"] = original
    activation = "vec" if "vector" in name else "x"
    axis = 1 if name == "matmul on the left" else -1  # of x, which `c.input` has as its axis `input_axis`
    of_input = p.run({**feeds, activation: zeroed(feeds[activation], axis, 2)})["y"]
    assert torch.allclose(of_weight, of_input, atol=1e-6)
    assert not torch.allclose(of_weight, expected, atol=1e-6)
    if name not in ("slice, expand, squeeze", "split"):  # whose result has a part of the outputs
        assert torch.allclose(of_output, zeroed(expected, c.output_axis, 3), atol=1e-6)


def zeroed(tensor: torch.Tensor, axis: int, place: int) -> torch.Tensor:
    changed = tensor.clone()
    changed.select(axis, place).zero_()
    return changed


@pytest.mark.parametrize(
    ("body", "weight"),
    [
        ("t = aten.transpose.int(x, 1, 2)\n    v = aten.mul.Tensor(x, w)\n    y = aten.bmm.default(v, t)", "f32[5, 4]"),
        (
            "u = aten.unsqueeze.default(w, 0)\n    s = aten.slice.Tensor(x, 2, 0, 1)\n"
            "    y = aten.matmul.default(s, u)",
            "f32[4]",
        ),
        ("y = aten.mm.default(w, w)", "f32[4, 4]"),
    ],
    ids=["two activations", "a vector of frequencies", "two weights"],
)
def test_no_contraction_and_nothing_to_report(body: str, weight: str) -> None:
    p = program(body, weight)
    assert find_contractions(p) == []
    assert find_obstacles(p) == []


@pytest.mark.parametrize(
    ("body", "weight", "reason"),
    [
        (
            "m = aten.mul.Tensor(w, 2.0)\n    y = aten.linear.default(x, m)",
            "f32[6, 4]",
            "its weight is computed (mul, m) before it is multiplied",
        ),
        (
            "v = aten.view.default(w, [6, 4])\n    y = aten.linear.default(x, v)",
            "f32[6, 2, 2]",
            "its summed axis is no single axis of the stored weight 'w'",
        ),
        (
            "v = aten.view.default(w, [6, 4])\n    y = aten.linear.default(x, v)",
            "f32[2, 3, 4]",
            "its output axis is no single axis of the stored weight 'w'",
        ),
        (
            "s = aten.select.int(w, 0, 0)\n    t = aten.select.int(s, 0, 0)\n    y = aten.linear.default(x, t)",
            "f32[2, 2, 6, 4]",
            "weight 'w' [2, 2, 6, 4] is read as no matrix and no stack of them",
        ),
        (
            "r = aten.view.default(w, [3, 2, 4])\n    t = aten.transpose.int(r, 1, 2)\n    y = aten.bmm.default(x, t)",
            "f32[6, 4]",
            "weight 'w' [6, 4] is read as a stack of parts of its axis 0",
        ),
        (
            'y = aten.einsum.default("abc,cde->abde", [x, w])',
            "f32[4, 3, 2]",
            "in einsum 'abc,cde->abde' the weight has 1 summed, 2 output and 0 stacked axes: no matrix and no stack "
            "of them",
        ),
        (
            'y = aten.einsum.default("abc,dc->ad", [x, w])',
            "f32[6, 4]",
            "einsum 'abc,dc->ad' sums over 'b', which only one of its operands has",
        ),
        (
            'y = aten.einsum.default("abc,cc->abc", [x, w])',
            "f32[4, 4]",
            "einsum 'abc,cc->abc' takes the diagonal of 'cc'",
        ),
        (
            'y = aten.einsum.default("abc,dc,c->abd", [x, w, vec])',
            "f32[6, 4]",
            "einsum 'abc,dc,c->abd' multiplies 3 tensors, not an activation and a weight",
        ),
        (
            "y = aten.conv_transpose1d.default(x, w, None, [1], [0], [0], 5)",
            "f32[5, 2, 3]",
            "in a transposed convolution of 5 groups no axis of the weight is its output features",
        ),
        ("y = aten.mv.default(w, vec)", "f32[6, 4]", "aten.mv.default with a weight is not taken apart"),
        (
            "t = aten.mul.Tensor(w, 2.0)\n    y = aten.embedding.default(t, i)",
            "f32[6, 4]",
            "its table is computed (mul, t) before rows are looked up",
        ),
        (
            "t = aten.view.default(w, [6, 4])\n    y = aten.embedding.default(t, i)",
            "f32[6, 2, 2]",
            "weight 'w' [6, 2, 2] is read as no table of rows and features",
        ),
    ],
)
def test_obstacles_have_reasons(body: str, weight: str, reason: str) -> None:
    p = program(body, weight)
    assert find_contractions(p) == []
    (obstacle,) = find_obstacles(p)
    assert (obstacle.node.name, obstacle.reason) == ("y", reason)


def test_roles() -> None:
    p = Program.parse(
        """def main(ids: i64[2, 3], *, e: f32[9, 4], r: f32[3, 4], w: f32[3, 4, 4], a: f32[4, 4], h: f32[9, 4]):
    x = aten.embedding.default(e, ids)
    n = aten.linear.default(x, a)
    v = aten.view.default(n, [6, 4])
    router = aten.linear.default(v, r)
    soft = aten.softmax.int(router, -1)
    top = aten.topk.default(soft, 1)
    index = operator.getitem(top, 1)
    flat = aten.view.default(index, [-1])
    chosen = aten.index.Tensor(w, [flat])
    column = aten.unsqueeze.default(v, -1)
    expert = aten.bmm.default(chosen, column)
    back = aten.view.default(expert, [2, 3, 4])
    stream = aten.add.Tensor(x, back)
    head = aten.linear.default(stream, h)
    capped = aten.tanh.default(head)
    return {"logits": capped, "stream": stream}
"""
    )
    found = {node.name: role for node, role in roles(p).items()}
    assert found == {"n": "linear", "router": "router", "expert": "expert", "head": "head"}
    (embedding,) = find_embeddings(p)
    assert (embedding.weight.name, embedding.node.name, embedding.path) == ("e", "x", ())
    assert (embedding.op, embedding.axes) == ("embedding", (0, 1))


def test_an_embedding_in_a_transposed_table() -> None:
    p = program("t = aten.t.default(w)\n    y = aten.embedding.default(t, i)", "f32[4, 6]")
    (embedding,) = find_embeddings(p)
    assert (embedding.axis_rows, embedding.axis_features, len(embedding.path)) == (1, 0, 1)


def test_no_head_without_an_output_called_logits() -> None:
    p = program("y = aten.linear.default(x, w)", "f32[6, 4]")
    assert list(roles(p).values()) == ["linear"]
    p = program("y = aten.linear.default(x, w)", "f32[6, 4]", "logits")
    assert list(roles(p).values()) == ["head"]


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


MIXTRAL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
}
ATTENTION = [("linear", "linear", 1, 0, None)] * 4
ROUTER = ("linear", "router", 1, 0, None)
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("kind", "config", "experts", "expected"),
    [
        ("mixtral", MIXTRAL, "batched_mm", [*ATTENTION, ROUTER, *[("bmm", "expert", 2, 1, 0)] * 2]),
        ("mixtral", MIXTRAL, "grouped_mm", [*ATTENTION, ROUTER, *[("grouped_mm_fallback", "expert", 2, 1, 0)] * 2]),
        ("gpt2", SMALL, None, [("addmm", "linear", 0, 1, None)] * 4),
        ("falcon", SMALL, None, [("matmul", "linear", 1, 0, None)] * 4),
    ],
    ids=["batched experts", "grouped experts", "Conv1D", "numpy_T"],
)
def test_real_architectures(kind: str, config: dict[str, int], experts: str | None, expected: list[Any]) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()
    if experts:
        model.set_experts_implementation(experts)
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        exported = torch.export.export(
            Logits(model),
            (torch.zeros(2, 5, dtype=torch.int64),),
            dynamic_shapes=({0: dynamic, 1: dynamic},),
            strict=False,
        )
    p = from_exported(exported, strip="model.", output_names=["logits"])
    table = roles(p)
    found = [(c.op, table[c.node], c.axis_in, c.axis_out, c.experts) for c in find_contractions(p)]
    assert found == [*expected, ("linear", "head", 1, 0, None)]
    assert find_obstacles(p) == []
