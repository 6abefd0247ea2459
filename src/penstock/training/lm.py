"""Train a language model from a recipe and a corpus: `penstock train lm RECIPE --corpus DIR --out DIR`.

Knows recipe, corpus, model and optimiser, and the files of a run; knows no engine and no server.

A run directory holds tokenizer.json (trained once), checkpoint.pt (replaced atomically), log.jsonl and, at the end,
model/ in Hugging Face layout. A run that is started again goes on where its last checkpoint stands. With a budget of
steps, a run that was interrupted ends bit-equal (E0) to one that was not, on the same machine and number of threads;
with a budget of minutes the schedule follows the training time spent, so its length in steps depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from penstock.config.model import parse_model_config
from penstock.nn.allocator import keep_freed_memory
from penstock.nn.doors import Batch
from penstock.nn.models import build_model
from penstock.nn.models.llama import LlamaModel
from penstock.training.corpus import CorpusError, Document, load_documents, vocabulary_texts
from penstock.training.dense import DenseCausalAttention, attention_for, next_token_loss
from penstock.training.export import export_model
from penstock.training.optimizer import MasterOptimizer
from penstock.training.packing import RowStream, TokenSource, encode_documents, evaluation_sources, held_out_rows
from penstock.training.recipe import LmRecipe, RecipeError, load_recipe
from penstock.training.tokenizer import train_tokenizer

LOG_PERIOD_S = 15.0


class TrainingError(RuntimeError):
    """The run cannot start or go on: another recipe's checkpoint, or a loss that is not finite."""


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a run came to. Losses in nats per token; `held_out` by source."""

    steps: int
    tokens: int
    train_s: float
    loss: float
    held_out: dict[str, float]
    model_dir: Path


def train(
    recipe: LmRecipe,
    corpus_dir: Path,
    out_dir: Path,
    *,
    device: str = "cpu",
    resume: bool = True,
    stop_after_steps: int = 0,
    say: Callable[[str], None] = print,
) -> TrainReport:
    """Run the recipe to its end, from the checkpoint in `out_dir` if `resume` and there is one.

    stop_after_steps: leave after a checkpoint at that step, as if interrupted; 0: never.
    Raises CorpusError, RecipeError, TrainingError.
    """
    keep_freed_memory()
    out_dir.mkdir(parents=True, exist_ok=True)
    say(f"{recipe.name}: reading {corpus_dir}")
    documents = load_documents(recipe, corpus_dir, out_dir / "cache", say)
    tokenizer = _tokenizer(recipe, documents, out_dir, say)
    run = _Run(recipe, documents, tokenizer, out_dir, torch.device(device), say)
    if resume:
        run.load()
    return run.to_the_end(stop_after_steps)


def lr_factor(recipe: LmRecipe, step: int, progress: float) -> float:
    """Warm-up by steps, then constant, then linear to `final_lr_factor` from `decay_start` of the run on."""
    warm = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    if progress <= recipe.decay_start:
        return warm
    left = (1.0 - min(progress, 1.0)) / (1.0 - recipe.decay_start)
    return warm * (recipe.final_lr_factor + (1.0 - recipe.final_lr_factor) * left)


def seq_len_at(recipe: LmRecipe, progress: float) -> int:
    """Row length of the stage that `progress` (fraction of the run) lies in."""
    return [s.seq_len for s in recipe.stages if s.start <= progress][-1]


def initialise(model: LlamaModel, recipe: LmRecipe) -> None:
    """Normal weights of `initializer_range`, biases zero, norms as they are.

    What adds to the residual is smaller by sqrt(2 * num_layers), as in GPT-2.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    std = float(recipe.model.get("initializer_range", 0.02))
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
            scale = std / math.sqrt(2 * model.config.num_layers) if residual else std
            with torch.no_grad():
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))


