"""A training recipe: one TOML file that says data mix, shapes, optimiser and schedule.

Knows only how to read and check the file; opens no corpus and builds no model.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """The recipe file is missing, malformed or contradicts itself."""


@dataclass(frozen=True, slots=True)
class Source:
    """One source of documents.

    kind: "text" (JSON lines with `text`), "plain" (one gzip text file), "chat" (JSON lines with `messages`),
    "pairs" (question and answer lists beside the recipe), "sampled" (stories drawn from a llama2.c checkpoint) or
    "story_chat" (requests and answers derived by template from the stories of source `of`).
    weight: passes over the source in one epoch of the mix; fractions take a part of the documents, another each epoch.
    """

    name: str
    kind: str
    weight: float
    licence: str
    credit: str
    file: str = ""  # relative to the corpus directory; for "pairs" to the recipe
    of: str = ""  # "story_chat": the source of the stories
    until: float = 1.0  # fraction of the run from which on the source is left out
    max_documents: int = 0  # 0: all; for "sampled" how many to draw
    section_chars: int = 0  # longer texts are cut at paragraphs into sections of about this length; 0: never
    vocab_share: float = 1.0  # part of the documents that the tokenizer is trained on

    KINDS = ("text", "plain", "chat", "pairs", "sampled", "story_chat")


@dataclass(frozen=True, slots=True)
class Stage:
    """From `start` (fraction of the run, in [0, 1)) on, rows are `seq_len` tokens long."""

    start: float
    seq_len: int


@dataclass(frozen=True, slots=True)
class LmRecipe:
    """Everything that decides a training run besides the corpus. Tokens are positions with a target."""

    name: str
    description: str
    seed: int
    model: dict[str, Any]  # config.json fields, without token ids
    sources: tuple[Source, ...]
    stages: tuple[Stage, ...]
    held_out_fraction: float
    step_tokens: int  # tokens per optimiser step
    micro_tokens: int  # tokens per forward; divides step_tokens
    minutes: float  # budget of training time; 0: `steps` decides
    steps: int  # budget of steps; 0: `minutes` decides
    warmup_steps: int
    decay_start: float  # fraction of the run from which the learning rate falls linearly
    final_lr_factor: float
    optimizer: str  # "muon" (2D hidden matrices; the rest AdamW) or "adamw"
    muon_lr: float
    adamw_lr: float
    weight_decay: float
    betas: tuple[float, float]
    grad_clip: float
    compute_dtype: str  # "bfloat16" or "float32"; master weights and optimiser state are always float32
    compile: bool  # torch.compile, where a C++ compiler is found
    eval_minutes: float  # between two held-out evaluations
    checkpoint_minutes: float

    @property
    def vocab_size(self) -> int:
        return int(self.model["vocab_size"])

    def digest(self) -> str:
        """Identity of what may not change between a checkpoint and its resumption: all but budgets and periods."""
        kept = asdict(self)
        for name in ("minutes", "steps", "eval_minutes", "checkpoint_minutes", "compile", "description"):
            kept.pop(name)
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def find_recipe(name_or_path: str | Path) -> Path:
    """A path as given, or the file of a recipe that ships with the package. Raises RecipeError."""
    path = Path(name_or_path)
    for candidate in (path, RECIPES / f"{name_or_path}.toml"):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
    raise RecipeError(f"no recipe {str(name_or_path)!r}: give a TOML file or one of the shipped recipes ({shipped})")


def load_recipe(name_or_path: str | Path) -> LmRecipe:
    """Read and check one recipe. Raises RecipeError with the field that is wrong."""
    path = find_recipe(name_or_path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], origin: str = "recipe") -> LmRecipe:
    """Build a recipe from plain data. Raises RecipeError naming an unknown, missing or impossible field."""
    raw = dict(raw)
    raw["sources"] = tuple(_fill(Source, item, f"{origin}: source") for item in raw.pop("source", []))
    raw["stages"] = tuple(_fill(Stage, item, f"{origin}: stage") for item in raw.pop("stage", []))
    raw["betas"] = tuple(raw.get("betas", (0.9, 0.95)))
    recipe = _fill(LmRecipe, raw, origin)
    _check(recipe, origin)
    return recipe


def _fill(kind: type, raw: dict[str, Any], origin: str) -> Any:
    known = {f.name for f in fields(kind)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise RecipeError(f"{origin}: unknown field {', '.join(unknown)}")
    try:
        return kind(**raw)
    except TypeError as error:
        raise RecipeError(f"{origin}: {str(error).replace('__init__()', 'recipe')}") from None


def _check(recipe: LmRecipe, origin: str) -> None:
    names = [s.name for s in recipe.sources]
    rules = [
        (bool(recipe.sources), "needs at least one [[source]]"),
        (len(set(names)) == len(names), "source names must differ"),
        (bool(recipe.stages) and recipe.stages[0].start == 0.0, "the first [[stage]] must start at 0.0"),
        (recipe.step_tokens % recipe.micro_tokens == 0, "micro_tokens must divide step_tokens"),
        (all(recipe.micro_tokens % s.seq_len == 0 for s in recipe.stages), "seq_len must divide micro_tokens"),
        ((recipe.minutes > 0) != (recipe.steps > 0), "give either minutes or steps, the other 0"),
        (recipe.optimizer in ("muon", "adamw"), "optimizer must be muon or adamw"),
        (recipe.compute_dtype in ("bfloat16", "float32"), "compute_dtype must be bfloat16 or float32"),
        (0 <= recipe.held_out_fraction < 1, "held_out_fraction must be in [0, 1)"),
        (0 < recipe.decay_start <= 1, "decay_start must be in (0, 1]"),
    ]
    for source in recipe.sources:
        rules.append((source.kind in Source.KINDS, f"source {source.name}: kind must be one of {Source.KINDS}"))
        rules.append((source.kind != "story_chat" or source.of in names, f"source {source.name}: of = {source.of!r}?"))
    for holds, message in rules:
        if not holds:
            raise RecipeError(f"{origin}: {message}")
