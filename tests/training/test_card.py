from __future__ import annotations

from pathlib import Path

import torch
from tests.training.conftest import tiny_recipe

from penstock.nn.doors import Batch
from penstock.training.card import card, greedy, load_exported, read_log
from penstock.training.dense import attention_for
from penstock.training.lm import train


def test_card_of_a_run(corpus_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=2)
    train(recipe, corpus_dir, tmp_path, say=lambda line: None)
    log = read_log(tmp_path)
    text = card(recipe, log, [("chat", "Hello?", "Yes.\nGo on."), ("text", "Once", "")], "one core")
    for source in recipe.sources:
        assert f"| {source.name} | {source.credit} | {source.licence} |" in text
        assert f"| {log['held_out'][source.name]:.2f} |" in text
    assert "2 steps" in text and "one core" in text
    assert "**User:** Hello?\n\n> Yes.\n> Go on.\n" in text
    assert "**Text:** Once\n\n> (nothing)" in text


def test_greedy_follows_the_forward_without_a_cache(corpus_dir: Path, tmp_path: Path) -> None:
    train(tiny_recipe(steps=8), corpus_dir, tmp_path, say=lambda line: None)
    model = load_exported(tmp_path / "model")
    prompt = [40, 41, 42, 43]
    answer = greedy(model, prompt, 12)
    assert answer
    ids = torch.tensor(prompt + answer)
    attention = attention_for(1, len(ids), torch.device("cpu"))
    with torch.inference_mode():
        best = model.logits(model(Batch(ids, torch.arange(len(ids)), attention))).argmax(-1)
    assert best[len(prompt) - 1 : -1].tolist() == answer
