"""What a scheduler is bounded by, counts and gives: plain data around its steps."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.plan import Logprobs, Row, StepPlan
from penstock.core.request import Request


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of a step and of waiting."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_queue_wait_s: float = 30.0


@dataclass(slots=True)
class Progress:
    """What a committed step, or a prefill engine, gave one request."""

    request: Request
    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Given:
    """Tokens of a request that another engine sampled."""

    token_ids: list[int]
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None


@dataclass(slots=True)
class Counters:
    """Since start; tokens unless said."""

    prompt_tokens: int = 0
    prompt_tokens_cached: int = 0
    prompt_tokens_received: int = 0  # their KV came from a tier or a peer
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_preemptions: int = 0

    def received(self, request: Request, num_tokens: int, is_cache: bool) -> None:
        """KV of a request has come from a tier or a peer."""
        request.num_received += num_tokens
        self.prompt_tokens_received += num_tokens
        if is_cache:
            request.num_cached += num_tokens
            self.prompt_tokens_cached += num_tokens

    def admitted(self, request: Request, looked_up: bool) -> None:
        """A request starts for the first time, on what the device's cache has of it (if that was `looked_up`)."""
        if request.ticket is None:  # else whoever decodes it counts it
            self.prompt_tokens += request.prompt_len
            self.prompt_tokens_cached += request.num_computed
        if looked_up:
            self.prefix_queries += request.prompt_len
            self.prefix_hits += request.num_computed


@dataclass(slots=True)
class Submitted:
    """A plan whose result is not in yet. Written by the scheduler alone."""

    plan: StepPlan
    rows: list[tuple[Request, int]]  # the row's request and its epoch when planned
    loads: dict[int, int] = field(default_factory=dict)  # row -> the move whose KV it reads as it comes
    filling: list[bytes] = field(default_factory=list)  # hashes of the blocks that this step fills
    chunks: list[tuple[Request, Row]] = field(default_factory=list)  # rows that compute more than the newest token
