"""Recipes: what they read, how they print back, and what they say about mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import RecipeError
from qcompile.recipe import Calibration, Recipe, Rule
from qcompile.recipe.parts import Attention

FULL = """\
description: 'a: b'
weights: int4 sym group=128
activations: int8 asym token dynamic
outputs: int8 sym tensor static
embeddings: int8 sym channel
attention: {k: int8 sym token dynamic, v: int4 sym token dynamic}
kv_cache: int8 sym token dynamic
rules:
- {match: lm_head, weights: null}
- {match: 'model.layers.{0,31}.*', operator: addmm, layers: 0-3, role: linear, weights: int8 channel, optional: true}
- {layers: 7, activations: null, outputs: int8 sym token dynamic}
passes: [raise-norms, 'inject-outliers(channels=2, gain=8)']
calibration: {samples: 8, length: 32}
target: onnx_qcdq
verify: 'off'
"""


def test_yaml_and_back() -> None:
    recipe = Recipe.parse(FULL)
    assert str(recipe) == FULL
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.load(recipe.to_dict()) == recipe
    assert yaml.safe_load(str(recipe))["passes"] == ["raise-norms", "inject-outliers(channels=2, gain=8)"]
    assert recipe.rules[0] == Rule(match="lm_head", weights=None)
    assert recipe.calibration == Calibration(samples=8, length=32)


def test_what_is_left_out_has_its_default() -> None:
    recipe = Recipe.parse("{}")
    assert recipe == Recipe()
    assert str(recipe) == "{}\n"
    assert (recipe.weights, recipe.head, recipe.router, recipe.verify, recipe.passes) == (None, None, None, "auto", ())


@pytest.mark.parametrize(
    "text",
    [
        "passes: [raise-norms, rotate(mode=hadamard, block=32), rtn]",
        "passes: raise-norms, rotate(mode=hadamard, block=32), rtn",
        "passes: [raise-norms, 'rotate(mode=hadamard, block=32)', rtn]",
    ],
)
def test_passes_keep_their_options_together(text: str) -> None:
    """YAML splits at the comma inside the brackets."""
    assert Recipe.parse(text).passes == ("raise-norms", "rotate(mode=hadamard, block=32)", "rtn")


def test_yaml_reads_off_as_false() -> None:
    assert Recipe.parse("verify: off").verify == "off"


scalars = st.sampled_from([None, "int4 sym group=32", "int8 asym channel", {"element": "int4", "group": 16}])
activations = st.sampled_from([None, "int8 sym token dynamic", {"element": "int8", "when": "static"}])
rules = st.builds(
    Rule,
    match=st.sampled_from([None, "lm_head", "model.layers.{0,31}.*", "*: #"]),
    layers=st.sampled_from(["0-3,31", 4, None]),
    role=st.sampled_from(["head", "expert", "embedding", "convolution"]),
    weights=scalars,
    outputs=st.one_of(activations, st.just("inherit")),
    activations=st.one_of(activations, st.just("inherit")),
    optional=st.booleans(),
)


@given(
    st.builds(
        Recipe,
        description=st.text(max_size=12),
        weights=scalars,
        activations=activations,
        outputs=activations,
        head=scalars,
        embeddings=scalars,
        attention=st.dictionaries(st.sampled_from(Attention.names()), activations),
        kv_cache=st.one_of(activations, st.dictionaries(st.sampled_from(["keys", "values"]), activations)),
        rules=st.lists(rules, max_size=2).map(tuple),
        passes=st.lists(st.sampled_from(["rtn", "a(b=1, c=[2, 3])", "a(b='x y')"]), max_size=3).map(tuple),
        calibration=st.builds(Calibration, samples=st.integers(1, 9), data=st.sampled_from(["generated", "a b.txt"])),
        target=st.sampled_from([None, "onnx_qcdq"]),
        verify=st.sampled_from(["auto", "each", "end", "off"]),
    )
)
def test_any_recipe_prints_and_parses_back(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe
    assert str(Recipe.parse(str(recipe))) == str(recipe)


def test_load_takes_names_paths_mappings_and_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FULL, encoding="utf-8")
    recipe = Recipe.load(path)
    assert recipe == Recipe.load(str(path)) == Recipe.load(recipe) == Recipe.load(yaml.safe_load(FULL))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "int4-g128").mkdir()  # a folder of a preset's name does not hide the preset
    assert Recipe.load("int4-g128").weights == "int4 sym group=128"


def test_presets_are_described_and_complete() -> None:
    presets = Recipe.presets()
    plain = ["int4-g128", "int4-int8dynamic", "int8-dynamic", "int8-static"]
    calibrated = [
        "dpq-w4a8",
        "gptaq-int4",
        "gptq-int4",
        "mr-gptq-mxfp4",
        "mr-gptq-nvfp4",
        "qronos-int4",
        "rotated-w4a4",
    ]
    assert list(presets) == sorted(plain + calibrated)
    for name, description in presets.items():
        recipe = Recipe.load(name).check()
        assert recipe.description == description
        assert description.endswith(".")


def test_torch_is_not_imported_to_read_a_recipe() -> None:
    code = "import sys; from qcompile.recipe import Recipe; Recipe.load('int4-g128'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


WRONG: list[tuple[Any, str]] = [
    ({"weihgts": "int4"}, "recipe field 'weihgts' is unknown (did you mean 'weights'?); the fields there are"),
    ({"kv_cash": None}, "recipe field 'kv_cash' is unknown (did you mean 'kv_cache'?); the fields there are"),
    (
        {"attention": {"kk": None}},
        "recipe field 'attention.kk' is unknown (did you mean 'k'?); the fields there are q, k, v, softmax, qkv, kv, qkvs",
    ),
    ({"kv_cache": {"key": None}}, "recipe field 'kv_cache.key' is unknown (did you mean 'keys'?)"),
    ({"kv_cache": 8}, "recipe field 'kv_cache': input should be"),
    ({"attention": {"q": 8}}, "recipe field 'attention.q': input should be"),
    ({"rules": [{"mach": "x", "weights": None}]}, "recipe field 'rules.0.mach' is unknown (did you mean 'match'?)"),
    ({"rules": [{"weights": None}]}, "recipe field 'rules.0': a rule needs a selector: match, operator"),
    (
        {"rules": [{"match": "x"}]},
        "recipe field 'rules.0': a rule needs something to set: weights, activations or outputs",
    ),
    ({"rules": [{"role": "heads", "weights": None}]}, "recipe field 'rules.0.role': input should be 'head', 'router'"),
    ({"calibration": {"sample": 1}}, "recipe field 'calibration.sample' is unknown (did you mean 'samples'?)"),
    ({"calibration": {"samples": 0}}, "recipe field 'calibration.samples': input should be greater than or equal to 1"),
    ({"verify": "all"}, "recipe field 'verify': input should be 'auto', 'each', 'end' or 'off' (given 'all')"),
    ({"passes": 3}, "recipe field 'passes': input should be a valid tuple (given 3)"),
    ("int4-g12", "there is no preset 'int4-g12' (did you mean 'int4-g128'?); presets are dpq-w4a8, gptaq-int4"),
    ("nowhere/x.yaml", "recipe 'nowhere/x.yaml' is no file; give a YAML file, or a preset: dpq-w4a8"),
]


@pytest.mark.parametrize(("source", "message"), WRONG)
def test_mistakes_are_named_in_one_line(source: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "the recipe is not YAML"), ("- a", "a recipe is a YAML mapping"), ("", "a recipe is a YAML mapping")],
)
def test_text_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(text)
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=f"bad.yaml: {message}"):
        Recipe.load(path)


def test_the_constructor_raises_the_same_error() -> None:
    with pytest.raises(RecipeError, match="recipe field 'verify'"):
        Recipe(verify="always")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("weights.group=64", {"weights": "int4 sym group=64"}),
        ("weights.bits=3", {"weights": "int3 sym group=128"}),
        ("weights.granularity=channel", {"weights": "int4 sym channel"}),
        ("weights=null", {"weights": None}),
        ("activations.symmetry=sym", {"activations": "int8 sym token dynamic"}),
        ("rules.0.match=a.b", {"rules": Rule(match="a.b", weights=None)}),
        ("rules.1.weights.bits=4", {"rules": "int4 sym channel"}),
        ("calibration.samples=4", {"calibration": Calibration(samples=4, length=32)}),
        ("passes=[raise-norms]", {"passes": ("raise-norms",)}),
        ("passes.0=rtn", {"passes": ("rtn", "inject-outliers(channels=2, gain=8)")}),
        ("verify=end", {"verify": "end"}),
        ("outputs.when=dynamic", {"outputs": "int8 sym tensor dynamic"}),
        ("embeddings.group=32", {"embeddings": "int8 sym group=32"}),
        ("rules.2.outputs.bits=4", {"rules": Rule(layers=7, activations=None, outputs="int4 sym token dynamic")}),
    ],
)
def test_override(assignment: str, expected: dict[str, Any]) -> None:
    recipe = Recipe.parse(FULL)
    changed = recipe.override([assignment])
    ((name, value),) = expected.items()
    found = getattr(changed, name)
    if name == "rules":
        found = found[int(assignment[6])] if isinstance(value, Rule) else found[1].weights
    assert found == value
    others = set(Recipe.model_fields) - {name}
    assert all(getattr(changed, other) == getattr(recipe, other) for other in others)


def test_overrides_apply_in_order() -> None:
    recipe = Recipe.load("int4-g128").override(["weights.group=64", "weights.bits=3", "activations=int8 dynamic"])
    assert (recipe.weights, recipe.activations) == ("int3 sym group=64", "int8 dynamic")
    by_fields = Recipe(weights={"element": "int4", "group": 32}).override(["weights.symmetry=asym"])
    assert by_fields.weights == "int4 asym group=32"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("weights", "is not written like path=value"),
        ("weigths.group=64", "recipe field 'weigths' is unknown (did you mean 'weights'?)"),
        ("weights.gruop=64", "weights: unknown spec field 'gruop'"),
        ("head.group=64", "head is null, which has no fields; set it first, as head=int8 sym"),
        ("rules.0.mach=x", "rule field 'mach' is unknown (did you mean 'match'?)"),
        ("rules.9.match=x", "rules.9 does not exist; rules has 0 to 2"),
        ("rules.0.match.x=1", "'match' has no fields; write rules.0.match="),
        ("rules.2.weights.bits=4", "rules.2.weights is inherit, which has no fields"),
        ("calibration.sample=1", "calibration field 'sample' is unknown (did you mean 'samples'?)"),
        ("calibration.data.x=1", "calibration.data.x does not exist"),
        ("calibration.samples=many", "recipe field 'calibration.samples'"),
        ("passes.0.x=1", "a pass is set as a whole; write passes.0=name(option=value)"),
        ("target.x=1", "'target' has no fields; write target="),
        ("weights=[", "'[' is not a YAML value"),
        ("router.bits=8", "router is null, which has no fields; set it first, as router=int8 sym"),
    ],
)
def test_wrong_overrides_are_named(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(FULL).override([assignment])
    assert str(caught.value).startswith(f"--set {assignment!r}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
