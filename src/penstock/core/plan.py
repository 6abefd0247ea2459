"""What a step is to do, and what it did. Plain data between the scheduler and the ranks; knows no tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.core.request import MediaItem, Request, SamplingParams


@dataclass(slots=True)
class Row:
    """One request's share of a step: compute `num_tokens` tokens from `start`.

    Counts and positions are in tokens from the start of the request. The last `num_draft` tokens are guesses
    that this step verifies. Written by the scheduler, read by every rank; never changed after submit.
    """

    request_id: str
    start: int  # upper bound: the runner subtracts drafts that steps in flight rejected
    num_tokens: int
    num_draft: int
    num_logits: int  # of the last positions: 0, 1 + num_draft, or num_tokens for prompt_logprobs
    samples: bool  # the row reaches the end of the known tokens, so its last logits choose new ones
    new_block_ids: tuple[tuple[int, ...], ...]  # per KV group, what was added since the last row


@dataclass(frozen=True, slots=True)
class Admitted:
    """All that a rank must know of a request; sent again when it resumes after preemption."""

    request_id: str
    token_ids: tuple[int, ...]  # prompt and committed output
    prompt_len: int
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int] = frozenset()  # what `min_tokens` forbids
    adapter: str = ""
    media: tuple[MediaItem, ...] = ()

    @staticmethod
    def of(request: Request) -> Admitted:
        return Admitted(
            request.id,
            tuple(request.token_ids),
            request.prompt_len,
            request.params,
            request.seed,
            request.stop_ids,
            request.adapter,
            request.media,
        )


@dataclass(slots=True)
class StepPlan:
    """One step. Ranks apply `released`, then `admitted`, then compute `rows` in order."""

    step: int
    rows: list[Row]
    admitted: tuple[Admitted, ...] = ()
    released: tuple[str, ...] = ()  # finished, cancelled or preempted since the last plan
    awaits: tuple[int, ...] = ()  # ids of loads under way whose KV the rows read: layer by layer, as it comes

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(slots=True)
class Logprobs:
    """Log probabilities at one position: the token that is there first, then the best ones, best first.

    Of the model's own distribution (float32 log-softmax of the raw scores, before penalties and temperature).
    `rank` is the 1-based rank of the first entry.
    """

    token_ids: list[int]
    logprobs: list[float]
    rank: int


@dataclass(slots=True)
class StepResult:
    """What a step did. `tokens[i]` belongs to `plan.rows[i]`: empty where the row did not sample.

    With drafts, `tokens[i]` are the accepted ones and the one after them: `len(tokens[i]) - 1` drafts were accepted.
    """

    step: int
    tokens: list[list[int]]
    logprobs: dict[int, list[Logprobs]] = field(default_factory=dict)  # row -> per emitted token
    prompt_logprobs: dict[int, list[Logprobs | None]] = field(default_factory=dict)  # row -> per prompt position
    failed: dict[str, str] = field(default_factory=dict)  # request id -> error: it fails, the engine does not
    arrived: tuple[str, ...] = ()  # gate ids that opened during the step
    bad_loads: tuple[int, ...] = ()  # of plan.awaits: failed or too late; all else of rows that read them is void
    seconds: float = 0.0
