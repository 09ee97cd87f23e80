"""Attention is found by what is computed, in every form; what only looks like it is not."""

from __future__ import annotations

import re

import pytest

from qcompile.ir.attention import Attention, find_attention, find_attention_obstacles
from qcompile.ir.program import Program

HEAD = """def main(q: f32[b, 4, s, 8], k: f32[b, 2, t, 8], v: f32[b, 2, t, 6], m: f32[b, 1, s, t], u: f32[b, 4, t, 8],
         u5: f32[b, 4, 8, t], *,
         sink: f32[4], w: f32[8, 8], e: f32[8, 4]):
"""
REPEAT_K = """
    k5 = aten.unsqueeze.default(k, 2)
    kx = aten.expand.default(k5, [-1, 2, 2, -1, 8])
    kr = aten.reshape.default(kx, [b, 4, t, 8])"""
REPEAT_V = """
    v5 = aten.unsqueeze.default(v, 2)
    vx = aten.expand.default(v5, [-1, 2, 2, -1, 6])
    vr = aten.reshape.default(vx, [b, 4, t, 6])"""
SIZES = """
    b = aten.sym_size.int(q, 0)
    s = aten.sym_size.int(q, 2)
    t = aten.sym_size.int(k, 2)"""
SCORES = """
    kt = aten.transpose.int(kr, 2, 3)
    scores = aten.matmul.default(q, kt)"""
REPEATED = SIZES + REPEAT_K + REPEAT_V
CONTEXT = """
    y = aten.matmul.default(p, vr)"""

