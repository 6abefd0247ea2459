"""Calibration text as rows of token ids of one length: from a file, or from what a model has written.

Knows text files and tokenizers. Does not know what is calibrated, nor how a model writes: it only says how to begin.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.tokenizer import Tokenizer
from penstock.nn.weights.errors import CheckpointError

# How texts begin that the model goes on with; half of them, the others begin with one token drawn at random.
BEGINNINGS = (
    "There was a", "A long time ago", "Tom and his", "She looked at", "It was a", "What is", "Can you tell me",
    "The sun", "I want to", "He said", "Mom and", '"', "The big", "Two friends", "Please", "How do", "A bird",
    "Every day", "When", "They", "After the", "In this paper", "def ", "The following", "According to", "import ",
    "Dear", "1.", "In 19", "The most important", "We", "If you",
)  # fmt: skip


class CalibrationError(CheckpointError):
    """The calibration text cannot be used. The text says why."""


def beginnings(tokenizer: Tokenizer, vocab_size: int, num: int, seed: int) -> list[list[int]]:
    """Token ids of `num` beginnings, a function of the seed; none holds a special token but what encoding adds."""
    draw = random.Random(seed)
    plain = [token for token in range(vocab_size) if tokenizer.id_to_token(token) and not tokenizer.is_special(token)]
    start = tokenizer.encode("")
    found = []
    for number in range(num):
        if number % 2 and plain:
            found.append([*start, draw.choice(plain)])
        else:
            found.append(tokenizer.encode(BEGINNINGS[number // 2 % len(BEGINNINGS)]))
    return found


def rows_of(texts: Sequence[Sequence[int]], length: int) -> Tensor:
    """int64 [rows, length] from token ids; shorter texts are left out."""
    return torch.tensor([list(text[:length]) for text in texts if len(text) >= length]).view(-1, length)


def rows_of_file(path: Path, tokenizer: Tokenizer, num: int, length: int, seed: int) -> Tensor:
    """int64 [at most num, length]: pieces of a text file, or of the "text" fields of a .jsonl file, drawn by the seed.

    Documents stand one behind the other. Raises CalibrationError when there is not one whole piece.
    """
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    texts = raw.split("\n\n") if path.suffix != ".jsonl" else _fields(path, raw)
    ids = [token for part in tokenizer.encode_batch([text for text in texts if text.strip()]) for token in part]
    pieces = len(ids) // length
    if not pieces:
        raise CalibrationError(f"{path}: {len(ids)} tokens, calibration needs at least {length}")
    chosen = random.Random(seed).sample(range(pieces), min(num, pieces))
    return torch.tensor([ids[piece * length : (piece + 1) * length] for piece in sorted(chosen)])


def _fields(path: Path, raw: str) -> list[str]:
    texts = []
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
            except (ValueError, KeyError, TypeError):
                raise CalibrationError(f'{path}: line {number} is not a JSON object with "text"') from None
            if not isinstance(texts[-1], str):
                raise CalibrationError(f"{path}: line {number}: text must be a string")
    return texts
