"""What front end and engine say to each other: msgspec structs, one tagged union per direction.

Times are seconds of the engine machine's monotonic clock. No prompt text travels here: token ids only.
"""

from __future__ import annotations

import msgspec

from penstock.core.kv_events import KVEvents, KVSnapshot
from penstock.core.plan import Logprobs
from penstock.core.request import SamplingParams


class Message(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages: encoded as [tag, fields...]."""


# ---- to the engine ----


class AddRequest(Message, frozen=True):
    """Start a request. The engine answers with Tokens until `finish_reason`, or with one Failed."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    seed: int  # chosen by the front end when the user gave none
    arrival_s: float
    deadline_s: float | None = None
    priority: int = 0
    adapter: str = ""
    salt: str = ""
    end_ids: tuple[int, ...] = ()  # the tokenizer's end tokens; they count beside the model's own
    prefill_at: tuple[str, ...] = ()  # peers that may compute the prompt, the best first; none: it is computed here
    num_generated: int = 0  # the last so many of `token_ids` are output that the user has: another engine made it


class CancelRequest(Message, frozen=True):
    """Stop a request; unknown ids are ignored. With `finish_reason` "stop" it ended at a stop string."""

    request_id: str
    finish_reason: str = "abort"
    stop_reason: str | None = None


class Watch(Message, frozen=True):
    """Send a Report with per-request records and the block map at `interval_s` until `until_s`."""

    until_s: float
    interval_s: float = 0.5


class ResetPrefixCache(Message, frozen=True):
    """Forget every cached block that no request holds."""


class Drain(Message, frozen=True):
    """Refuse new requests, finish the running ones until `until_s`, abort the rest, then say Stopped."""

    until_s: float


class Peer(msgspec.Struct, array_like=True, frozen=True):
    """An engine as others see it. `role`: prefill, decode or both; `wire`: its inbox; `link`: where KV is sent;
    `model`: a fingerprint, where engines may have been given different ones."""

    name: str
    role: str
    wire: str
    link: str
    model: str = ""


class Peers(Message, frozen=True):
    """All engines of the cluster, the receiver among them. Said again when one comes or goes."""

    peers: list[Peer]


class Explain(Message, frozen=True):
    """Ask for the record of a live request; answered by a Record (or Failed with code 404)."""

    request_id: str


# ---- from the engine ----


class Span(msgspec.Struct, array_like=True, frozen=True):
    """What happened to a request in [start_s, end_s).

    kind: queue, prefill, decode, preempted; transfer (its KV comes from the engine `place`), load (from the tier).
    """

    kind: str
    start_s: float
    end_s: float | None
    num_tokens: int = 0
    place: str = ""


class Miss(msgspec.Struct, array_like=True, frozen=True):
    """First prompt token that the cache did not serve and why: first_seen, diverged, evicted, tail, disabled."""

    reason: str
    at_token: int
    detail: str


class RequestRecord(msgspec.Struct, array_like=True, frozen=True):
    """Where a request's time went. `queue_reason` is "" when it hardly waited.

    `sources`: (source, tokens) in order of the prompt, as far as its KV is there: device (this engine's cache), peer
    (sent by another engine), the name of a tier, compute.
    """

    request_id: str
    state: str  # waiting, prefill, decode, finished, aborted
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    arrival_s: float
    admitted_s: float | None
    first_token_s: float | None
    finish_s: float | None
    finish_reason: str | None
    num_preemptions: int
    queue_reason: str
    spans: list[Span]
    miss: Miss | None
    block_size: int
    engine: str = ""  # its name, among others
    sources: list[tuple[str, int]] = []


class TokenDelta(msgspec.Struct, array_like=True, frozen=True):
    """New tokens of one request. The last one of a request carries finish_reason and its record."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[Logprobs] | None = None
    prompt_logprobs: list[Logprobs | None] | None = None  # once, with the first token
    num_cached: int = 0
    record: RequestRecord | None = None


class Tokens(Message, frozen=True):
    """What one step gave, for all requests that got something."""

    deltas: list[TokenDelta]
    sent_s: float


class Failed(Message, frozen=True):
    """The request ended with an error. `code` as in HTTP: 400 the request's fault, 503 no room, 500 ours."""

    request_id: str
    code: int
    message: str


class Record(Message, frozen=True):
    """Answer to Explain."""

    record: RequestRecord


class KVReport(msgspec.Struct, array_like=True, frozen=True):
    """Blocks of the KV group with the most bytes, by state; the five counts sum to num_blocks.

    `cells`: blocks in order of id, run-length coded, letter then count (u used, s shared, f filling, c cached,
    . free), at most 1,640 cells of `blocks_per_cell` blocks; "" unless somebody watches.
    """

    block_size: int
    num_blocks: int
    used: int
    shared: int
    filling: int
    cached: int
    free: int
    num_cells: int = 0
    blocks_per_cell: int = 1
    cells: str = ""


class HandOffs(msgspec.Struct, array_like=True, frozen=True):
    """Prompts that engines compute for one another, as one of them sees it. `_ing` is now, the rest since its start."""

    num_sent: int = 0  # computed here, and there
    num_received: int = 0  # computed by others
    num_failed: int = 0  # tries to have them computed by others that ended otherwise
    num_local: int = 0  # others might have computed them, and this engine did
    num_sending: int = 0
    num_receiving: int = 0
    tokens_received: int = 0
    tokens_received_cached: int = 0  # of these: the sender had them in its cache


class LinkReport(msgspec.Struct, array_like=True, frozen=True):
    """What went to one peer since the engine's start. Seconds are summed over transfers, of which a prompt may have
    several: `exposed_s` is the part of `busy_s` that no step hid, `overlap` the share that steps did hide."""

    peer: str
    scheme: str
    num_bytes: int = 0
    num_messages: int = 0
    num_transfers: int = 0
    num_failed: int = 0
    num_in_flight: int = 0  # prompts
    busy_s: float = 0.0
    exposed_s: float = 0.0
    gigabytes_per_s: float = 0.0
    overlap: float = 0.0


class TierReport(msgspec.Struct, array_like=True, frozen=True):
    """One tier below the device. Capacity and use are the pool's, which the engines of a machine share; the rest is
    this engine's since its start. `hit_blocks` are blocks of prompts, however many KV groups there are."""

    name: str
    capacity_blocks: int  # 0: it has no bound of its own
    used_blocks: int
    hit_blocks: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    load_s: float = 0.0  # that loads took
    saved_s: float = 0.0  # that computing the same would have taken, as predicted, less load_s
    state: str = "on"  # or "off: why"
    latency_s: float = 0.0  # of a read from there onto the device, as measured so far, and
    byte_s: float = 0.0  # per byte


class Report(Message, frozen=True):
    """The engine's numbers: at most every 0.25 s, after steps, as its tiers change, and while watched.

    `_total` counts since start.

    A prompt's tokens count once, at the engine that decodes. `guests` are requests that run or wait here for other
    engines; `num_running` and `waiting` count them too. A router's Report is the sum of `engines`, in which every
    request counts once; `name` and `iteration_tokens` are those of who reported last.
    """

    now_s: float
    num_running: int
    num_waiting: int
    waiting_by_reason: dict[str, int]
    kv: KVReport
    num_steps_total: int
    step_seconds_total: float
    prompt_tokens_total: int
    prompt_tokens_cached_total: int
    generation_tokens_total: int
    num_preemptions_total: int
    prefix_queries_total: int  # tokens
    prefix_hits_total: int  # tokens
    iteration_tokens: list[int]  # tokens of each step since the last report
    requests: list[RequestRecord]  # while watched: live ones, oldest running first, at most 200
    name: str = ""
    role: str = ""
    is_alive: bool = True
    guests_running: int = 0
    guests_waiting_by_reason: dict[str, int] = {}
    prompt_tokens_by_source: dict[str, int] = {}  # sources as in RequestRecord
    prefill_tokens_total: int = 0  # computed by steps here, for other engines and again after preemption too
    handoffs: HandOffs | None = None
    links: list[LinkReport] = []
    tiers: list[TierReport] = []
    engines: list[Report] = []
    steps: list[tuple[int, int, int, int, float]] = []  # of some: tokens, rows, attended, context, seconds


class Ready(Message, frozen=True):
    """The engine can take requests. `memory` and `timeline` are (name, value) pairs for people."""

    model_id: str
    max_model_len: int
    block_size: int
    num_blocks: int
    max_num_seqs: int
    device: str
    memory: list[tuple[str, str]]
    timeline: list[tuple[str, float]]
    peer: Peer | None = None  # how other engines find this one
    cache_model: str = ""  # with format and block size what block hashes begin with
    cache_format: str = ""
    block_bytes: int = 0  # of KV, over all layers
    engines: list[Ready] = []  # of a router's Ready


class Progress(Message, frozen=True):
    """Where start-up is: `done` of `total` (bytes while weights load)."""

    stage: str
    done: int
    total: int


class Fatal(Message, frozen=True):
    """The engine cannot start or cannot go on; `message` is one line for people."""

    message: str


class Stopped(Message, frozen=True):
    """The engine has drained and is about to exit."""


class WantSnapshot(Message, frozen=True):
    """A router has missed changes of this engine's cache, or of its machine's pool; answered by CacheSnapshot."""

    of_pool: bool = False


class CacheEvents(Message, frozen=True):
    """What came into the engine's cache, or its machine's pool, and what left it. Only engines of a cluster say so."""

    events: KVEvents


class CacheSnapshot(Message, frozen=True):
    """All that the engine's cache, or its machine's pool, holds."""

    snapshot: KVSnapshot


ToEngine = AddRequest | CancelRequest | Watch | ResetPrefixCache | Drain | Explain | Peers | WantSnapshot
FromEngine = Tokens | Failed | Record | Report | Ready | Progress | Fatal | Stopped | CacheEvents | CacheSnapshot
