"""The built-in model as it is shipped: complete, small, and the same to us and to transformers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.training.test_tokenizer import CONVERSATIONS, TOOL
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import penstock
from penstock.config.model import load_model_config
from penstock.training.card import greedy, load_exported
from penstock.training.recipe import load_recipe
from penstock.training.tokenizer import CHAT_TEMPLATE, CONTROL_TOKENS, MARK_TOKENS, ChatRenderer

MODEL = Path(penstock.__file__).parent / "assets" / "penstock-tiny"
TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))


def test_files_and_size() -> None:
    files = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert set(files) == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= 30e6


def test_shape_is_the_recipes() -> None:
    config = load_model_config(MODEL)
    assert 10e6 <= config.num_parameters <= 15e6
    raw = json.loads((MODEL / "config.json").read_text())
    assert raw == raw | load_recipe("penstock-tiny").model
    assert config.dtype == "bfloat16"
    assert [TOKENIZER.id_to_token(n) for n in config.eos_token_ids] == ["<|im_end|>", "<|endoftext|>"]


def test_vocabulary() -> None:
    assert TOKENIZER.get_vocab_size() == 8192
    assert [TOKENIZER.id_to_token(n) for n in range(15)] == [*CONTROL_TOKENS, *MARK_TOKENS]
    assert TOKENIZER.decode(list(range(15)), skip_special_tokens=True).split() == "".join(MARK_TOKENS).split()


@given(st.text())
def test_every_string_survives(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
def test_tokenizer_and_template_are_the_same_in_transformers(tools: list | None) -> None:
    theirs = AutoTokenizer.from_pretrained(MODEL)
    assert (MODEL / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    for messages in CONVERSATIONS:
        text = ChatRenderer().prompt(messages, tools)
        assert theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True) == text
        ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        assert ids == TOKENIZER.encode(text).ids


def test_weights_give_transformers_answer() -> None:
    """Greedy tokens of our forward and of transformers' generate, both float32, on the shipped weights."""
    theirs, ours = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval(), load_exported(MODEL)
    for prompt in ("Once upon a time", ChatRenderer().prompt([{"role": "user", "content": "Hello"}])):
        ids = TOKENIZER.encode(prompt).ids
        with torch.inference_mode():
            answer = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24)[0, len(ids) :].tolist()
        while answer and answer[-1] in theirs.generation_config.eos_token_id:
            answer.pop()
        assert greedy(ours, ids, 24) == answer


@torch.inference_mode()
def test_it_learned_english() -> None:
    """A plain sentence is far more likely than the same words shuffled, and far more than by chance (ln 8192 = 9.0)."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    words = "The little girl was very happy because she found her red ball in the garden .".split()
    shuffled = random.Random(1).sample(words, len(words))

    def loss(text: str) -> float:
        ids = torch.tensor([TOKENIZER.encode(text).ids])
        return float(model(ids, labels=ids).loss)

    plain = loss(" ".join(words).replace(" .", "."))
    assert plain < 4.5
    assert plain + 1.5 < loss(" ".join(shuffled))


def test_card_has_no_gaps() -> None:
    text = (MODEL / "README.md").read_text(encoding="utf-8")
    recipe = load_recipe("penstock-tiny")
    for source in recipe.sources:
        assert f"| {source.name} | " in text
        assert source.licence in text
    assert text.count("**User:**") + text.count("**Text:**") == 20
    assert not re.search(r"\{[a-z_]+\}", text), "a field of the card was not filled in"
