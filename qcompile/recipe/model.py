"""`Recipe`: passes, quantization rules, calibration source and target, as plain data with strict names.

Nothing here imports torch: quantization specs and passes stay text until `Recipe.check`, `resolve` or `pipeline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from qcompile.calibration.settings import Settings
from qcompile.errors import RecipeError, nearest
from qcompile.recipe.parts import PARTS, Attention, KVCache, Spec

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True)
class Rule:
    """What to do at the places it selects; the selectors that are given must all hold.

    - `match`: a glob that must cover the whole name of the module, or of the weight (with or without ``.weight``).
      ``*`` is any run of characters, dots included, ``?`` is one, ``{0,31}`` is either.
    - `operator`: operators, as ``linear`` or ``addmm|mm``; - `layers`: layer numbers, as ``0-3,31`` (a place's layer is
      the first number in its module's name); - `role`: head, router, expert, convolution, linear or embedding.
    - `weights`, `activations`, `outputs`: a spec, null for float, or ``inherit`` for what would hold without the rule.
      A rule that sets `weights: null` leaves input and result float too, unless it says otherwise. An embedding reads
      integers, so that `activations` says nothing about it.
    - `optional`: matching nothing is no error.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    match: str | None = None
    operator: str | None = None
    layers: str | int | None = None
    role: Literal["head", "router", "expert", "convolution", "linear", "embedding"] | None = None
    weights: Spec = "inherit"
    activations: Spec = "inherit"
    outputs: Spec = "inherit"
    optional: bool = False

    def __post_init__(self) -> None:
        if all(selector is None for selector in (self.match, self.operator, self.layers, self.role)):
            raise ValueError("a rule needs a selector: match, operator, layers or role")
        if self.weights == self.activations == self.outputs == "inherit":
            raise ValueError("a rule needs something to set: weights, activations or outputs")


class Calibration(BaseModel):
    """Where calibration tokens come from: `samples` sequences of `length` tokens, `batch` at a time.

    - `data`: ``generated`` (by the model itself, from `seed`), the path of a file, or a data set's name; docs/data.md.
    - `bos`: where the token that begins a text is put: ``none``, before each ``document``, first in each ``sequence``.
    - `packing`: ``joined`` cuts the text of all documents in windows; ``documents`` is one document a sequence, padded.
    - `field`: what holds the text in a ``.jsonl`` file or a data set; null for ``text``, or the data set's own.
    - `propagate`: what later segments of the model are shown while weights are rounded: what it computes with the
      ``quantized`` weights so far, or what the ``float`` model computes.
    - `true_sequential`: inside a segment, too, a product is looked at after those before it are rounded.
    - `memory`: GB of values between segments that are kept in memory; more goes to files.
    - `device`: where segments are run and weights solved, as ``cuda``; null for the CPU.
    - `compute`: ``bfloat16`` for linear layers of float32 while data is run: faster where the processor multiplies it.
    - `sums`: ``int8`` for the sums of products of inputs that rounding goes by: faster where the processor has VNNI.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "generated"
    samples: int = Field(default=64, ge=1)
    length: int = Field(default=256, ge=1)
    seed: int = 0
    batch: int = Field(default=8, ge=1)
    bos: Literal["none", "document", "sequence"] = "none"
    packing: Literal["joined", "documents"] = "joined"
    field: str | None = None
    propagate: Literal["quantized", "float"] = "quantized"
    true_sequential: bool = True
    memory: float = Field(default=4.0, gt=0)
    device: str | None = None
    compute: Literal["float32", "bfloat16"] = "float32"
    sums: Literal["float32", "int8"] = "float32"

    def settings(self) -> Settings:
        """How segments are run."""
        return Settings(self.propagate, self.true_sequential, self.memory, self.device, self.compute, self.sums)


class Recipe(BaseModel):
    """What to do to a model. `str(recipe)` is YAML that `Recipe.parse` reads back.

    - `weights`, `activations`, `outputs`: the specs of every contraction (a product of an activation and a weight) that
      no rule says otherwise for: its weight, its input, and its result with the bias that the operator itself adds.
    - `head` and `router`: the weights of the output head and of expert routers, float by default; an unquantized one
      keeps its input and its result float too.
    - `embeddings`: the tables ``[rows, features]`` that token ids or positions are looked up in.
    - `attention`, `kv_cache`: the values inside attention and what its cache holds; see `Attention` and `KVCache`.
    - `rules`: the first one that matches a place (a contraction or an embedding) decides.
    - `passes`: run in this order, as ``name`` or ``name(option=value)``; see `pipeline` for what is added.
    - `calibration`: data for passes that look at what flows through the program.
    - `target`: the backend to lower to. `verify`: compare after ``each`` pass, at the ``end`` only, or not (``off``);
      ``auto`` is ``each`` unless the model is large.

    Raises RecipeError, in one line, for an unknown key (with the nearest one that exists) or a value of a wrong type.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    weights: Spec = None
    activations: Spec = None
    outputs: Spec = None
    head: Spec = None
    router: Spec = None
    embeddings: Spec = None
    attention: Attention = Attention()
    kv_cache: KVCache = KVCache()
    rules: tuple[Rule, ...] = ()
    passes: tuple[str, ...] = ()
    calibration: Calibration = Calibration()
    target: str | None = None
    verify: Literal["auto", "each", "end", "off"] = "auto"

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            from qcompile.recipe.messages import explain

            raise RecipeError(explain(error, cls)) from None

    @field_validator("passes", mode="before")
    @classmethod
    def _split_passes(cls, value: Any) -> Any:
        """YAML splits ``[rotate(mode=hadamard, block=32)]`` at its comma; join what brackets hold together."""
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, Sequence) or not all(isinstance(part, str) for part in parts):
            return value
        joined: list[str] = []
        for part in parts:
            if joined and joined[-1].count("(") > joined[-1].count(")"):
                joined[-1] += f", {part.strip()}"
            elif part.strip():
                joined.append(part.strip())
        return tuple(joined)

    @field_validator("verify", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML 1.1 reads an unquoted off as false

    # ------------------------------------------------------------------ reading and printing

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read a recipe from YAML text."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(data, Mapping):
            raise RecipeError(f"a recipe is a YAML mapping, as 'weights: int4 sym channel', not {text.strip()[:50]!r}")
        return cls.model_validate(dict(data))

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | Recipe) -> Recipe:
        """A recipe from a preset's name, the path of a YAML file, a mapping, or a recipe.

        Raises RecipeError for a name that is no preset (with the nearest), a missing file, or a bad recipe.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls.model_validate(dict(source))
        name, path = str(source), Path(source)
        if (preset := PRESETS / f"{name}.yaml").is_file():
            return cls._read(preset)
        if path.is_file():
            return cls._read(path)
        known = cls.presets()
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise RecipeError(f"recipe {name!r} is no file; give a YAML file, or a preset: {', '.join(known)}")
        raise RecipeError(f"there is no preset {name!r}{nearest(name, known)}; presets are {', '.join(known)}")

    @classmethod
    def _read(cls, path: Path) -> Recipe:
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except RecipeError as error:
            raise RecipeError(f"{path.name}: {error}") from None

    @staticmethod
    def presets() -> dict[str, str]:
        """Name → description of every preset."""
        files = sorted(PRESETS.glob("*.yaml"))
        return {f.stem: str(yaml.safe_load(f.read_text(encoding="utf-8"))["description"]) for f in files}

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `Recipe.load` reads back; what has its default is left out."""
        data = self.model_dump(exclude_defaults=True)
        for name in PARTS.keys() & data.keys():
            data[name] = getattr(self, name).plain()
        if self.rules:
            data["rules"] = [{k: v for k, v in vars(r).items() if v != getattr(Rule, k)} for r in self.rules]
        if self.passes:
            data["passes"] = list(self.passes)
        return data

    def __str__(self) -> str:
        return "".join(_line(key, value) for key, value in self.to_dict().items()) or "{}\n"

    # ------------------------------------------------------------------ changing and checking

    def override(self, assignments: Sequence[str]) -> Recipe:
        """This recipe with some values changed, each written ``path=value`` with the value in YAML.

        ``weights.group=64`` changes one field of a spec, ``rules.0.match=lm_head`` one of a rule,
        ``calibration.samples=8`` one of the calibration, ``activations=null`` a whole value. Raises RecipeError for a
        path that does not exist, with the nearest that does.
        """
        from qcompile.recipe.override import override

        return override(self, assignments)

    def check(self) -> Recipe:
        """Read every spec and every pass, and return the recipe. Raises RecipeError naming the one that is wrong."""
        from qcompile.recipe.passes import pipeline

        pipeline(self)
        return self


def _line(key: str, value: Any) -> str:
    """One entry of a recipe as YAML, what is nested in flow style."""
    style = None if isinstance(value, (list, dict)) else False
    text = yaml.dump(
        {key: value}, Dumper=_Dumper, sort_keys=False, width=10**9, allow_unicode=True, default_flow_style=style
    )
    return str(text)


class _Dumper(yaml.SafeDumper):
    """Writes a value that occurs twice twice, with no anchor."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
