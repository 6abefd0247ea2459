"""The model card of a trained model: data, recipe, losses, and what it answers to fixed prompts.

`python -m penstock.training.card RECIPE --run DIR --model DIR --where "2 CPU cores"` reads a run's log and an exported
model and writes README.md beside the weights. Knows no engine: answers are drawn with the plainest of caches.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from penstock.config.model import ModelConfig, load_model_config
from penstock.nn.doors import Batch
from penstock.nn.models import build_model
from penstock.nn.models.llama import LlamaModel, routes
from penstock.training.lockstep import LockstepCache
from penstock.training.recipe import LmRecipe, load_recipe
from penstock.training.tokenizer import ChatRenderer

CHAT_PROMPTS = (
    "Hello!",
    "What is your name?",
    "What can you do?",
    "How are you today?",
    "Tell me a story.",
    "Tell me a story about a dog.",
    "Write a short story about a little bird and a tree.",
    "Continue this story: Once upon a time, there was a small boat.",
    "What is the capital of France?",
    "What color is the sky?",
    "Do you like music?",
    "I want to book a table for two at a restaurant.",
    "Tom has 3 apples. He buys 2 more. How many apples does he have?",
    "How do I use the `ls` command?",
)
TEXT_PROMPTS = (
    "Once upon a time",
    "One day, a little girl named Lily",
    "The old man looked at the sea and",
    "There was a big bear in the forest. The bear",
    'Tom said, "I want to',
    "The princess lived in a castle. She",
)
MAX_NEW_TOKENS = 160


def load_exported(directory: Path) -> LlamaModel:
    """A model directory of one safetensors file, in float32."""
    config = load_model_config(directory)
    model = build_model(config)
    stored, state = load_file(directory / "model.safetensors"), dict(model.state_dict())
    with torch.no_grad():
        for route in routes(config):
            if route.source in stored:
                target = state[route.target]
                rows = slice(None) if route.rows is None else slice(*route.rows)
                target[rows].copy_(stored[route.source])
    return model


@torch.inference_mode()
def greedy(model: LlamaModel, prompt_ids: list[int], max_new_tokens: int) -> list[int]:
    """The most probable continuation, token by token, up to and without an end token. float32."""
    config: ModelConfig = model.config
    token_ids, cache = list(prompt_ids), LockstepCache(config, 1, len(prompt_ids) + max_new_tokens)
    for position in range(len(prompt_ids) + max_new_tokens - 1):
        cache.position = position
        hidden = model(Batch(torch.tensor([token_ids[position]]), torch.tensor([position]), cache))
        if position + 1 == len(token_ids):
            best = int(model.logits(hidden).argmax())
            if best in config.eos_token_ids:
                break
            token_ids.append(best)
    return token_ids[len(prompt_ids) :]


def answers(directory: Path) -> list[tuple[str, str, str]]:
    """(kind, prompt, greedy answer) of the fixed prompts; "..." marks an answer cut at MAX_NEW_TOKENS."""
    model, tokenizer = load_exported(directory), Tokenizer.from_file(str(directory / "tokenizer.json"))
    renderer = ChatRenderer((directory / "chat_template.jinja").read_text(encoding="utf-8"))
    found = []
    for kind, prompts in (("chat", CHAT_PROMPTS), ("text", TEXT_PROMPTS)):
        for prompt in prompts:
            text = renderer.prompt([{"role": "user", "content": prompt}]) if kind == "chat" else prompt
            ids = greedy(model, tokenizer.encode(text).ids, MAX_NEW_TOKENS)
            answer = tokenizer.decode(ids) + (" ..." if len(ids) == MAX_NEW_TOKENS else "")
            found.append((kind, prompt, answer))
    return found


def read_log(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The last row of each event of a run's log."""
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["event"]: row for row in rows}


def card(recipe: LmRecipe, log: dict[str, dict[str, Any]], found: list[tuple[str, str, str]], where: str) -> str:
    """The card as Markdown. Raises KeyError when the run has not ended."""
    held_out, sources = log["held_out"], {s["name"]: s for s in log["sources"]["sources"]}
    model = recipe.model
    rows = []
    for source in recipe.sources:
        facts = sources[source.name]
        loss = held_out.get(source.name)
        until = "" if source.until == 1.0 else f" (first {source.until:.0%} of the run)"
        rows.append(
            f"| {source.name} | {source.credit} | {source.licence} | {facts['train_tokens']:,} "
            f"| {facts['share']:.1%}{until} | {'-' if loss is None else f'{loss:.2f}'} |"
        )
    examples = []
    for kind, prompt, answer in found:
        label = "User" if kind == "chat" else "Text"
        quoted = "\n".join(f"> {line}".rstrip() for line in answer.strip().splitlines()) or "> (nothing)"
        examples.append(f"**{label}:** {prompt}\n\n{quoted}\n")
    return CARD.format(
        name=recipe.name,
        hidden=model["hidden_size"],
        layers=model["num_hidden_layers"],
        heads=model["num_attention_heads"],
        kv_heads=model["num_key_value_heads"],
        head_dim=model["head_dim"],
        intermediate=model["intermediate_size"],
        vocab=f"{model['vocab_size']:,}",
        context=f"{model['max_position_embeddings']:,}",
        longest=f"{max(s.seq_len for s in recipe.stages):,}",
        longest_start=f"{recipe.stages[-1].start:.0%}",
        tokens=f"{held_out['tokens'] / 1e6:.2f}",
        steps=f"{held_out['step']:,}",
        step_tokens=f"{recipe.step_tokens:,}",
        minutes=f"{held_out['train_s'] / 60:.0f}",
        where=where,
        epochs=f"{held_out['tokens'] / log['sources']['epoch_tokens']:.2f}",
        held_out=f"{recipe.held_out_fraction:.0%}",
        optimizer={"muon": "Muon (hidden matrices) and AdamW (embedding, norms)", "adamw": "AdamW"}[recipe.optimizer],
        rates=f"{recipe.muon_lr:g} and {recipe.adamw_lr:g}" if recipe.optimizer == "muon" else f"{recipe.adamw_lr:g}",
        decay=f"{recipe.decay_start:.0%}",
        sources="\n".join(rows),
        examples="\n".join(examples),
    )


CARD = (Path(__file__).parent / "recipes" / "card.md").read_text(encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write README.md into the model directory; exit status 0."""
    parser = argparse.ArgumentParser(prog="penstock.training.card", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--run", type=Path, required=True, help="directory of the finished run")
    parser.add_argument("--model", type=Path, required=True, help="exported model directory, gets README.md")
    parser.add_argument("--where", required=True, help="the machine, in words, for the card")
    args = parser.parse_args(argv)
    text = card(load_recipe(args.recipe), read_log(args.run), answers(args.model), args.where)
    (args.model / "README.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
