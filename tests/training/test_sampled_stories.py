from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from penstock.nn.doors import Batch
from penstock.training.lockstep import LockstepCache
from penstock.training.sampled_stories import read_llama2c, read_llama2c_pieces, sample_stories

SHAPE = (32, 48, 2, 4, 2, 300, 96)  # dim, hidden, layers, heads, kv heads, vocabulary, positions


@pytest.fixture
def made_up(tmp_path: Path) -> tuple[Path, Path]:
    """A random llama2.c checkpoint of 300 tokens, and a tokenizer whose pieces are letters, spaces and raw bytes."""
    dim, hidden, layers, heads, kv_heads, vocab, _ = SHAPE
    kv = dim // heads * kv_heads
    count = vocab * dim + layers * (2 * dim + 2 * dim * dim + 2 * kv * dim + 3 * hidden * dim) + dim
    weights = torch.randn(count, generator=torch.Generator().manual_seed(3)) * 0.3
    checkpoint, tokenizer = tmp_path / "model.bin", tmp_path / "tok512.bin"
    checkpoint.write_bytes(struct.pack("7i", *SHAPE) + weights.numpy().tobytes())
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % n for n in range(256))]
    pieces += [b"ab%d. " % n for n in range(vocab - len(pieces))]
    tokenizer.write_bytes(struct.pack("i", 8) + b"".join(struct.pack("fi", 0.0, len(p)) + p for p in pieces))
    return checkpoint, tokenizer


def test_files_are_read_as_laid_out(made_up: tuple[Path, Path]) -> None:
    model, pieces = read_llama2c(made_up[0]), read_llama2c_pieces(made_up[1])
    assert (model.config.num_layers, model.config.vocab_size, model.config.max_position) == (2, 300, 96)
    assert len(pieces) == 300
    assert pieces[3 + 65] == b"A"
    with pytest.raises(ValueError, match="not a llama2.c checkpoint"):
        read_llama2c(made_up[1])


def test_dropping_rows_changes_nothing_for_the_others(made_up: tuple[Path, Path]) -> None:
    """The cache gives each request what it would get alone, also after `keep`."""
    model = read_llama2c(made_up[0])
    ids = torch.randint(3, 300, (3, 6), generator=torch.Generator().manual_seed(1))

    def run(rows: torch.Tensor, drop_at: int, kept: torch.Tensor) -> torch.Tensor:
        cache = LockstepCache(model.config, len(rows))
        with torch.inference_mode():
            for position in range(6):
                if position == drop_at:
                    cache.keep(kept)
                    rows = rows[kept]
                cache.position = position
                hidden = model(Batch(rows[:, position], torch.full((len(rows),), position), cache))
            return model.logits(hidden)

    together = run(ids, 3, torch.tensor([0, 2]))
    alone = torch.cat([run(ids[n : n + 1], 99, torch.tensor([0])) for n in (0, 2)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_sampling_repeats_for_a_seed(made_up: tuple[Path, Path]) -> None:
    first = sample_stories(*made_up, count=2, seed=7, temperature=1.0)
    assert first == sample_stories(*made_up, count=2, seed=7, temperature=1.0)
    assert all(len(story) > 200 and story.isascii() for story in first)


@pytest.mark.shared
def test_stories260k_follows_its_greedy_reference(shared_dir: Path) -> None:
    directory = shared_dir / "data" / "checkpoints" / "stories260K"
    model = read_llama2c(directory / "stories260K.bin")
    reference = json.loads((directory / "greedy_reference.json").read_text())["prompts"]
    for wanted in reference.values():
        answers = next(v for k, v in wanted.items() if k not in ("prompt_ids", "first_step_top5"))
        ids = list(wanted["prompt_ids"])
        cache = LockstepCache(model.config, 1)
        with torch.inference_mode():
            for position in range(len(ids) + len(answers) - 1):
                cache.position = position
                batch = Batch(torch.tensor([ids[position]]), torch.tensor([position]), cache)
                best = int(model.logits(model(batch))[0].argmax())
                if position == len(ids) - 1:
                    ids.append(best)
        assert ids[len(wanted["prompt_ids"]) :] == answers
