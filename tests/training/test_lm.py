from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.training.conftest import tiny_recipe
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.config.model import load_model_config
from penstock.nn.doors import Batch
from penstock.nn.models import build_model
from penstock.training.dense import attention_for
from penstock.training.lm import (
    TrainingError,
    export_checkpoint,
    lr_factor,
    main,
    run_train_lm,
    seq_len_at,
    train,
)
from penstock.training.recipe import LmRecipe, RecipeError


def quiet(line: str) -> None:
    pass


def masters(out_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(out_dir / "checkpoint.pt", weights_only=True)["optimizer"]["masters"]


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_loss_falls(optimizer: str, compute_dtype: str, corpus_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(optimizer=optimizer, compute_dtype=compute_dtype, steps=40, step_tokens=512)
    report = train(recipe, corpus_dir, tmp_path, say=quiet)
    assert (report.steps, report.tokens) == (40, 40 * 512)
    assert set(report.held_out) == {"stories", "requests", "chats"}
    assert report.held_out["stories"] < 0.6 * 5.95  # ln 384 = 5.95: the loss of a model that knows nothing


def test_resumed_run_is_bit_equal(recipe: LmRecipe, corpus_dir: Path, tmp_path: Path) -> None:
    """Interrupted twice, in both stages: the same weights and moments as in one go."""
    train(recipe, corpus_dir, tmp_path / "whole", say=quiet)
    for stop in (5, 9, 0):
        train(recipe, corpus_dir, tmp_path / "parts", stop_after_steps=stop, say=quiet)
    whole, parts = masters(tmp_path / "whole"), masters(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    files = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in ("whole", "parts")]
    assert files[0] == files[1]


def test_seed_changes_the_run(recipe: LmRecipe, corpus_dir: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        train(replace(recipe, seed=seed, steps=1), corpus_dir, tmp_path / str(seed), say=quiet)
    assert not torch.equal(masters(tmp_path / "1")["embed.weight"], masters(tmp_path / "2")["embed.weight"])


def test_export_has_the_logits_of_the_trained_weights_in_transformers(
    recipe: LmRecipe, corpus_dir: Path, tmp_path: Path
) -> None:
    """Our forward on the masters rounded to bfloat16 against transformers on the exported directory; both float32."""
    train(recipe, corpus_dir, tmp_path, say=quiet)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    config = load_model_config(tmp_path / "model")
    assert config.eos_token_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"), 0)
    ours = build_model(config)
    ours.load_state_dict({n: t.bfloat16().float() for n, t in masters(tmp_path).items()}, strict=False)
    chat = [{"role": "user", "content": "Tell me a story about Anna."}]
    ids = torch.tensor(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    with torch.inference_mode():
        wanted = theirs(ids[None]).logits[0]
        hidden = ours(Batch(ids, torch.arange(len(ids)), attention_for(1, len(ids), torch.device("cpu"))))
        got = ours.logits(hidden)
    assert ((got - wanted).norm() / wanted.norm()).item() < 1e-5
    assert sum(p.numel() for p in theirs.parameters()) == config.num_parameters


def test_unfinished_run_can_be_exported(recipe: LmRecipe, corpus_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to export"):
        export_checkpoint(recipe, tmp_path, tmp_path / "model")
    train(recipe, corpus_dir, tmp_path, stop_after_steps=3, say=quiet)
    export_checkpoint(recipe, tmp_path, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    loaded = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert loaded.get_vocab_size() == recipe.vocab_size


def test_another_recipe_does_not_take_over_a_run(recipe: LmRecipe, corpus_dir: Path, tmp_path: Path) -> None:
    train(recipe, corpus_dir, tmp_path, stop_after_steps=1, say=quiet)
    other = replace(recipe, adamw_lr=1.0)
    with pytest.raises(TrainingError, match="another recipe"):
        train(other, corpus_dir, tmp_path, say=quiet)
    train(other, corpus_dir, tmp_path, resume=False, stop_after_steps=1, say=quiet)


def test_a_run_that_diverges_says_so(recipe: LmRecipe, corpus_dir: Path, tmp_path: Path) -> None:
    wild = replace(recipe, adamw_lr=1e30, warmup_steps=0)
    with pytest.raises(TrainingError, match="loss is"):
        train(wild, corpus_dir, tmp_path, say=quiet)


def test_minutes_end_the_run_by_time(corpus_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(minutes=0.02, steps=0)
    report = train(recipe, corpus_dir, tmp_path, say=quiet)
    assert 1.2 <= report.train_s < 10


def test_schedule() -> None:
    recipe = tiny_recipe(warmup_steps=10, decay_start=0.4, final_lr_factor=0.1)
    assert lr_factor(recipe, 0, 0.0) == pytest.approx(0.1)
    assert lr_factor(recipe, 9, 0.1) == lr_factor(recipe, 500, 0.4) == 1.0
    assert lr_factor(recipe, 500, 0.7) == pytest.approx(0.55)
    assert lr_factor(recipe, 500, 1.0) == pytest.approx(0.1)
    assert [seq_len_at(recipe, p) for p in (0.0, 0.49, 0.5, 1.0)] == [32, 32, 64, 64]


def test_command(corpus_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command on a TOML file; wrong input ends with status 2 and one line that names it."""
    from tests.training.conftest import tiny_recipe

    path = tmp_path / "tiny.toml"
    path.write_text(_toml(tiny_recipe()), encoding="utf-8")
    out = tmp_path / "run"
    assert main([str(path), "--corpus", str(corpus_dir), "--out", str(out), "--steps", "2", "--device", "cpu"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert events[0] == "sources" and "step" in events and events[-1] == "held_out"
    assert main([str(path), "--out", str(out), "--export", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model/model.safetensors").read_bytes()
    assert main(["nothing", "--corpus", str(corpus_dir), "--out", str(out)]) == 2
    assert main([str(path), "--corpus", str(tmp_path), "--out", str(tmp_path / "new")]) == 2
    assert "stories.jsonl.gz" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="not both"):
        run_train_lm(path, corpus_dir, out, minutes=1, steps=1)


def _toml(recipe: LmRecipe) -> str:
    """The recipe as the TOML that `load_recipe` reads; every value's JSON form is valid TOML here."""
    lines, tables = [], []
    for name in recipe.__slots__:
        value = getattr(recipe, name)
        if name == "model":
            tables.append("[model]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in value.items()))
        elif name in ("sources", "stages"):
            for item in value:
                rows = [f"{field} = {json.dumps(getattr(item, field))}" for field in item.__slots__]
                tables.append(f"[[{name[:-1]}]]\n" + "\n".join(rows))
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return "\n".join(lines + tables) + "\n"
