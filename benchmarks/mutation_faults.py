"""The faults that `mutations.py` seeds: each a place in the passes or in what they stand on, and a slip made there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """`old`, which stands in `file` exactly once, becomes `new`; `what` says what is wrong then."""

    file: str
    old: str
    new: str
    what: str


_NORM, _ROTATE, _SCALE, _PERMUTE = (f"qcompile/passes/{name}" for name in ("norm", "rotate", "scale", "permute"))
_SPACES, _RULES, _HADAMARD = "qcompile/spaces", "qcompile/spaces/rules", "qcompile/hadamard"

_NORM_FAULTS = (
    Fault(f"{_NORM}/raise_norms.py", "affine[:1]), norm.eps)", "affine[:1]), 1e-05)", "eps is a constant"),
    Fault(
        f"{_NORM}/raise_norms.py", "if norm.scale != 1:", "if norm.scale > 1:", "the factor of an l2 norm is left out"
    ),
    Fault(
        f"{_NORM}/spelled.py",
        'program.arg(node, "correction") == 0',
        'program.arg(node, "correction") in (0, 1)',
        "the unbiased variance is taken for the biased one",
    ),
    Fault(
        f"{_NORM}/spelled.py",
        "found.eps / width, None",
        "found.eps, None",
        "the eps of an l2 norm is not divided by the width",
    ),
    Fault(
        f"{_NORM}/spelled.py",
        "abs(count - size) <= 1e-12 * size",
        "abs(count - size) <= size",
        "a sum over another number is taken for a mean",
    ),
    Fault(
        f"{_NORM}/spelled.py",
        "over_last = axes is not None and [axis % rank for axis in axes] == [rank - 1]",
        "over_last = axes is not None",
        "less its mean over any axis is taken for centred",
    ),
    Fault(
        f"{_NORM}/fold_norm_affine.py",
        "add_to_bias(program, c, _shift_of(",
        "add_to_bias(program, c, -_shift_of(",
        "W·β is taken off the bias",
    ),
    Fault(
        f"{_NORM}/fold_norm_affine.py",
        "return vectors / self.by.to(vectors)",
        "return vectors * self.by.to(vectors)",
        "a bias that stays is times γ, not over it",
    ),
    Fault(
        f"{_NORM}/fold_norm_affine.py",
        "if any(affine(program, norm) != vectors for norm in norms):",
        "if any(affine(program, norm)[:1] != vectors[:1] for norm in norms):",
        "norms that share a gain may have other biases",
    ),
    Fault(
        f"{_NORM}/fold_norm_affine.py",
        "spaces.all_limits(Level.LINEAR, wires)",
        "spaces.all_limits(Level.DIAGONAL, wires)",
        "gains of either sign pass relu",
    ),
    Fault(
        f"{_NORM}/center_norm.py",
        "p.node.target is not aten.layer_norm.default:",
        "p.node.target not in (aten.layer_norm.default, aten.rms_norm.default):",
        "an RMS norm may read the stream too",
    ),
    Fault(
        f"{_NORM}/center_norm.py",
        'if p.use.kind not in ("norm", "source"):',
        'if p.use.kind not in ("norm", "source", "sink"):',
        "a product may read the stream with its mean",
    ),
    Fault(
        f"{_NORM}/fold_embedding_norm.py",
        "if len(table.users) > 1:",
        "if len(table.users) > 2:",
        "a tied head gets the normalised table",
    ),
    Fault(
        f"{_NORM}/fold_embedding_norm.py",
        "    if others:",
        "    if len(others) > 1:",
        "one other reader of the embedding is not seen",
    ),
)

_ROTATE_FAULTS = (
    Fault(
        f"{_ROTATE}/rotate.py",
        "if s.width > 1 for p in s.sinks}",
        "if s.width > 1 for p in s.sources}",
        "orphans are what makes a rotated space, not what reads none",
    ),
    Fault(
        f"{_ROTATE}/rotate.py",
        'in ("head", "router", "convolution")',
        'in ("router", "convolution")',
        "the input of the head is rotated online",
    ),
    Fault(
        f"{_ROTATE}/rotate.py",
        'seed if self.mode == "signed-hadamard" else None',
        'seed if self.mode == "hadamard" else None',
        "the plain Hadamard matrix has the signs",
    ),
    Fault(
        f"{_ROTATE}/inputs.py",
        "parted = groups if kept else groups[1:]",
        "parted = groups[1:]",
        "what else reads the weight gets it rotated",
    ),
    Fault(
        f"{_ROTATE}/inputs.py",
        'Hadamard(own.meta["val"].shape[axis], size)',
        'Hadamard.of(own.meta["val"].shape[axis])',
        "the weight is rotated over its whole width",
    ),
    Fault(
        f"{_ROTATE}/inputs.py",
        "return self.rotation.apply_into(tensor, self.axis, spare)",
        "return self.rotation.apply_inverse(tensor, self.axis)",
        "the weight is times T, not its transpose",
    ),
    Fault(
        f"{_ROTATE}/inputs.py",
        "first = min(place.followers,",
        "first = max(place.followers,",
        "the transform stands behind its first reader",
    ),
    Fault(f"{_ROTATE}/scores.py", "for operand in places:", "for operand in places[:1]:", "only queries are rotated"),
)

_SPACE_FAULTS = (
    Fault(
        f"{_SPACES}/apply.py",
        'down = inverse ^ (p.use.kind == "sink")',
        'down = np.full(inverse.shape, p.use.kind == "sink")',
        "keys are scaled as queries are",
    ),
    Fault(
        f"{_SPACES}/apply.py",
        "part.mean(axis, keepdim=True, dtype=torch.float64)",
        "part.mean(axis, keepdim=True, dtype=torch.float32)",
        "means are taken in float32",
    ),
    Fault(
        f"{_SPACES}/apply.py",
        "(not mine or not theirs or _overlap(mine, theirs))",
        "mine and theirs and _overlap(mine, theirs)",
        "a tied weight is not parted for who reads another axis",
    ),
    Fault(
        f"{_SPACES}/apply.py",
        "if (use.axis, *e.key) not in done]",
        "if e.kind or done]",
        "a tied weight is edited once for each reader",
    ),
    Fault(
        f"{_SPACES}/space.py",
        "    if inverse is None:\n        fits &=",
        "    if inverse is not None:\n        fits &=",
        "copies may take their channels from each other",
    ),
    Fault(
        f"{_SPACES}/analysis.py",
        "        if others:",
        "        if len(others) > 1:",
        "one foreign reader of a matrix is not seen",
    ),
    Fault(
        f"{_SPACES}/analysis.py",
        "t.b[neither & fixed_out], t.event)",
        "t.a[neither & fixed_out], t.event)",
        "one factor of a fixed product may be scaled",
    ),
    Fault(
        f"{_SPACES}/wires.py",
        "add(where, self._of_vectors(keys, self.instance[where]))",
        "add(where, keys)",
        "wires of several vectors may be mixed",
    ),
    Fault(
        f"{_SPACES}/layout.py",
        "transpose(places),\n            tuple(self.varies[i] for i in places),",
        "transpose(places),\n            self.varies,",
        "a transposition leaves in place what varies",
    ),
    Fault(
        f"{_SPACES}/layout.py",
        "return any(self.ids.shape[i] > 1 for i in self.atoms(axis))",
        "return all(self.ids.shape[i] > 1 for i in self.atoms(axis))",
        "a merged axis has wires only where all its parts have",
    ),
)

_RULE_FAULTS = (
    Fault(
        f"{_RULES}/pointwise.py",
        "for ids in (a, b, out):",
        "for ids in (a, b):",
        "a product of channels may be rotated",
    ),
    Fault(
        f"{_RULES}/pointwise.py",
        'bends each element", VECTOR)',
        'bends each element", (Level.LINEAR,))',
        "rotations pass relu",
    ),
    Fault(
        f"{_RULES}/pointwise.py",
        "return bool(wired) and a.shape[wired[-1]] == 1",
        "return False",
        "a gate for a head is taken for one of each channel",
    ),
    Fault(
        f"{_RULES}/joining.py",
        "            walk.wires.join(wide, theirs)\n",
        "            walk.wires.join(wide, theirs, VECTOR)\n",
        "tokens that are joined may be permuted and scaled apart",
    ),
    Fault(
        f"{_RULES}/pairing.py",
        "    inner = tuple(v and size > 1 for",
        "    inner = tuple(v and size < 1 for",
        "heads may be mixed with each other",
    ),
    Fault(
        f"{_RULES}/norms.py",
        "(Level.PERMUTATION, *VECTOR), old, event, rows)",
        "(Level.PERMUTATION, *VECTOR), old, event)",
        "channels move between the vectors that a norm reads",
    ),
    Fault(
        f"{_RULES}/products.py",
        "return result if bias is None else summed(",
        "return result if result.has_wires else summed(",
        "a bias is no source",
    ),
    Fault(
        f"{_RULES}/products.py",
        "    if c.groups > 1 and not depthwise:\n        size =",
        "    if depthwise and not layout.has_wires:\n        size =",
        "channels move between the groups of a convolution",
    ),
    Fault(
        f"{_RULES}/views.py",
        "walk.follow(layout, node) if layout.varies_along(axis) else layout\n    return",
        "layout\n    return",
        "tokens from other positions are taken for the same vectors",
    ),
    Fault(
        f"{_RULES}/reductions.py",
        'walk.stop(layout, node, "sums over channels", (Level.DIAGONAL, *VECTOR))',
        'walk.stop(layout, node, "sums over channels", VECTOR)',
        "channels that are summed may be scaled",
    ),
)

_HADAMARD_FAULTS = (
    Fault(
        f"{_HADAMARD}/rotation.py",
        "Transform(matrices, None, signs) if inverse else Transform(matrices, signs)",
        "Transform(matrices, signs) if inverse else Transform(matrices, None, signs)",
        "signs stand on the other side of H",
    ),
    Fault(
        f"{_HADAMARD}/kernel.py",
        "matrix.T.contiguous() if inverse else matrix",
        "matrix.contiguous() if inverse else matrix",
        "the inverse is not transposed",
    ),
    Fault(
        f"{_HADAMARD}/construct.py",
        "result[1:, 1:] = 1, below, inner",
        "result[1:, 1:] = below, 1, inner",
        "the border of a Paley matrix has its signs swapped",
    ),
)

_SCALE_FAULTS = (
    Fault(f"{_SCALE}/smooth.py", "weights ** (1 - alpha)", "weights**alpha", "α for 1 − α"),
    Fault(
        f"{_SCALE}/equalize.py",
        ".clamp(1 / self.bound, self.bound)",
        ".clamp(max=self.bound)",
        "only one side is bounded",
    ),
    Fault(
        f"{_SCALE}/readers.py",
        "torch.where(self.inverse, factors, factors.reciprocal())",
        "torch.where(self.inverse, factors.reciprocal(), factors)",
        "channels are multiplied where they are to be divided",
    ),
)

_PERMUTE_FAULTS = (
    Fault(
        f"{_PERMUTE}/widening.py",
        "return float(eps) * self.space.width / (self.space.width + self.extra)",
        "return float(eps)",
        "eps stays when a norm gets wider",
    ),
    Fault(
        f"{_PERMUTE}/growth.py",
        'np.searchsorted(ends, places, "right")',
        'np.searchsorted(ends, places, "left")',
        "new channels stand one entry too late",
    ),
)

FAULTS: tuple[Fault, ...] = (
    *_NORM_FAULTS,
    *_ROTATE_FAULTS,
    *_SPACE_FAULTS,
    *_RULE_FAULTS,
    *_HADAMARD_FAULTS,
    *_SCALE_FAULTS,
    *_PERMUTE_FAULTS,
)
