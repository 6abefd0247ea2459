"""A made-up corpus and a recipe small enough to train in seconds."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.training.recipe import LmRecipe, parse_recipe

NAMES = ("Anna", "Ben", "Clara", "David", "Ella", "Finn")
THINGS = ("dog", "cat", "ball", "kite", "frog", "boat")
PLACES = ("garden", "park", "forest", "house", "lake")


def made_up_stories() -> list[str]:
    """180 short stories that differ in name, thing and place."""
    return [
        f"Once upon a time, there was a little girl named {name}. {name} had a {thing}. One day, {name} took the "
        f"{thing} to the {place}. The {thing} was lost in the {place}! {name} looked for the {thing}. "
        f"At last {name} found the {thing}. {name} was very happy."
        for name, thing, place in itertools.product(NAMES, THINGS, PLACES)
    ]


def made_up_chats() -> list[dict[str, Any]]:
    """Sixty chats, each with one tool call on the last assistant turn."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"I want a {thing} for {name}."},
                {
                    "role": "assistant",
                    "content": f"Here is a {thing}.",
                    "service_call": {"name": "BuyThing", "arguments": {"thing": thing, "name": f"{name} №{number}"}},
                },
            ]
        }
        for number, (name, thing) in enumerate(itertools.product(NAMES, THINGS))
    ]


def write_lines(path: Path, rows: list[Any]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from a second thread, and on a busy machine lose everything to it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories.jsonl.gz and chats.jsonl.gz."""
    directory = tmp_path_factory.mktemp("corpus")
    write_lines(directory / "stories.jsonl.gz", [{"text": story} for story in made_up_stories()])
    write_lines(directory / "chats.jsonl.gz", made_up_chats())
    return directory


def tiny_recipe(**changes: Any) -> LmRecipe:
    """Twelve steps of a two-layer model over the made-up corpus, in float32; `changes` replace fields."""
    raw: dict[str, Any] = {
        "name": "tiny",
        "description": "for tests",
        "seed": 5,
        "held_out_fraction": 0.1,
        "step_tokens": 256,
        "micro_tokens": 128,
        "minutes": 0,
        "steps": 12,
        "warmup_steps": 2,
        "decay_start": 0.5,
        "final_lr_factor": 0.1,
        "optimizer": "muon",
        "muon_lr": 1e-2,
        "adamw_lr": 1e-2,
        "weight_decay": 0.1,
        "grad_clip": 1.0,
        "compute_dtype": "float32",
        "compile": False,
        "eval_minutes": 60,
        "checkpoint_minutes": 60,
        "model": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 384,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
        },
        "stage": [{"start": 0.0, "seq_len": 32}, {"start": 0.5, "seq_len": 64}],
        "source": [
            {"name": "stories", "kind": "text", "weight": 1.5, "licence": "none", "credit": "made up"}
            | {"file": "stories.jsonl.gz"},
            {"name": "requests", "kind": "story_chat", "weight": 0.5, "licence": "none", "credit": "derived"}
            | {"of": "stories"},
            {"name": "chats", "kind": "chat", "weight": 1.0, "licence": "none", "credit": "made up"}
            | {"file": "chats.jsonl.gz"},
        ],
    }
    return parse_recipe(raw | changes)


@pytest.fixture
def recipe() -> LmRecipe:
    return tiny_recipe()
