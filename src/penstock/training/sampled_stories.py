"""Stories drawn from a llama2.c checkpoint (such as stories260K), as labelled extra text for a training mix.

Knows the llama2.c file formats (header of seven int32, float32 weights; tokenizer with scores) and nothing of recipes.
Source of both formats: karpathy/llama2.c, `export.py` legacy version 0 and `tokenizer.py`.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from penstock.config.model import ModelConfig
from penstock.nn.doors import Batch
from penstock.nn.models import build_model
from penstock.nn.models.llama import LlamaModel
from penstock.training.lockstep import LockstepCache

BOS, EOS = 1, 2
ROWS_AT_ONCE = 128  # their cache stays within a few megabytes


def read_llama2c(path: Path) -> LlamaModel:
    """A llama2.c version 0 checkpoint with a tied head as float32 `LlamaModel`. Raises ValueError on other files."""
    data = path.read_bytes()
    dim, hidden, num_layers, num_heads, num_kv_heads, vocab, seq_len = struct.unpack("7i", data[:28])
    if vocab < 0 or min(dim, hidden, num_layers, num_heads, num_kv_heads, seq_len) < 1:
        raise ValueError(f"{path} is not a llama2.c checkpoint with a tied head")
    head = dim // num_heads
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head,
        max_position=seq_len,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        tied_embeddings=True,
        dtype="float32",
        qkv_bias=False,
        attention_out_bias=False,
        mlp_bias=False,
        qk_norm=False,
        hidden_act="silu",
        layer_windows=(None,) * num_layers,
        bos_token_id=BOS,
        eos_token_ids=(BOS, EOS),
    )
    values, at = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy()), 0

    def take(*shape: int) -> Tensor:
        nonlocal at
        size = int(np.prod(shape))
        at += size
        return values[at - size : at].view(shape)

    def halves(weight: Tensor, heads: int) -> Tensor:
        """Rope pairs (2i, 2i+1) of llama2.c to the pairs (i, i + D/2) that `rotate` turns. weight [heads * D, dim]."""
        return weight.view(heads, head // 2, 2, dim).transpose(1, 2).reshape(heads * head, dim)

    embed, attention_norm = take(vocab, dim), take(num_layers, dim)
    wq, wk = take(num_layers, dim, dim), take(num_layers, num_kv_heads * head, dim)
    wv, wo = take(num_layers, num_kv_heads * head, dim), take(num_layers, dim, dim)
    mlp_norm = take(num_layers, dim)
    w1, w2, w3 = take(num_layers, hidden, dim), take(num_layers, dim, hidden), take(num_layers, hidden, dim)
    state = {"embed.weight": embed, "head.weight": embed, "norm.weight": take(dim)}
    for n in range(num_layers):
        q, k = halves(wq[n], num_heads), halves(wk[n], num_kv_heads)
        state |= {
            f"layers.{n}.attention_norm.weight": attention_norm[n],
            f"layers.{n}.attention.qkv.weight": torch.cat((q, k, wv[n])),
            f"layers.{n}.attention.out.weight": wo[n],
            f"layers.{n}.mlp_norm.weight": mlp_norm[n],
            f"layers.{n}.mlp.gate_up.weight": torch.cat((w1[n], w3[n])),
            f"layers.{n}.mlp.down.weight": w2[n],
        }
    model = build_model(config)
    model.load_state_dict(state)
    return model


def read_llama2c_pieces(path: Path) -> list[bytes]:
    """The bytes of every token of a llama2.c tokenizer file; "<0xNN>" tokens become that byte."""
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        (length,) = struct.unpack_from("i", data, at + 4)
        piece = data[at + 8 : at + 8 + length]
        at += 8 + length
        if len(piece) == 6 and piece.startswith(b"<0x"):
            piece = bytes([int(piece[3:5], 16)])
        pieces.append(piece)
    return pieces


@torch.inference_mode()
def sample_stories(checkpoint: Path, tokenizer: Path, count: int, seed: int, temperature: float = 0.7) -> list[str]:
    """`count` complete stories, in a fixed order for a seed; those that break off or hold odd bytes are drawn anew.

    Sampling is at `temperature` from the most probable tokens that hold 95 % (top-p). Needs both llama2.c files.
    """
    model, pieces = read_llama2c(checkpoint), read_llama2c_pieces(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    stories: list[str] = []
    for _ in range(2 * count // ROWS_AT_ONCE + 8):
        stories += _sample_batch(model, pieces, min(ROWS_AT_ONCE, count), generator, temperature)
        if len(stories) >= count:
            break
    return stories[:count]


def _sample_batch(
    model: LlamaModel, pieces: list[bytes], num_rows: int, generator: torch.Generator, temperature: float
) -> list[str]:
    cache = LockstepCache(model.config, num_rows)
    token_ids = torch.full((num_rows,), BOS)
    drawn: list[list[int]] = [[] for _ in range(num_rows)]
    alive = torch.arange(num_rows)
    for position in range(model.config.max_position):
        cache.position = position
        hidden = model(Batch(token_ids, torch.full_like(alive, position), cache))
        probs, order = (model.logits(hidden) / temperature).softmax(-1).sort(-1, descending=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs > 0.95, 0.0)
        token_ids = order.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)
        for row, token_id in zip(alive.tolist(), token_ids.tolist(), strict=True):
            drawn[row].append(token_id)
        going_on = (token_ids != BOS) & (token_ids != EOS)
        if not going_on.all():
            rows = going_on.nonzero().squeeze(1)
            alive, token_ids = alive[rows], token_ids[rows]
            cache.keep(rows)
            if not len(rows):
                break
    found = []
    for row in drawn:
        text = b"".join(pieces[t] for t in row[:-1]) if row[-1] in (BOS, EOS) else b""
        story = text.decode("utf-8", "replace").strip()
        if len(story) > 200 and story.isascii() and story[-1] in '.!?"':
            found.append(story)
    return found
