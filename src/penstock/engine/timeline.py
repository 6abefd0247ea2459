"""Where each request's time went, and why its prompt missed the cache: what `explain` and the page show.

Knows scheduler events and times. Decides nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from penstock.core.plan import Row
from penstock.core.request import FINISH_ABORT, Request
from penstock.core.scheduler import Scheduler
from penstock.engine.messages import Miss, RequestRecord, Span

MAX_SPANS = 12
ARRIVING = {"load": "loading", "transfer": "transfer"}  # span -> state
TIERS = ("host", "disk", "remote")  # other places that KV comes from are engines


@dataclass(slots=True)
class _Open:
    """A span being written."""

    kind: str
    start_s: float
    end_s: float | None = None
    num_tokens: int = 0
    place: str = ""


@dataclass(slots=True)
class _Track:
    spans: list[_Open] = field(default_factory=list)
    miss: Miss | None = None
    sources: list[tuple[str, int]] = field(default_factory=list)  # of the prompt, in order
    num_settled: int = 0  # prompt tokens whose KV was there once, and so have a source
    arriving: tuple[str, int] = ("", 0)  # what is on its way: its source, and the prompt's tokens once it is there


class Timeline:
    """Spans per live request. Fed by the engine: `queued`, `event` (the scheduler's trace), `computed`.

    `by_source`: prompt tokens of requests that are decoded here, each once, by where their KV was first had from:
    device, peer, a tier or compute. `engine`: its name, for records.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.engine = ""
        self.by_source: Counter[str] = Counter()
        self._scheduler = scheduler
        self._tracks: dict[str, _Track] = {}

    def queued(self, request: Request, now: float) -> None:
        """The request has arrived at the engine."""
        self._tracks[request.id] = _Track([_Open("queue", request.arrival_s)])

    def event(self, kind: str, request: Request, now: float) -> None:
        """The scheduler admitted or preempted a request, or waits for KV of it from elsewhere, or has it."""
        track = self._tracks.get(request.id)
        if track is None:
            return
        if kind == "received":
            if not track.arriving[0]:
                return  # a step has read it already, and waited for it
            self._arrived(track, request)
        self._close(track, now)
        if kind == "admitted":
            if track.miss is None and request.num_preemptions == 0:
                track.miss = self._miss(request, now)
                self._settle(track, request, "device", min(request.num_computed, request.prompt_len))
        elif kind == "receiving":
            flight = self._scheduler.traffic.flights[request.arriving]
            where = flight.move.src.where
            is_load = where in TIERS
            track.arriving = (where if is_load else "peer", min(flight.end, request.prompt_len))
            track.spans.append(_Open("load" if is_load else "transfer", now, place=where))
        elif kind == "preempted":
            track.arriving = ("", 0)
            track.spans.append(_Open("preempted", now))
        elif request.num_computed >= request.prompt_len:
            track.spans.append(_Open("decode", now))

    def computed(self, chunks: list[tuple[Request, Row]], start_s: float, end_s: float) -> None:
        """A step computed these prompt pieces in [start_s, end_s); a request whose prompt is done decodes from then."""
        for request, row in chunks:
            track = self._tracks.get(request.id)
            if track is None:
                continue
            last = track.spans[-1] if track.spans else None
            if last is not None and last.kind == "load" and last.end_s is not None:
                last.end_s = max(last.start_s, min(last.end_s, start_s))  # the rest of it was hidden by the step
            if last is not None and last.kind == "preempted" and last.end_s is None:
                continue  # computed by a step in flight when its blocks were taken: it will be computed again
            if last is not None and last.end_s is None and last.kind in ARRIVING:
                last.end_s = max(last.start_s, start_s)  # the step waits for it layer by layer
                self._arrived(track, request)
            self._settle(track, request, "compute", min(row.start + row.num_tokens, request.prompt_len))
            if last is not None and last.kind == "prefill" and len(track.spans) >= MAX_SPANS - 3:
                last.end_s, last.num_tokens = end_s, last.num_tokens + row.num_tokens
            else:
                track.spans.append(_Open("prefill", start_s, end_s, row.num_tokens))
            if row.samples and request.finish_reason is None:
                track.spans.append(_Open("decode", end_s))

    def drop(self, request_id: str) -> None:
        self._tracks.pop(request_id, None)

    def record(self, request: Request) -> RequestRecord:
        """Everything known of a live or just finished request."""
        track = self._tracks.get(request.id) or _Track()
        spans = track.spans[:2] + track.spans[-(MAX_SPANS - 2) :] if len(track.spans) > MAX_SPANS else track.spans
        return RequestRecord(
            request_id=request.id,
            state=self._state(request, track),
            prompt_tokens=request.prompt_len,
            cached_tokens=request.num_cached,
            generation_tokens=request.num_output,
            arrival_s=request.arrival_s,
            admitted_s=request.admitted_s,
            first_token_s=request.first_token_s,
            finish_s=request.finish_s,
            finish_reason=request.finish_reason,
            num_preemptions=request.num_preemptions,
            queue_reason=request.queue_reason,
            spans=[
                Span(s.kind, s.start_s, request.finish_s if s.end_s is None else s.end_s, s.num_tokens, s.place)
                for s in spans
            ],
            miss=track.miss,
            block_size=self._scheduler.block_size,
            engine=self.engine,
            sources=list(track.sources),
        )

    @staticmethod
    def _state(request: Request, track: _Track) -> str:
        if request.finish_reason is not None:
            return "aborted" if request.finish_reason == FINISH_ABORT else "finished"
        if not request.is_running:
            return "waiting"
        if request.arriving >= 0 and track.spans and track.spans[-1].kind in ARRIVING:
            return ARRIVING[track.spans[-1].kind]
        return "decode" if request.num_output else "prefill"

    def _arrived(self, track: _Track, request: Request) -> None:
        """What was on its way is there, or a step has already read it."""
        source, end = track.arriving
        track.arriving = ("", 0)
        num_tokens = self._settle(track, request, source, end)
        if num_tokens:
            track.spans[-1].num_tokens = num_tokens

    def _settle(self, track: _Track, request: Request, source: str, end: int) -> int:
        """The KV of the prompt up to `end` is there, what is new of it from `source`: how many tokens that is."""
        num_tokens = end - track.num_settled
        if num_tokens <= 0:
            return 0
        track.num_settled = end
        before = track.sources.pop()[1] if track.sources and track.sources[-1][0] == source else 0
        track.sources.append((source, before + num_tokens))
        if request.ticket is None:  # else whoever decodes it counts it
            self.by_source[source] += num_tokens
        return num_tokens

    @staticmethod
    def _close(track: _Track, now: float) -> None:
        if track.spans and track.spans[-1].end_s is None:
            track.spans[-1].end_s = now

    def _miss(self, request: Request, now: float) -> Miss | None:
        """Why the token after the cached prefix was not in the cache; called at first admission."""
        scheduler, at = self._scheduler, request.num_cached
        if not scheduler.kv.enabled:
            return Miss("disabled", 0, "prefix caching is off")
        if request.params.prompt_logprobs is not None:
            return Miss("disabled", 0, "log probabilities of the prompt were asked for, so all of it is computed")
        size = scheduler.block_size
        num_blocks = at // size
        if at + size >= request.prompt_len:
            return Miss("tail", at, f"the last {request.prompt_len - at} tokens are always computed")
        hash_ = request.block_hashes[num_blocks]
        evicted = max((pool.ghosts.get(hash_, -1.0) for pool in scheduler.pools), default=-1.0)
        if evicted >= 0:
            return Miss("evicted", at, f"this block was cached and given away {now - evicted:.1f} s ago")
        if num_blocks:
            return Miss("diverged", at, f"the nearest cached prompt is equal for {at} tokens, then it ends or differs")
        return Miss("first_seen", 0, "no cached prompt begins with this block")