# body → names of the sources of query, key, value and weights, of scores, softmax and context
FOUND: dict[str, tuple[str, tuple[str | None, ...]]] = {
    "fused": (
        REPEATED + "\n    y = aten.scaled_dot_product_attention.default(q, kr, vr, m, scale=0.3)  # attn",
        ("q", "k", "v", None, None, None, "y"),
    ),
    "fused, repeated inside": (
        "\n    y = aten.scaled_dot_product_attention.default(q, k, v, enable_gqa=True)  # attn",
        ("q", "k", "v", None, None, None, "y"),
    ),
    "spelled out, scaled and masked": (
        REPEATED
        + SCORES
        + """
    scaled = aten.mul.Tensor(scores, 0.3)
    masked = aten.add.Tensor(scaled, m)
    p = aten.softmax.int(masked, -1)"""
        + CONTEXT,
        ("q", "k", "v", "p", "scores", "p", "y"),
    ),
    "soft-capping, a cast, dropout": (
        REPEATED
        + SCORES
        + """
    small = aten.div.Tensor(scores, 5.0)
    cap = aten.tanh.default(small)
    wide = aten.mul.Tensor(cap, 5.0)
    zero = aten.gt.Scalar(m, 0)
    masked = aten.masked_fill.Scalar(wide, zero, -1e9)
    p0 = aten.softmax.int(masked, 3, torch.float64)
    p1 = aten.to.dtype(p0, torch.float32)
    p = aten.dropout.default(p1, 0.1, False)"""
        + CONTEXT,
        ("q", "k", "v", "p1", "scores", "p0", "y"),  # a cast to a narrower type rounds: the weights are its result
    ),
    "a sink and a maximum taken off": (
        REPEATED
        + SCORES
        + """
    sink4 = aten.view.default(sink, [1, 4, 1, 1])
    sinks = aten.expand.default(sink4, [b, -1, s, -1])
    logits = aten.cat.default([scores, sinks], -1)
    top = aten.amax.default(logits, [-1], True)
    less = aten.sub.Tensor(logits, top)
    p0 = aten.softmax.int(less, -1)
    p = aten.slice.Tensor(p0, 3, 0, -1)"""
        + CONTEXT,
        ("q", "k", "v", "p", "scores", "p0", "y"),
    ),
    "baddbmm with heads in the batch": (
        REPEATED
        + """
    n = operator.mul(b, 4)
    q3 = aten.reshape.default(q, [n, -1, 8])
    k3 = aten.reshape.default(kr, [n, -1, 8])
    kt = aten.transpose.int(k3, 1, 2)
    bias = aten.new_zeros.default(q, [1, 1, 1])
    scores = aten.baddbmm.default(bias, q3, kt, beta=1.0, alpha=0.3)
    s4 = aten.view.default(scores, [b, 4, s, t])
    masked = aten.add.Tensor(s4, m)
    p = aten.softmax.int(masked, -1)
    p3 = aten.view.default(p, [n, s, t])
    v3 = aten.reshape.default(vr, [n, -1, 6])
    y = aten.bmm.default(p3, v3)""",
        ("q", "k", "v", "p", "scores", "p", "y"),
    ),
    "keys on the left": (
        REPEATED
        + """
    qt = aten.transpose.int(q, 2, 3)
    scores = aten.matmul.default(kr, qt)
    p = aten.softmax.int(scores, 2)
    vt = aten.transpose.int(vr, 2, 3)
    y = aten.matmul.default(vt, p)""",
        ("q", "k", "v", "p", "scores", "p", "y"),
    ),
    "einsum, keys of one head for all": (
        """
    k1 = aten.select.int(k, 1, 0)
    v1 = aten.select.int(v, 1, 0)
    scores = aten.einsum.default("bhqd,bkd->bhqk", [q, k1])
    p = aten.softmax.int(scores, -1)
    y = aten.einsum.default("bhqk,bkd->bhqd", [p, v1])""",
        ("q", "k1", "v1", "p", "scores", "p", "y"),
    ),
    "broadcast over heads": (
        """
    k1 = aten.slice.Tensor(k, 1, 0, 1)
    v1 = aten.slice.Tensor(v, 1, 0, 1)
    y = aten.scaled_dot_product_attention.default(q, k1, v1)""",
        ("q", "k1", "v1", None, None, None, "y"),
    ),
    "repeated before heads are moved": (
        """
    kt = aten.transpose.int(k, 1, 2)
    kn = aten.neg.default(kt)
    kx = aten.repeat_interleave.self_int(kn, 2, 2)
    kr = aten.transpose.int(kx, 1, 2)
    y = aten.scaled_dot_product_attention.default(q, kr, u)""",
        ("q", "kn", "u", None, None, None, "y"),  # the tokens are not its last axis but one, but it is the smallest
    ),
    "features last on the way only": (
        """
    far = aten.neg.default(u5)
    mid = aten.permute.default(far, [0, 3, 1, 2])
    kt = aten.permute.default(mid, [0, 2, 3, 1])
    scores = aten.matmul.default(q, kt)
    p = aten.softmax.int(scores, -1)
    y = aten.matmul.default(p, u)""",
        ("q", "mid", "u", "p", "scores", "p", "y"),
    ),
    "split of features": (
        SIZES
        + """
    flat = aten.new_zeros.default(q, [b, s, 32])
    part = aten.view.default(flat, [b, s, 4, 8])
    qh = aten.transpose.int(part, 1, 2)
    same = aten.slice.Tensor(qh, 0, 0, 9223372036854775807)
    y = aten.scaled_dot_product_attention.default(same, u, u)""",
        ("qh", "u", "u", None, None, None, "y"),  # not `flat`, whose rows are all heads, and not `part`
    ),
}


def parse(body: str) -> Program:
    """A program of the calls of `body`; what none of them reads is returned, so that every call may stand."""
    called = re.findall(r"^ *(\w+) = ", body, re.MULTILINE)
    unread = [name for name in called if len(re.findall(rf"\b{name}\b", body)) == 1]
    return Program.parse(HEAD + body.strip("\n") + "\n    return {" + ", ".join(f'"{n}": {n}' for n in unread) + "}")


def names(found: Attention) -> tuple[str | None, ...]:
    operands = (found.query, found.key, found.value, found.weights)
    nodes = (*(None if o is None else o.source for o in operands), found.scores, found.softmax, found.context)
    return tuple(None if n is None else n.name for n in nodes)


