"""An engine that computes nothing: it answers the front end's messages with tokens that a test can foretell.

With temperature 0 it is a parrot: output token i is prompt token i modulo the prompt's length. Otherwise token i is a
hash of (seed, i) in [1, 200). It speaks the real messages over the real wire, keeps `max_num_seqs` running and the
rest waiting, gives one token per request and step, and can be told to hold. `python scripted_engine.py ADDRESS
STEP_S START_S` runs it as a process; a prompt that holds the token `DIE` kills it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

from penstock.core.plan import Logprobs
from penstock.engine.messages import (
    AddRequest,
    CancelRequest,
    Drain,
    Explain,
    Failed,
    FromEngine,
    KVReport,
    Miss,
    Progress,
    Ready,
    Record,
    Report,
    RequestRecord,
    ResetPrefixCache,
    Span,
    Stopped,
    ToEngine,
    TokenDelta,
    Tokens,
)
from penstock.engine.wire import dial

DIE = 399  # a token id that kills the process


@dataclass
class Running:
    """One request."""

    asked: AddRequest
    admitted_s: float | None = None
    first_s: float | None = None
    token_ids: list[int] = field(default_factory=list)


def token_at(asked: AddRequest, position: int) -> int:
    """Output token `position` of a request."""
    if asked.params.temperature == 0:
        return asked.token_ids[position % len(asked.token_ids)]
    digest = hashlib.blake2b(f"{asked.seed}:{position}".encode(), digest_size=4).digest()
    return 1 + int.from_bytes(digest, "little") % 199


def logprobs_of(token_id: int, num_top: int) -> Logprobs:
    """Made-up log probabilities: the token itself is the best one."""
    others = [(token_id + k) % 256 for k in range(num_top)]
    return Logprobs([token_id, *others], [-0.25 * (k or 1) for k in range(num_top + 1)], 1)


class ScriptedEngine:
    """The engine as a state machine: `handle` a message, `step` for one token each."""

    def __init__(self, *, max_num_seqs: int = 8, max_model_len: int = 1024) -> None:
        self.max_num_seqs, self.max_model_len = max_num_seqs, max_model_len
        self.requests: dict[str, Running] = {}
        self.heard: list[ToEngine] = []
        self.holds = False
        self.num_cached = 3
        self.fail_next: tuple[int, str] | None = None
        self.draining_until_s: float | None = None
        self.num_steps = 0
        self.stopped = False

    def ready(self) -> Ready:
        return Ready(
            "scripted", self.max_model_len, 16, 100, self.max_num_seqs, "paper", [("KV", "0")], [("load", 0.1)]
        )

    def handle(self, message: ToEngine, now: float) -> list[FromEngine]:
        self.heard.append(message)
        if isinstance(message, AddRequest):
            if self.fail_next is not None:
                code, text = self.fail_next
                self.fail_next = None
                return [Failed(message.request_id, code, text)]
            assert message.request_id not in self.requests, "the front end reused an id"
            self.requests[message.request_id] = Running(message)
        elif isinstance(message, CancelRequest):
            running = self.requests.pop(message.request_id, None)
            if running is not None:
                reason = message.finish_reason
                record = self._record(running, reason, now)
                return [Tokens([TokenDelta(message.request_id, [], reason, message.stop_reason, record=record)], now)]
        elif isinstance(message, Drain):
            self.draining_until_s = message.until_s
        elif isinstance(message, Explain):
            found = self.requests.get(message.request_id)
            if found is None:
                return [Failed(message.request_id, 404, "no such request")]
            return [Record(self._record(found, None, now))]
        else:
            assert isinstance(message, ResetPrefixCache) or type(message).__name__ == "Watch"
        return []

    def step(self, now: float) -> list[FromEngine]:
        """One token for each of the first `max_num_seqs` requests; nothing while it holds."""
        out: list[FromEngine] = []
        if self.draining_until_s is not None and (not self.requests or now >= self.draining_until_s):
            deltas = [
                TokenDelta(i, [], "abort", record=self._record(r, "abort", now)) for i, r in self.requests.items()
            ]
            self.requests.clear()
            self.stopped = True
            return [*([Tokens(deltas, now)] if deltas else []), Stopped()]
        if self.holds or not self.requests:
            return out
        self.num_steps += 1
        deltas = []
        for request_id, running in list(self.requests.items())[: self.max_num_seqs]:
            deltas.append(self._advance(request_id, running, now))
        out.append(Tokens(deltas, now))
        return out

    def report(self, now: float) -> Report:
        num_running = min(len(self.requests), self.max_num_seqs)
        num_waiting = len(self.requests) - num_running
        kv = KVReport(16, 100, num_running, 0, 0, 10, 90 - num_running)
        return Report(now, num_running, num_waiting, {}, kv, self.num_steps, 0.0, 0, 0, self.num_steps, 0, 0, 0, [], [])

    def _advance(self, request_id: str, running: Running, now: float) -> TokenDelta:
        asked, params = running.asked, running.asked.params
        running.admitted_s = running.admitted_s or now
        running.first_s = running.first_s or now
        token_id = token_at(asked, len(running.token_ids))
        assert token_id != DIE or os.kill(os.getpid(), signal.SIGKILL) is None
        running.token_ids.append(token_id)
        finish_reason: str | None = None
        stop_reason: int | None = None
        if len(running.token_ids) > params.min_tokens:
            if token_id in params.stop_token_ids:
                finish_reason, stop_reason = "stop", token_id
            elif token_id in asked.end_ids and not params.ignore_eos:
                finish_reason = "stop"
        if finish_reason is None and params.max_tokens is not None and len(running.token_ids) == params.max_tokens:
            finish_reason = "length"
        prompt_logprobs = None
        if params.prompt_logprobs is not None and len(running.token_ids) == 1:
            prompt_logprobs = [None, *(logprobs_of(t, params.prompt_logprobs) for t in asked.token_ids[1:])]
        if finish_reason is not None:
            del self.requests[request_id]
        return TokenDelta(
            request_id,
            [token_id],
            finish_reason,
            stop_reason,
            None if params.logprobs is None else [logprobs_of(token_id, params.logprobs)],
            prompt_logprobs,
            min(self.num_cached, len(asked.token_ids) - 1),
            None if finish_reason is None else self._record(running, finish_reason, now),
        )

    def _record(self, running: Running, finish_reason: str | None, now: float) -> RequestRecord:
        asked = running.asked
        admitted_s = running.admitted_s or now
        return RequestRecord(
            request_id=asked.request_id,
            state="decode" if finish_reason is None else "aborted" if finish_reason == "abort" else "finished",
            prompt_tokens=len(asked.token_ids),
            cached_tokens=min(self.num_cached, len(asked.token_ids) - 1),
            generation_tokens=len(running.token_ids),
            arrival_s=asked.arrival_s,
            admitted_s=running.admitted_s,
            first_token_s=running.first_s,
            finish_s=None if finish_reason is None else now,
            finish_reason=finish_reason,
            num_preemptions=0,
            queue_reason="capacity",
            spans=[Span("queue", asked.arrival_s, admitted_s), Span("decode", admitted_s, now, len(running.token_ids))],
            miss=Miss("first_seen", self.num_cached, "nobody has sent this before"),
            block_size=16,
        )


def drive(engine: ScriptedEngine, address: str, stop: threading.Event, step_s: float = 0.001) -> None:
    """Run an engine at the engine's end of a zmq wire until it has drained or `stop` is set."""
    wire = dial(address)
    wire.send(Progress("reading weights", 1, 2))
    wire.send(engine.ready())
    last_report_s = 0.0
    try:
        while not engine.stopped and not stop.is_set():
            now = time.monotonic()
            for message in wire.receive():
                for answer in engine.handle(message, now):
                    wire.send(answer)
            for answer in engine.step(now):
                wire.send(answer)
            if now - last_report_s > 0.25:
                last_report_s = now
                wire.send(engine.report(now))
            wire.wait(0.02) if not engine.requests or engine.holds else time.sleep(step_s)
    finally:
        wire.close()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(float(sys.argv[3]))
    drive(
        ScriptedEngine(max_num_seqs=512, max_model_len=100_000),
        sys.argv[1],
        threading.Event(),
        step_s=float(sys.argv[2]),
    )
