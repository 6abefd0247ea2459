from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from tests.training.conftest import tiny_recipe

from penstock.training.recipe import RECIPES, RecipeError, load_recipe


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    assert load_recipe(path.stem) == load_recipe(path)


def test_digest_ignores_budgets_and_sees_everything_else() -> None:
    recipe = tiny_recipe()
    assert replace(recipe, steps=99).digest() == recipe.digest()
    assert replace(recipe, seed=6).digest() != recipe.digest()
    assert replace(recipe, sources=recipe.sources[:1]).digest() != recipe.digest()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"micro_tokens": 100}, "micro_tokens"),
        ({"minutes": 5}, "minutes"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"colour": "red"}, "colour"),
        ({"stage": [{"start": 0.5, "seq_len": 32}]}, "stage"),
        ({"source": []}, "source"),
        ({"source": [{"name": "a", "kind": "verse", "weight": 1, "licence": "", "credit": ""}]}, "kind"),
        ({"source": [{"name": "a", "kind": "story_chat", "weight": 1, "licence": "", "credit": "", "of": "b"}]}, "of"),
        ({"source": [{"name": "a"}]}, "source"),
    ],
)
def test_what_is_wrong_is_named(changes: dict, named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        tiny_recipe(**changes)


def test_unknown_recipe_names_the_shipped_ones(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="penstock-tiny"):
        load_recipe("no-such-recipe")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(broken)
