"""Rows of tokens from weighted documents, endlessly, from a position that can be saved.

Knows token ids and documents; knows no model. A row holds whole documents as far as they fit; a text that does not
fit goes on in the next row, a chat is cut off, so that no row begins in the middle of one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from penstock.training.corpus import Document
from penstock.training.recipe import LmRecipe
from penstock.training.tokenizer import END_OF_TEXT

NO_TARGET = -100  # as torch's cross_entropy: this position has no loss


@dataclass(slots=True)
class TokenSource:
    """The documents of one source as one array. Document n is ids[starts[n]:starts[n + 1]], <|endoftext|> included."""

    name: str
    ids: np.ndarray  # uint16
    silent: np.ndarray  # bool, same length: the token is read but not learned
    starts: np.ndarray  # int64 [num_documents + 1]
    is_chat: bool
    weight: float
    until: float = 1.0  # left out from this fraction of the run on

    @property
    def num_documents(self) -> int:
        return len(self.starts) - 1


def encode_documents(
    name: str,
    documents: list[Document],
    tokenizer: Tokenizer,
    weight: float,
    held_out: bool,
    until: float = 1.0,
) -> TokenSource:
    """Tokenise one side of the split. Token ids must fit uint16."""
    chosen = [d for d in documents if d.held_out == held_out]
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids, silent, starts = [], [], [0]
    for document, encoding in zip(chosen, tokenizer.encode_batch([d.text for d in chosen]), strict=True):
        row = np.asarray([*encoding.ids, end], np.uint16)
        mask = np.zeros(len(row), bool)
        if document.silent_chars:
            mask[:-1] = [offset[1] <= document.silent_chars for offset in encoding.offsets]
        ids.append(row)
        silent.append(mask)
        starts.append(starts[-1] + len(row))
    return TokenSource(
        name,
        np.concatenate(ids) if ids else np.zeros(0, np.uint16),
        np.concatenate(silent) if silent else np.zeros(0, bool),
        np.asarray(starts),
        bool(chosen) and chosen[0].is_chat,
        weight,
        until,
    )


@dataclass(slots=True)
class RowStream:
    """An endless, reproducible stream of rows. `state()` and `restore` make a resumed run see the same rows.

    An epoch is every source `weight` times, its documents shuffled over all sources; a fractional weight takes a
    moving window of the documents.
    """

    sources: list[TokenSource]
    seed: int
    epoch: int = 0
    cursor: int = 0  # documents of this epoch already begun
    carry: tuple[int, int, int] | None = None  # (source, begin, end) of a text that goes on in the next row
    _order: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))

    def __post_init__(self) -> None:
        self._order = self._epoch_order()

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "cursor": self.cursor, "carry": self.carry}

    def restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self.carry = tuple(state["carry"]) if state["carry"] else None
        self._order = self._epoch_order()

    def rows(self, num_rows: int, seq_len: int, progress: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """int64 inputs and targets [num_rows, seq_len]; targets hold NO_TARGET where nothing is to be learned.

        progress: fraction of the run, to leave out sources that have ended.
        """
        ids = np.zeros((num_rows, seq_len + 1), np.int64)
        learn = np.zeros((num_rows, seq_len + 1), bool)
        for row in range(num_rows):
            at = 0
            while at <= seq_len:
                source, begin, end = self._next(progress)
                size = min(end - begin, seq_len + 1 - at)
                origin = self.sources[source]
                ids[row, at : at + size] = origin.ids[begin : begin + size]
                learn[row, at : at + size] = ~origin.silent[begin : begin + size]
                at += size
                if begin + size < end and not origin.is_chat:
                    # the last token was only a target here: it is the first input of the next row
                    self.carry = (source, begin + size - 1, end)
        return ids[:, :-1], np.where(learn[:, 1:], ids[:, 1:], NO_TARGET)

    def _next(self, progress: float) -> tuple[int, int, int]:
        if self.carry is not None:
            piece, self.carry = self.carry, None
            return piece
        while True:
            if self.cursor == len(self._order):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._order = self._epoch_order()
            source, document = self._order[self.cursor]
            self.cursor += 1
            if progress < self.sources[source].until:
                break
        starts = self.sources[source].starts
        return int(source), int(starts[document]), int(starts[document + 1])

    def _epoch_order(self) -> np.ndarray:
        """int64 [documents of the epoch, 2]: (source, document)."""
        rng = np.random.default_rng((self.seed, self.epoch))
        parts = []
        for index, source in enumerate(self.sources):
            num = source.num_documents
            first, last = round(self.epoch * source.weight * num), round((self.epoch + 1) * source.weight * num)
            if num:
                shuffled = np.random.default_rng((self.seed, index, 77)).permutation(num)
                chosen = shuffled[np.arange(first, last) % num]
                parts.append(np.stack((np.full(len(chosen), index), chosen), 1))
        order = np.concatenate(parts)
        return order[rng.permutation(len(order))]


def held_out_rows(source: TokenSource, seq_len: int, max_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """The first held-out documents of a source as rows, at most `max_rows`, like `RowStream.rows`, each text once."""
    num_rows = max(1, min(max_rows, len(source.ids) // (seq_len + 1)))
    padded = np.concatenate((source.ids, np.zeros(max(0, num_rows * seq_len + 1 - len(source.ids)), np.uint16)))
    learn = np.zeros(len(padded), bool)
    learn[: len(source.ids)] = ~source.silent
    span = num_rows * seq_len
    ids = padded[: span + 1].astype(np.int64)
    targets = np.where(learn[1 : span + 1], ids[1:], NO_TARGET)
    return ids[:-1].reshape(num_rows, seq_len), targets.reshape(num_rows, seq_len)


def evaluation_sources(
    recipe: LmRecipe, documents: dict[str, list[Document]], tokenizer: Tokenizer
) -> list[TokenSource]:
    """The held-out side of every source that has one."""
    found = [encode_documents(s.name, documents[s.name], tokenizer, 0.0, True) for s in recipe.sources]
    return [source for source in found if len(source.ids) > 1]