def _tokenizer(
    recipe: LmRecipe, documents: dict[str, list[Document]], out_dir: Path, say: Callable[[str], None]
) -> Tokenizer:
    """The run's tokenizer; trained on first use, then kept, because the checkpoint depends on it."""
    path = out_dir / "tokenizer.json"
    if not path.is_file():
        started = time.perf_counter()
        try:
            trained = train_tokenizer(vocabulary_texts(recipe, documents), recipe.vocab_size)
        except ValueError as error:
            raise CorpusError(f"{recipe.name}: {error}") from None
        trained.save(str(path))
        say(f"tokenizer: {recipe.vocab_size:,} tokens in {time.perf_counter() - started:.0f} s")
    return Tokenizer.from_file(str(path))


class _Run:
    """One training run in memory. Position (`step`, `tokens`, `train_s`, stream) changes only in `_train_step`."""

    def __init__(
        self,
        recipe: LmRecipe,
        documents: dict[str, list[Document]],
        tokenizer: Tokenizer,
        out_dir: Path,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.tokenizer, self.out_dir, self.device, self.say = recipe, tokenizer, out_dir, device, say
        sources = [
            encode_documents(s.name, documents[s.name], tokenizer, s.weight, False, s.until) for s in recipe.sources
        ]
        self.stream = RowStream(sources, recipe.seed)
        self.held_out: list[TokenSource] = evaluation_sources(recipe, documents, tokenizer)
        self._log_sources(sources, documents)
        model = build_model(parse_model_config(recipe.model))
        initialise(model, recipe)
        model.to(device)
        self.optimizer = MasterOptimizer(model, recipe)
        dtype = getattr(torch, recipe.compute_dtype)
        for parameter in model.parameters():  # the rotary tables stay float32
            parameter.data = parameter.data.to(dtype)
        self.model = model
        self._forward = self._compiled()
        self.step, self.tokens, self.train_s = 0, 0, 0.0

    def _eager(self, ids: torch.Tensor, positions: torch.Tensor, attention: DenseCausalAttention) -> torch.Tensor:
        hidden: torch.Tensor = self.model(Batch(ids, positions, attention))
        return hidden

    def _compiled(self) -> Callable[..., torch.Tensor]:
        if not self.recipe.compile:
            return self._eager
        if self.device.type == "cpu" and shutil.which("g++") is None:
            self.say("no g++ found: training without torch.compile, about a third slower")
            return self._eager
        return torch.compile(self._eager, dynamic=False)

    def _log_sources(self, sources: list[TokenSource], documents: dict[str, list[Document]]) -> None:
        total = sum(len(s.ids) * s.weight for s in sources)
        facts = []
        for source in sources:
            held = [h for h in self.held_out if h.name == source.name]
            share = len(source.ids) * source.weight / total
            facts.append(
                {
                    "name": source.name,
                    "documents": len(documents[source.name]),
                    "train_tokens": len(source.ids),
                    "held_out_tokens": len(held[0].ids) if held else 0,
                    "weight": source.weight,
                    "share": round(share, 4),
                }
            )
            self.say(f"  {source.name:26s} {len(source.ids):>10,} tokens x {source.weight:<5g} = {share:6.1%} of mix")
        self.say(f"  one epoch of the mix: {total / 1e6:.2f} M tokens")
        self._log({"event": "sources", "sources": facts, "epoch_tokens": int(total)})

    @property
    def progress(self) -> float:
        """Fraction of the budget that is spent, in [0, 1]."""
        if self.recipe.steps:
            return min(1.0, self.step / self.recipe.steps)
        return min(1.0, self.train_s / (60.0 * self.recipe.minutes))

    def to_the_end(self, stop_after_steps: int) -> TrainReport:
        loss, mean = math.nan, math.nan
        self._last_tokens, self._last_s = self.tokens, self.train_s
        said_at = checkpoint_at = eval_at = self.train_s
        while self.progress < 1.0:
            loss = self._train_step()
            mean = loss if math.isnan(mean) else 0.95 * mean + 0.05 * loss
            if self.train_s - said_at >= LOG_PERIOD_S or self.step == 1:
                self._report_progress(mean)
                said_at = self.train_s
            if self.train_s - eval_at >= 60 * self.recipe.eval_minutes:
                self._report_held_out(self.evaluate(max_rows=6))
                eval_at = self.train_s
            stopping = self.step == stop_after_steps
            if self.train_s - checkpoint_at >= 60 * self.recipe.checkpoint_minutes or stopping:
                self.save()
                checkpoint_at = self.train_s
            if stopping:
                return TrainReport(self.step, self.tokens, self.train_s, mean, {}, self.out_dir)
        self.save()
        held_out = self.evaluate(max_rows=64)
        self._report_held_out(held_out)
        model_dir = self.out_dir / "model"
        export_model(self.recipe, self.optimizer.weights(), self.tokenizer, model_dir)
        minutes = self.train_s / 60
        self.say(f"done: {self.step:,} steps, {self.tokens:,} tokens, {minutes:.1f} min; model in {model_dir}")
        return TrainReport(self.step, self.tokens, self.train_s, mean, held_out, model_dir)

    def _train_step(self) -> float:
        """One optimiser step; the loss before it."""
        started = time.perf_counter()
        progress = self.progress
        seq_len = seq_len_at(self.recipe, progress)
        micro_steps = self.recipe.step_tokens // self.recipe.micro_tokens
        total = torch.zeros((), device=self.device)
        for _ in range(micro_steps):
            ids, targets = self.stream.rows(self.recipe.micro_tokens // seq_len, seq_len, progress)
            loss = self._loss(self._forward, torch.from_numpy(ids), torch.from_numpy(targets)) / micro_steps
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        value = float(total)
        if not math.isfinite(value):
            raise TrainingError(f"the loss is {value} at step {self.step}: lower the learning rates and start again")
        self.optimizer.step(lr_factor(self.recipe, self.step, progress))
        self.step += 1
        self.tokens += self.recipe.step_tokens
        self.train_s += time.perf_counter() - started
        return value

    def _loss(self, forward: Callable[..., torch.Tensor], ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean loss of rows. ids and targets: int64 [B, S]."""
        rows, seq_len = ids.shape
        positions = torch.arange(seq_len, device=self.device).repeat(rows)
        attention = attention_for(rows, seq_len, self.device)
        hidden = forward(ids.reshape(-1).to(self.device), positions, attention)
        return next_token_loss(hidden, self.model.head.weight, targets.reshape(-1).to(self.device))

    @torch.no_grad()
    def evaluate(self, max_rows: int) -> dict[str, float]:
        """Held-out loss in nats per token of every source, on rows of the longest stage up to 512."""
        seq_len = min(512, max(s.seq_len for s in self.recipe.stages))
        found = {}
        for source in self.held_out:
            ids, targets = (torch.from_numpy(a) for a in held_out_rows(source, seq_len, max_rows))
            total, count = 0.0, 0
            for row_ids, row_targets in zip(ids, targets, strict=True):
                learned = int((row_targets >= 0).sum())
                if learned:
                    total += float(self._loss(self._eager, row_ids[None], row_targets[None])) * learned
                    count += learned
            found[source.name] = total / max(count, 1)
        return found

    def _report_progress(self, loss: float) -> None:
        speed = (self.tokens - self._last_tokens) / max(self.train_s - self._last_s, 1e-9)
        self._last_tokens, self._last_s = self.tokens, self.train_s
        progress = self.progress
        eta_min = self.train_s / 60 * (1 - progress) / max(progress, 1e-9)
        self.say(
            f"{progress:6.1%}  step {self.step:,}  tokens {self.tokens / 1e6:.2f} M  loss {loss:.3f}  "
            f"{speed:,.0f} tokens/s  row {seq_len_at(self.recipe, progress)}  eta {eta_min:.0f} min"
        )
        self._log(
            {
                "event": "step",
                "step": self.step,
                "tokens": self.tokens,
                "train_s": round(self.train_s, 1),
                "loss": round(loss, 4),
                "tokens_per_s": round(speed),
            }
        )

    def _report_held_out(self, losses: dict[str, float]) -> None:
        self.say("held-out loss: " + "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
        self._log({"event": "held_out", "step": self.step, "tokens": self.tokens, "train_s": self.train_s, **losses})

    def _log(self, row: dict[str, Any]) -> None:
        with (self.out_dir / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Replace the checkpoint: masters, optimiser, data position, clock."""
        state = {
            "digest": self.recipe.digest(),
            "step": self.step,
            "tokens": self.tokens,
            "train_s": self.train_s,
            "stream": self.stream.state(),
            "optimizer": self.optimizer.state(),
        }
        fresh = self.out_dir / "checkpoint.pt.part"
        torch.save(state, fresh)
        fresh.replace(self.out_dir / "checkpoint.pt")

    def load(self) -> None:
        """Go on from the checkpoint, if there is one. Raises TrainingError if it is another recipe's."""
        path = self.out_dir / "checkpoint.pt"
        if not path.is_file():
            return
        state = read_checkpoint(path, self.recipe)
        self.step, self.tokens, self.train_s = state["step"], state["tokens"], state["train_s"]
        self.stream.restore(state["stream"])
        self.optimizer.restore(state["optimizer"])
        self.say(f"going on from step {self.step:,} ({self.tokens:,} tokens, {self.train_s / 60:.1f} min)")


def read_checkpoint(path: Path, recipe: LmRecipe) -> dict[str, Any]:
    """A checkpoint of this recipe. Raises TrainingError if it belongs to another one."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["digest"] != recipe.digest():
        raise TrainingError(f"{path} was written by another recipe; give another --out or delete it")
    return state


def export_checkpoint(recipe: LmRecipe, out_dir: Path, directory: Path) -> None:
    """Write the model of a run's last checkpoint, finished or not. Raises TrainingError if there is none."""
    path = out_dir / "checkpoint.pt"
    if not path.is_file():
        raise TrainingError(f"{path} does not exist: nothing to export yet")
    weights = read_checkpoint(path, recipe)["optimizer"]["masters"]
    export_model(recipe, weights, Tokenizer.from_file(str(out_dir / "tokenizer.json")), directory)


def run_train_lm(
    recipe: str | Path,
    corpus_dir: str | Path,
    out_dir: str | Path,
    *,
    device: str = "cpu",
    minutes: float | None = None,
    steps: int | None = None,
    resume: bool = True,
    say: Callable[[str], None] = print,
) -> TrainReport:
    """The command: a shipped recipe's name or a TOML file, with its budget replaced if one is given."""
    loaded = load_recipe(recipe)
    if minutes is not None and steps is not None:
        raise RecipeError("give minutes or steps, not both")
    if minutes is not None:
        loaded = replace(loaded, minutes=minutes, steps=0)
    if steps is not None:
        loaded = replace(loaded, minutes=0.0, steps=steps)
    return train(loaded, Path(corpus_dir), Path(out_dir), device=device, resume=resume, say=say)


def main(argv: list[str] | None = None) -> int:
    """`python -m penstock.training.lm RECIPE --corpus DIR --out DIR`; exit status 0, or 2 with one line of reason."""
    parser = argparse.ArgumentParser(prog="penstock train lm", description="Train a small language model.")
    parser.add_argument("recipe", help="name of a shipped recipe (penstock-tiny) or a TOML file")
    parser.add_argument("--corpus", default="", help="directory of the corpus files the recipe names")
    parser.add_argument("--out", required=True, help="directory of the run: checkpoint, log, model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, help="training time instead of the recipe's budget")
    parser.add_argument("--steps", type=int, help="optimiser steps instead of the recipe's budget")
    parser.add_argument("--no-resume", action="store_true", help="start anew although --out holds a checkpoint")
    parser.add_argument("--export", help="write the model of the last checkpoint to this directory, and leave")
    args = parser.parse_args(argv)
    try:
        if args.export:
            export_checkpoint(load_recipe(args.recipe), Path(args.out), Path(args.export))
            return 0
        run_train_lm(
            args.recipe,
            args.corpus,
            args.out,
            device=args.device,
            minutes=args.minutes,
            steps=args.steps,
            resume=not args.no_resume,
            say=lambda line: print(line, flush=True),
        )
    except (CorpusError, RecipeError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
