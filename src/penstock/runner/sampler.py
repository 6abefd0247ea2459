"""The sampler of one rank: who asked for what, and what has occurred so far. Turns scores into token ids.

Keeps a few numbers per slot (the runner's small integer for a request) in arrays, so that a batch without rare wishes
costs no Python per row. The arithmetic is in `nn/kernels/sampling.py`; steps, blocks and text are unknown here.

Everything is rebuilt from `Admitted`, also after preemption, and the noise is a function of (seed, position, token id):
the token of a request does not depend on who shares its batches (E0 on equal scores).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.core.plan import Admitted, Logprobs
from penstock.nn.doors import Scores
from penstock.nn.kernels.edits import NO_IDS, Ragged, RowEdits, RowParams
from penstock.nn.kernels.sampling import NO_TOKEN, NOT_A_NUMBER, logprobs

CONSTRAINS, PENALISES, REMEMBERS, REPORTS = 1, 2, 4, 8  # bits of a slot's wishes: REMEMBERS is told committed tokens
ERRORS = {
    NOT_A_NUMBER: "the model's scores for the next token are not numbers (NaN)",
    NO_TOKEN: "no token is allowed next: the request's constraints or the model's scores forbid all of them",
}

Ints = NDArray[np.int64]
NO_VALUES = np.empty(0, np.float32)


@dataclass(slots=True)
class SampleOutput:
    """Tokens of N rows, 0 where the row failed; the dicts are keyed by row and usually empty."""

    token_ids: Ints
    tokens: list[int]  # the same
    logprobs: dict[int, Logprobs] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)  # the error of that row's request alone


class Occurrences:
    """The distinct tokens a request's penalties look at, and how often each came in its output (0: prompt only)."""

    __slots__ = ("_counts", "_ids", "_index")

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int]) -> None:
        self._index: dict[int, int] = {}
        self._ids = np.empty(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        for token_id in prompt_ids:
            self._place(token_id)
        for token_id in output_ids:
            self.add(token_id)

    def _place(self, token_id: int) -> int:
        at = self._index.setdefault(token_id, len(self._index))
        if at == len(self._ids):
            self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._ids[at] = token_id
        return at

    def add(self, token_id: int) -> None:
        """One more of `token_id` in the output."""
        at = self._place(token_id)  # first: it may make the arrays anew
        self._counts[at] += 1

    @property
    def ids(self) -> Ints:
        return self._ids[: len(self._index)]

    @property
    def counts(self) -> NDArray[np.float32]:
        return self._counts[: len(self._index)]

    def __len__(self) -> int:
        return len(self._index)


@dataclass(slots=True)
class Edits:
    """How one request's scores change before filters: built at admission, `note` is told each token it commits.

    All ids lie inside the vocabulary; those that do not are left out, with the bad words that contain them.
    """

    prompt_len: int
    bias_ids: Ints
    bias: NDArray[np.float32]
    allowed_ids: Ints | None
    banned_ids: Ints  # bad words of one token
    phrases: list[tuple[list[int], int]]  # bad words of more: (tokens before the last, the last)
    output_ids: list[int]  # only as many as the longest phrase needs
    min_tokens: int
    stop_ids: Ints
    repetition: float
    frequency: float
    presence: float
    occurred: Occurrences | None

    @property
    def remembers(self) -> bool:
        return self.occurred is not None or bool(self.phrases)

    @property
    def constrains(self) -> bool:
        constant = len(self.bias_ids) > 0 or self.allowed_ids is not None or len(self.banned_ids) > 0
        return constant or bool(self.phrases) or (self.min_tokens > 0 and len(self.stop_ids) > 0)

    def note(self, token_id: int) -> None:
        if self.occurred is not None:
            self.occurred.add(token_id)
        if self.phrases:
            self.output_ids.append(token_id)
            del self.output_ids[: -max(len(before) for before, _ in self.phrases)]

    def forbidden(self, position: int) -> list[int]:
        """Ids that may not stand at `position`, besides those that are not allowed anywhere."""
        ids = [last for before, last in self.phrases if self.output_ids[-len(before) :] == before]
        if position - self.prompt_len < self.min_tokens:
            ids += self.stop_ids.tolist()
        return ids


def edits_of(admitted: Admitted, vocab_size: int) -> Edits:
    """The edits that a request asks for, with the tokens it has committed so far taken in."""
    params = admitted.params

    def known(ids: Iterable[int]) -> list[int]:
        return [i for i in ids if 0 <= i < vocab_size]

    bias = {i: b for i, b in (params.logit_bias or {}).items() if 0 <= i < vocab_size}
    words = [word for word in params.bad_words_ids if word and len(known(word)) == len(word)]
    phrases = [(list(word[:-1]), word[-1]) for word in words if len(word) > 1]
    output_ids = admitted.token_ids[admitted.prompt_len :]
    occurred = None
    if params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0:
        prompt_ids = admitted.token_ids[: admitted.prompt_len] if params.repetition_penalty != 1 else ()
        occurred = Occurrences(known(prompt_ids), known(output_ids))
    longest = max((len(before) for before, _ in phrases), default=0)
    allowed_ids = None
    if params.allowed_token_ids is not None:
        allowed_ids = np.array(sorted(set(known(params.allowed_token_ids))), np.int64)
    return Edits(
        prompt_len=admitted.prompt_len,
        bias_ids=np.array(list(bias), np.int64),
        bias=np.array(list(bias.values()), np.float32),
        allowed_ids=allowed_ids,
        banned_ids=np.array([word[0] for word in words if len(word) == 1], np.int64),
        phrases=phrases,
        output_ids=list(output_ids[-longest:]) if longest else [],
        min_tokens=params.min_tokens,
        stop_ids=np.array(known(admitted.stop_ids), np.int64),
        repetition=params.repetition_penalty,
        frequency=params.frequency_penalty,
        presence=params.presence_penalty,
        occurred=occurred,
    )


@dataclass(slots=True)
class _Gathered:
    """What the requests of some slots ask for. The positions of `params` are those of the last step."""

    slots: tuple[int, bytes]  # their number and their array's memory: one comparison
    wishes: NDArray[np.uint8]
    any_wish: int
    params: RowParams


class Sampler:
    """Chooses tokens for slots. Used by one rank from one thread: `admit`, then per step `sample` and `accept`."""

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._wishes = np.zeros(num_slots, np.uint8)
        self._num_logprobs = np.zeros(num_slots, np.int64)
        self._temperature = np.zeros(num_slots, np.float32)
        self._top_k = np.zeros(num_slots, np.int64)
        self._top_p = np.ones(num_slots, np.float64)
        self._min_p = np.zeros(num_slots, np.float64)
        self._seeds = np.zeros(num_slots, np.uint64)
        self._edits: dict[int, Edits] = {}
        self._gathered: _Gathered | None = None  # of the last step: decodes come in the same order again and again

    def admit(self, slot: int, admitted: Admitted) -> None:
        """Take a request in at `slot`, which holds nobody; also when it comes back after preemption."""
        self._gathered = None
        params = admitted.params
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = admitted.seed & (2**64 - 1)
        self._num_logprobs[slot] = params.logprobs or 0
        edits = edits_of(admitted, self.vocab_size)
        wishes = 0 if params.logprobs is None else REPORTS
        if edits.constrains:
            wishes |= CONSTRAINS
        if edits.occurred is not None:
            wishes |= PENALISES
        if edits.remembers:
            wishes |= REMEMBERS
        if wishes & (CONSTRAINS | PENALISES):
            self._edits[slot] = edits
        self._wishes[slot] = wishes

    def release(self, slot: int) -> None:
        """Forget who is at `slot`."""
        self._edits.pop(slot, None)
        self._wishes[slot] = 0

    def accept(self, slots: Ints | int, token_ids: Ints | int) -> None:
        """Note committed tokens, in order: one slot and token, or arrays of equal length."""
        if not self._edits:
            return
        slots, token_ids = np.atleast_1d(slots), np.atleast_1d(token_ids)
        noted = np.flatnonzero(self._wishes[slots] & REMEMBERS)
        for slot, token_id in zip(slots[noted].tolist(), token_ids[noted].tolist(), strict=True):
            self._edits[slot].note(token_id)

    def sample(self, scores: Scores, slots: Ints, positions: Ints) -> SampleOutput:
        """The next token of each row of `scores` [N].

        slots [N]; positions [N]: absolute position of the token being chosen. Several rows may belong to one slot;
        penalties and bad words then see what `accept` was told, for all of them. A row that cannot be sampled fails
        alone. The logprobs are of the scores before edits.
        """
        if self._gathered is None or self._gathered.slots != (len(slots), slots.tobytes()):
            self._gathered = self._gather(slots)
        wishes, any_wish, params = self._gathered.wishes, self._gathered.any_wish, self._gathered.params
        if positions is not params.positions:  # in steady decoding their values move on in place
            params = self._gathered.params = replace(params, positions=np.asarray(positions, np.int64))
        reporting = np.flatnonzero(wishes & REPORTS) if any_wish & REPORTS else NO_IDS
        edits = self._row_edits(wishes, slots, positions) if any_wish & (CONSTRAINS | PENALISES) else None
        token_ids, raw = scores.choose(params, edits, reporting)
        output = SampleOutput(token_ids, token_ids.tolist())
        failed = [row for row, token in enumerate(output.tokens) if token < 0]
        if failed:
            output.failed = {row: ERRORS[output.tokens[row]] for row in failed}
            token_ids[token_ids < 0] = 0
            output.tokens = token_ids.tolist()
        if any_wish & REPORTS:
            self._report(raw, reporting, slots, output)
        return output

    def _gather(self, slots: Ints) -> _Gathered:
        wishes = self._wishes[slots]
        params = RowParams(
            self._temperature[slots],
            self._top_k[slots],
            self._top_p[slots],
            self._min_p[slots],
            self._seeds[slots],
            NO_IDS,
        )
        any_wish = int(np.bitwise_or.reduce(wishes)) if len(wishes) else 0
        return _Gathered((len(slots), slots.tobytes()), wishes, any_wish, params)

    def _row_edits(self, wishes: NDArray[np.uint8], slots: Ints, positions: Ints) -> RowEdits:
        """The edits of a batch's rows as flat lists."""
        num_rows = len(wishes)
        biased, allowed, banned, occurred = ([NO_IDS] * num_rows for _ in range(4))
        bias: list[NDArray[np.float32]] = [NO_VALUES]
        counts: list[NDArray[np.float32]] = [NO_VALUES]
        limited = np.zeros(num_rows, np.bool_)
        penalties = np.tile(np.array((1, 0, 0), np.float32), (num_rows, 1))
        for row in np.flatnonzero(wishes & (CONSTRAINS | PENALISES)).tolist():
            edits = self._edits[int(slots[row])]
            if len(edits.bias_ids):
                biased[row] = edits.bias_ids
                bias.append(edits.bias)
            if edits.allowed_ids is not None:
                allowed[row], limited[row] = edits.allowed_ids, True
            forbidden = edits.forbidden(int(positions[row]))
            if forbidden or len(edits.banned_ids):
                banned[row] = np.concatenate((np.array(forbidden, np.int64), edits.banned_ids))
            if edits.occurred is not None:
                occurred[row] = edits.occurred.ids
                counts.append(edits.occurred.counts)
                penalties[row] = edits.repetition, edits.frequency, edits.presence
        return RowEdits(
            Ragged.of(biased),
            np.concatenate(bias),
            limited,
            Ragged.of(allowed),
            Ragged.of(banned),
            Ragged.of(occurred),
            np.concatenate(counts),
            penalties,
        )

    def _report(self, raw: Tensor, rows: Ints, slots: Ints, output: SampleOutput) -> None:
        """Fill `output.logprobs` for `rows`, whose untouched scores are `raw`, but for the failed ones."""
        if output.failed:
            alive = np.flatnonzero([row not in output.failed for row in rows.tolist()])
            raw, rows = raw[torch.from_numpy(alive)], rows[alive]
        found = _logprobs(raw, output.token_ids[rows], self._num_logprobs[slots[rows]])
        output.logprobs = dict(zip(rows.tolist(), found, strict=True))

    def prompt_logprobs(self, scores: Tensor, next_token_ids: Ints, num: int) -> list[Logprobs]:
        """Log probabilities of the tokens that follow n prompt positions: scores float32 [n, V], next_token_ids [n].

        Each entry is that token, then the `num` best. A position whose scores hold NaN has NaN for its token and no
        others.
        """
        return _logprobs(scores, next_token_ids, np.full(len(next_token_ids), num, np.int64))


def _logprobs(scores: Tensor, token_ids: Ints, nums: Ints) -> list[Logprobs]:
    if len(token_ids) == 0:
        return []
    chosen, ranks, ids, values = logprobs(scores, token_ids, nums)
    return [
        Logprobs([token, *best.tolist()], [own, *logs.tolist()], rank)
        for token, own, rank, best, logs in zip(
            token_ids.tolist(), chosen.tolist(), ranks.tolist(), ids, values, strict=True
        )
    ]
