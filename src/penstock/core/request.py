"""A request and what it asks for. Knows token ids and counts, never text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from penstock.core.moves import KVTicket


class ParamsError(ValueError):
    """A sampling parameter is out of range. `param` names it."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


_NUMBERS: dict[str, type] = {
    **dict.fromkeys(("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs"), Integral),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature"), Real),
    **dict.fromkeys(("top_p", "min_p"), Real),
}
_OPTIONAL = frozenset({"seed", "max_tokens", "logprobs", "prompt_logprobs"})


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens: vLLM's field names and defaults. `check()` raises ParamsError for the first bad field.

    Order of application: logit_bias, allowed_token_ids, bad_words, min_tokens -> repetition, frequency, presence
    penalties -> temperature -> top_k -> top_p (on what top_k left, renormalised) -> min_p -> Gumbel argmax.
    `stop` strings are matched by the front end on text; `bad_words_ids` is what `bad_words` tokenises to.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    max_tokens: int | None = 16  # None: up to the model's limit
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    truncate_prompt_tokens: int | None = None
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):  # a str or a list is welcome too
            value: Any = getattr(self, name)
            if value is None and name == "allowed_token_ids":
                continue
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        self.check()

    def check(self) -> None:
        """Raise ParamsError for the first field that is out of range."""

        def require(ok: bool, param: str, rule: str) -> None:
            if not ok:
                raise ParamsError(param, f"{param} must be {rule}, got {getattr(self, param)!r}")

        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            is_right = type(value) is int or isinstance(value, kind) or (value is None and name in _OPTIONAL)
            require(is_right, name, "a whole number" if kind is Integral else "a number")
        require(1 <= self.n <= 128, "n", "between 1 and 128")
        require(-2 <= self.presence_penalty <= 2, "presence_penalty", "between -2 and 2")
        require(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "between -2 and 2")
        require(0 < self.repetition_penalty <= 100, "repetition_penalty", "above 0 and at most 100")
        require(0 <= self.temperature <= 100, "temperature", "between 0 and 100")
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(self.top_k >= -1, "top_k", "-1 (off), 0 (off) or positive")
        require(0 <= self.min_p <= 1, "min_p", "between 0 and 1")
        require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", "at least 1")
        require(self.min_tokens >= 0, "min_tokens", "at least 0")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"at most max_tokens ({self.max_tokens})",
        )
        require(self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20")
        require(self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20, "prompt_logprobs", "between 0 and 20")
        require(len(self.stop) <= 16 and all(self.stop), "stop", "at most 16 strings, none empty")
        require(self.seed is None or -(2**63) <= self.seed < 2**64, "seed", "an integer of 64 bits")
        require(self.allowed_token_ids != (), "allowed_token_ids", "null or not empty")
        bias = self.logit_bias or {}
        require(all(-100 <= b <= 100 for b in bias.values()), "logit_bias", "biases between -100 and 100")


def child_seed(seed: int, index: int) -> int:
    """Seed of the `index`-th of `n` samples of a request: the request's own for index 0, a hash of both after it."""
    if index == 0:
        return seed & (2**64 - 1)
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@dataclass(frozen=True, slots=True)
class MediaItem:
    """An image or the like inside a prompt: tokens [start, start + num_tokens) stand for it."""

    content_hash: str
    start: int
    num_tokens: int


FINISH_STOP, FINISH_LENGTH, FINISH_ABORT, FINISH_ERROR = "stop", "length", "abort", "error"


@dataclass(slots=True, eq=False)
class Request:
    """One sequence being generated. Written by the scheduler alone; counts in tokens from the start of the request.

    The gap rule: `num_pending` tokens are known (or being sampled by a step in flight) and not computed; a step closes
    that gap as far as budget and blocks allow. There is no prefill mode and no decode mode.
    """

    id: str
    token_ids: list[int]  # prompt, then committed output
    prompt_len: int
    params: SamplingParams
    seed: int
    max_total: int  # prompt_len + tokens it may generate, never above the model's limit
    stop_ids: frozenset[int] = frozenset()  # end tokens and stop_token_ids
    arrival_s: float = 0.0
    deadline_s: float | None = None
    priority: int = 0  # lower runs first
    adapter: str = ""
    salt: str = ""
    media: tuple[MediaItem, ...] = ()
    ticket: KVTicket | None = None  # where the prompt's KV goes: it is computed here for another engine

    num_computed: int = 0  # KV is in place and committed
    num_planned: int = 0  # in steps in flight
    num_unsampled: int = 0  # positions in flight whose token is not known yet (upper bound with drafts)
    block_tables: list[list[int]] = field(default_factory=list)  # per KV group; 0 where a block is not needed
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks of known tokens
    num_published: list[int] = field(default_factory=list)  # per KV group: blocks handed to the prefix cache so far
    waiting_for: dict[str, int] = field(default_factory=dict)  # id -> position it may not pass
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    is_running: bool = False
    is_on_rank: bool = False  # ranks were told of it
    arriving: int = -1  # the move that brings its prompt's beginning; -1: none
    num_sent: int = 0  # leading blocks that moves to the ticket's holder cover
    epoch: int = 0  # rises at each preemption: results of older rows count as tokens, not as computed KV
    num_in_flight: int = 0  # rows in steps submitted and not committed
    num_shared: int = 0  # leading blocks that other requests hold too, when last counted
    num_cached: int = 0  # prompt tokens served by the prefix cache at first admission
    num_received: int = 0  # prompt tokens whose KV came from a tier or a peer
    num_preemptions: int = 0
    num_drafts_rejected: int = 0
    num_logprobs_done: int = 0  # prompt positions whose prompt_logprobs are out
    plan_marker: int = -1  # the step that last planned it: never preempted inside its own plan
    refused_at: int = -1  # the scheduler's count of returned memory when it last did not fit
    passed_over_s: float | None = None  # since when it was ready and did not fit
    queue_reason: str = ""
    admitted_s: float | None = None  # first time
    first_token_s: float | None = None
    finish_s: float | None = None

    @property
    def num_known(self) -> int:
        """Tokens that exist or are being sampled by steps in flight."""
        return len(self.token_ids) + self.num_unsampled

    @property
    def num_pending(self) -> int:
        """The gap: tokens to compute that no step has taken yet."""
        return len(self.token_ids) + self.num_unsampled - self.num_computed - self.num_planned

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.prompt_len

    def advance(self, num_tokens: int, num_rejected: int) -> None:
        """A row of `num_tokens` is committed; so many of its drafts, the last tokens, were wrong."""
        self.num_planned -= num_tokens
        self.num_computed += num_tokens - num_rejected
        self.num_drafts_rejected += num_rejected

    def append(self, tokens: list[int], now: float) -> list[int]:
        """Add sampled tokens up to the first that ends the request; marks it finished. Gives those that were added."""
        if self.first_token_s is None:
            self.first_token_s = now
        ids, num_before = self.token_ids, len(self.token_ids)
        for token in tokens:
            ids.append(token)
            if token in self.stop_ids and len(ids) - self.prompt_len > self.params.min_tokens:
                self.finish_reason = FINISH_STOP
                self.stop_reason = token if token in self.params.stop_token_ids else None
            elif len(ids) >= self.max_total:
                self.finish_reason = FINISH_LENGTH
            else:
                continue
            return tokens[: len(ids) - num_before]
        return tokens