@pytest.mark.parametrize("form", FOUND)
def test_found(form: str) -> None:
    body, expected = FOUND[form]
    program = parse(body)
    (found,) = find_attention(program)
    assert names(found) == expected
    assert find_attention_obstacles(program) == []
    assert found.module == program.module_of(found.context)
    for operand in (found.query, found.key, found.value):
        sizes = operand.source.meta["val"].shape
        assert isinstance(sizes[operand.features], int)
        assert operand.features == len(sizes) - 1
        assert not isinstance(sizes[operand.tokens], int)
        read = program.arg(operand.reader, operand.argument)
        assert operand.node is (read if operand.index is None else read[operand.index])
        assert operand.path[-1:] in ((), (operand.node,))


# body → what each obstacle says, by the name of its product
REFUSED: dict[str, tuple[str, dict[str, str]]] = {
    "no softmax": ("y = aten.matmul.default(q, q2)", {"y": "with no softmax before or behind it"}),
    "two products in one softmax": (
        "first = aten.matmul.default(q, q2)\n    second = aten.matmul.default(q, u2)\n"
        "    both = aten.add.Tensor(first, second)\n    p = aten.softmax.int(both, -1)\n"
        "    y = aten.matmul.default(p, q)",
        {"first": "a sum of 2 products", "second": "a sum of 2 products", "y": "no softmax"},
    ),
    "softmax over queries, product over keys": (
        "scores = aten.matmul.default(q, q2)\n    p = aten.softmax.int(scores, 2)\n    y = aten.matmul.default(p, q)",
        {"scores": "reaches no product that sums over what the softmax runs over", "y": "no softmax"},
    ),
    "softmax over heads": (
        "scores = aten.matmul.default(q, q2)\n    p = aten.softmax.int(scores, 1)\n    y = aten.matmul.default(p, q)",
        {"scores": "softmax p runs over no axis that the product made", "y": "no softmax"},
    ),
    "weights of two softmaxes taken off each other": (
        "scores = aten.matmul.default(q, q2)\n    p = aten.softmax.int(scores, -1)\n    x = aten.sub.Tensor(p, 0.5)\n"
        "    y = aten.matmul.default(x, q)",
        {"scores": "reaches no product", "y": "no softmax"},
    ),
    "three tensors at once": (
        'y = aten.einsum.default("bhqd,bhkd,bhkd->bhqk", [q, u, u])',
        {"y": "einsum 'bhqd,bhkd,bhkd->bhqk' multiplies 3 tensors at once"},
    ),
    "fused in another way": (
        "a = aten._scaled_dot_product_attention_math.default(q, u, u)\n    y = operator.getitem(a, 0)",
        {"a": "_scaled_dot_product_attention_math is attention fused in another way"},
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_refused(form: str) -> None:
    body, expected = REFUSED[form]
    moves = "    q2 = aten.transpose.int(q, 2, 3)\n    u2 = aten.transpose.int(q, -1, -2)\n"
    program = parse(moves + "    " + body)
    assert find_attention(program) == []
    reasons = {obstacle.node.name: obstacle.reason for obstacle in find_attention_obstacles(program)}
    assert reasons.keys() == expected.keys()
    for name, said in expected.items():
        assert said in reasons[name]


def test_products_with_weights_and_routers_are_neither() -> None:
    program = parse("""
    x = aten.linear.default(q, w)
    r = aten.matmul.default(x, e)
    p = aten.softmax.int(r, -1)
    top = aten.topk.default(p, 2)
    chosen = operator.getitem(top, 1)
    rows = aten.index.Tensor(w, [chosen])
    columns = aten.transpose.int(rows, -1, -2)
    x5 = aten.unsqueeze.default(x, 3)
    y = aten.matmul.default(x5, columns)""")
    assert find_attention(program) == []
    assert find_attention_obstacles(program) == []


def test_one_softmax_read_by_two_values_is_two_attentions() -> None:
    body = "kt = aten.transpose.int(u, 2, 3)\n    scores = aten.matmul.default(q, kt)\n"
    body += "    p = aten.softmax.int(scores, -1)\n    a = aten.matmul.default(p, u)\n    n = aten.neg.default(u)\n"
    body += "    c = aten.matmul.default(p, n)\n    y = aten.add.Tensor(a, c)"
    first, second = find_attention(parse("    " + body))
    assert names(first) == ("q", "u", "u", "p", "scores", "p", "a")
    assert names(second) == ("q", "u", "n", "p", "scores", "p", "c")
