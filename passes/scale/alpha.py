"""How strongly `smooth` moves the range of each product's input into its weight, by rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict
from torch import fx

from qcompile.errors import RecipeError
from qcompile.ir.contractions import Contraction, Role, find_contractions, roles
from qcompile.ir.program import Program
from qcompile.recipe.model import Rule
from qcompile.recipe.select import decide, places


@dataclass(frozen=True)
class AlphaRule:
    """α of the products it selects, by the selectors of a recipe's rules; the first rule that matches decides.

    `alpha`: from 0 to 1, or null for products that have no say: those that stay float, say.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    alpha: float | None
    match: str | None = None
    operator: str | None = None
    layers: str | int | None = None
    role: Role | None = None
    optional: bool = False

    @property
    def selector(self) -> Rule:
        """What it selects, as a rule of a recipe. ValueError where it has no selector."""
        return Rule(self.match, self.operator, self.layers, self.role, weights=None, optional=self.optional)


@dataclass(frozen=True)
class Alphas:
    """α of every product, and why those that have none have none."""

    of: dict[fx.Node, float]
    reasons: dict[fx.Node, str]


def choose_alphas(program: Program, alpha: float, rules: Sequence[AlphaRule], counted: Sequence[Role]) -> Alphas:
    """α of each product: its rule's; `alpha` for products of the `counted` roles.

    Raises RecipeError for an α outside 0 … 1, and for a rule without a selector or that decides nowhere.
    """
    for value in (alpha, *(rule.alpha for rule in rules)):
        if value is not None and not 0 <= value <= 1:
            raise RecipeError(f"pass 'smooth': alpha {value:g} is no share; give one from 0 to 1")
    try:
        selectors = [rule.selector for rule in rules]
    except ValueError as error:
        raise RecipeError(f"pass 'smooth': {error}") from None
    products = find_contractions(program)
    kinds = roles(program, products)
    chosen = decide(selectors, places(program, products, kinds))
    found = Alphas({}, {})
    for product, index in zip(products, chosen, strict=True):
        node = product.node
        value = alpha if index is None else rules[index].alpha
        if index is None and kinds[node] not in counted:
            found.reasons[node] = f"it is a {kinds[node]}, which is not among roles"
        elif value is None:
            found.reasons[node] = f"rules.{index} says alpha: null"
        else:
            found.of[node] = value
    return found


def common_alpha(alphas: Alphas, products: Sequence[Contraction]) -> float | None:
    """The α of products that read the same channels; None where none of them has a say.

    Raises RecipeError where rules give them several.
    """
    given = {c.node.name: alphas.of[c.node] for c in products if c.node in alphas.of}
    values = sorted(set(given.values()))
    if len(values) > 1:
        names = ", ".join(f"{name} {value:g}" for name, value in given.items())
        raise RecipeError(f"pass 'smooth': rules give readers of the same channels several alphas ({names}); give one")
    return values[0] if values else None
