"""The front end's side of an engine: requests in, pieces of text out. A state machine over messages.

Fans a request out into its `n` samples, chooses limits and seeds, refuses what cannot run, turns the engine's tokens
into text, finds stop strings, and remembers where the time of finished requests went. No asyncio, no socket, no clock:
`send` is given, `now` comes in. The HTTP server and the offline `LLM` drive the same object, from one thread.

Does not know HTTP, chat messages or how text became the prompt's token ids.
"""

from __future__ import annotations

import logging
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import msgspec

from penstock.core.plan import Logprobs
from penstock.core.request import FINISH_ABORT, FINISH_ERROR, FINISH_STOP, SamplingParams, child_seed
from penstock.engine.messages import (
    AddRequest,
    CancelRequest,
    Drain,
    Failed,
    Fatal,
    FromEngine,
    Progress,
    Ready,
    Report,
    RequestRecord,
    Stopped,
    ToEngine,
    TokenDelta,
    Tokens,
)
from penstock.engine.text import OutputText
from penstock.engine.tokenizer import Tokenizer

log = logging.getLogger("penstock.client")

MAX_RECORDS = 1000  # finished requests that are remembered
MAX_ENDING = 4096  # ended here and not yet confirmed by the engine

LOADING, READY, DRAINING, STOPPED, DEAD = "loading", "ready", "draining", "stopped", "dead"


class RequestError(ValueError):
    """A request is refused, or it failed. `status` as in HTTP: 400 its own fault, 429 and 503 come back later,
    500 ours. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: float = 1.0
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s


class Observer(Protocol):
    """Sees what passes through a front end; must be quick and must not raise. `now` in seconds, engine's clock.

    A request id here is the engine's: one per sample (see FrontEnd.submit). `params` are the user's.
    """

    def received(self, request_id: str, num_prompt_tokens: int, params: SamplingParams, now: float) -> None:
        """A sample was sent to the engine."""
        ...

    def emitted(self, request_id: str, num_new_tokens: int, now: float) -> None:
        """Tokens of one step arrived and their text is on its way."""
        ...

    def finished(self, request_id: str, record: RequestRecord | None, finish_reason: str, now: float) -> None:
        """A sample ended; the record is None if the engine did not live to send it, or failed the request."""
        ...

    def rejected(self, reason: str, now: float) -> None:
        """A request was turned away before it reached the engine: queue_full, loading, draining, stopped, dead."""
        ...

    def message(self, message: FromEngine, now: float) -> None:
        """Any message of the engine, before it is acted on."""
        ...


class Output(msgspec.Struct):
    """What is new for one sample of a request. `text` and `token_ids` are increments and never taken back.

    `finish_reason` ("stop", "length", "abort", "error") comes once per sample; `is_last` with the last sample of the
    request. With `error` the whole request failed, and nothing follows.
    """

    request_id: str
    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[Logprobs] | None = None  # one per token id, if asked for
    prompt_logprobs: list[Logprobs | None] | None = None  # with the first output of sample 0, if asked for
    is_last: bool = False
    error: RequestError | None = None


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request between `submit` and its last output. Written by the front end, read by whoever submitted it."""

    request_id: str
    token_ids: list[int]  # the prompt, after truncation
    params: SamplingParams  # max_tokens resolved
    seed: int
    num_unfinished: int
    num_cached: int = 0  # prompt tokens that the cache served, for sample 0
    num_generated: int = 0  # over all samples

    def sample_id(self, index: int) -> str:
        """The engine's id of a sample: the request's own when there is one, `{id}.{index}` otherwise."""
        return self.request_id if self.params.n == 1 else f"{self.request_id}.{index}"


@dataclass(slots=True, eq=False)
class _Sample:
    request: LiveRequest
    index: int
    text: OutputText | None
    may_match: bool  # it has stop strings
    num_tokens: int = 0


class FrontEnd:
    """All requests of one engine. `vocab_size` is the model's: ids in parameters and prompts must be below it.

    `max_queued`: requests waiting for a place above which new ones are refused with 429; None: no limit.
    `seeds` gives the seed of a request without one. Until the engine says Ready every request is refused with 503.
    """

    def __init__(
        self,
        send: Callable[[ToEngine], None],
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        max_queued: int | None = None,
        seeds: Callable[[], int] | None = None,
        observers: tuple[Observer, ...] = (),
    ) -> None:
        self.send = send
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_queued = max_queued
        self.observers = observers
        self.state = LOADING
        self.stage = Progress("starting", 0, 0)
        self.ready: Ready | None = None
        self.report: Report | None = None
        self.dead_reason = ""
        self.requests: dict[str, LiveRequest] = {}
        self.records: dict[str, RequestRecord] = {}  # by the engine's id, oldest first
        self._seeds = seeds or partial(random.Random().getrandbits, 64)
        self._samples: dict[str, _Sample] = {}
        self._ending: dict[str, str] = {}  # engine's id -> finish reason, until the engine confirms
        self._finish_times_s: deque[float] = deque(maxlen=64)

    # ---- requests ----

    @property
    def num_in_flight(self) -> int:
        """Samples that the engine has and that have not ended."""
        return len(self._samples)

    @property
    def num_places(self) -> int:
        """Samples that can run at once: as many as run while others wait, else the engine's limit. After Ready."""
        assert self.ready is not None
        report = self.report
        return report.num_running if report is not None and report.num_waiting else self.ready.max_num_seqs

    @property
    def num_queued(self) -> int:
        """Samples beyond what can run at once."""
        return 0 if self.ready is None else max(0, len(self._samples) - self.num_places)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output in tokens. Only after Ready."""
        assert self.ready is not None
        return self.ready.max_model_len

    def check_open(self, num_samples: int, now: float) -> None:
        """Raise RequestError if `num_samples` more cannot be taken: 503 unless ready, 429 when too many wait, 400 when
        so many never can."""
        if self.state != READY:
            for observer in self.observers:
                observer.rejected(self.state, now)
            if self.state == LOADING:
                stage = self.stage
                share = f" ({100 * stage.done // stage.total} %)" if stage.total else ""
                raise RequestError(503, f"the model is still loading: {stage.stage}{share}", code=LOADING)
            words = {DRAINING: "is shutting down", STOPPED: "has shut down"}
            message = (
                f"the server {words[self.state]}" if self.state in words else f"the engine died: {self.dead_reason}"
            )
            raise RequestError(503, message, code=self.state)
        if self.max_queued is None:
            return
        num_queued, num_places = self.num_queued, self.num_places
        most = self.max_queued + num_places
        if num_samples > most:
            message = f"the request has {num_samples} sequences, at most {most} can ever run and wait"
            raise RequestError(400, message, code="too_many_sequences", param="n")
        num_after = len(self._samples) + num_samples - num_places
        # A request with many samples may overshoot an empty queue, or it could never run.
        may_overshoot = num_samples > 1 and num_queued == 0
        if num_after > self.max_queued and not may_overshoot:
            for observer in self.observers:
                observer.rejected("queue_full", now)
            own = "" if num_samples == 1 else f" and this one has {num_samples} sequences"
            message = f"{num_queued} requests are waiting{own}; at most {self.max_queued} may wait"
            retry_after_s = self._retry_after_s(num_queued, now)
            raise RequestError(429, message, code="queue_full", retry_after_s=retry_after_s)

    def is_free(self, request_id: str, num_samples: int) -> bool:
        """Whether a request may have this id: none that the engine still knows is called so."""
        if request_id in self.requests:
            return False
        ids = [request_id] if num_samples == 1 else [f"{request_id}.{index}" for index in range(num_samples)]
        return not any(sample_id in self._samples or sample_id in self._ending for sample_id in ids)

    def submit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        params: SamplingParams,
        now: float,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        adapter: str = "",
        salt: str = "",
        prefill_at: tuple[str, ...] = (),
    ) -> LiveRequest:
        """Check a request and send its samples to the engine. Outputs follow from `handle`, under `request_id`.

        The engine knows sample i as `{request_id}.{i}`, or as `request_id` when n is 1. `max_tokens` is lowered to the
        room that the prompt leaves. Raises RequestError (nothing was sent then) or ParamsError; does not look at the
        queue limit (`check_open`).
        """
        if self.ready is None or self.state != READY:
            self.check_open(params.n, now)
        if not self.is_free(request_id, params.n):
            raise RequestError(400, f"request id {request_id!r} is in use", code="duplicate_id", param="request_id")
        prompt = self._truncated(token_ids, params)
        room = self.max_model_len - len(prompt)
        if room < 1:
            message = (
                f"the prompt has {len(prompt)} tokens, at most {self.max_model_len - 1} fit: "
                f"this model's maximum length is {self.max_model_len} tokens, prompt and output together"
            )
            raise RequestError(400, message, code="context_length_exceeded", param="prompt")
        self._check_ids(prompt, params)
        prompt = list(prompt)
        max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        bad_words_ids = params.bad_words_ids
        if params.bad_words and not bad_words_ids:
            bad_words_ids = self.tokenizer.encode_bad_words(params.bad_words)
        params = replace(params, max_tokens=max_tokens, bad_words_ids=bad_words_ids)
        seed = self._seeds() if params.seed is None else params.seed
        request = self.requests[request_id] = LiveRequest(request_id, prompt, params, seed, params.n)
        for index in range(params.n):
            sample_id = request.sample_id(index)
            # All samples have the same prompt: its log probabilities are computed once.
            own = params if index == 0 or params.prompt_logprobs is None else replace(params, prompt_logprobs=None)
            self.send(
                AddRequest(
                    request_id=sample_id,
                    token_ids=prompt,
                    params=own,
                    seed=child_seed(seed, index),
                    arrival_s=now,
                    deadline_s=deadline_s,
                    priority=priority,
                    adapter=adapter,
                    salt=salt,
                    end_ids=self.tokenizer.eos_ids,
                    prefill_at=prefill_at,
                )
            )
            text = OutputText(self.tokenizer, prompt, params) if params.detokenize else None
            self._samples[sample_id] = _Sample(request, index, text, bool(params.stop))
            for observer in self.observers:
                observer.received(sample_id, len(prompt), params, now)
        return request

    def cancel(self, request_id: str, now: float) -> None:
        """End a request for which nobody waits any more. No outputs follow. Unknown ids are ignored."""
        request = self.requests.pop(request_id, None)
        if request is None:
            return
        for index in range(request.params.n):
            sample_id = request.sample_id(index)
            if sample_id in self._samples:
                self._end(sample_id, FINISH_ABORT, now)
                if self.state not in (STOPPED, DEAD):
                    self.send(CancelRequest(sample_id))

    def drain(self, until_s: float) -> None:
        """Refuse new requests from now on; the engine finishes the running ones until `until_s`, then says Stopped."""
        if self.state in (LOADING, READY):
            self.state = DRAINING
            self.send(Drain(until_s))

    # ---- messages of the engine ----

    def handle(self, message: FromEngine, now: float) -> list[Output]:
        """Take one message in; what it means for the requests."""
        for observer in self.observers:
            observer.message(message, now)
        if isinstance(message, Tokens):
            outputs = []
            for delta in message.deltas:
                sample = self._samples.get(delta.request_id)
                if sample is not None:
                    try:
                        outputs.append(self._advance(sample, delta, now))
                    except Exception as error:  # one request's text must not cost the others of this step theirs
                        outputs += self._give_up(sample.request, error, now)
                elif delta.finish_reason is not None:
                    self._confirm(delta.request_id, delta.record, now)
            return outputs
        if isinstance(message, Report):
            self.report = message
        elif isinstance(message, Failed):
            return self._failed(message, now)
        elif isinstance(message, Ready):
            self.ready = message
            if self.state == LOADING:
                self.state = READY
        elif isinstance(message, Progress):
            self.stage = message
        elif isinstance(message, Fatal):
            return self.engine_lost(message.message, now)
        elif isinstance(message, Stopped):
            self.state = STOPPED
            return self._fail_all(RequestError(503, "the server has shut down", code=STOPPED), now)
        return []

    def engine_lost(self, reason: str, now: float) -> list[Output]:
        """The engine is gone and will not answer: every request fails."""
        if self.state not in (STOPPED, DEAD):
            self.state, self.dead_reason = DEAD, reason
        return self._fail_all(RequestError(503, f"the engine died: {self.dead_reason}", code=DEAD), now)

    def _advance(self, sample: _Sample, delta: TokenDelta, now: float) -> Output:
        """One step's tokens of one sample."""
        request, sample_id, token_ids = sample.request, delta.request_id, delta.token_ids
        finish_reason, stop_reason, logprobs, text = delta.finish_reason, delta.stop_reason, delta.logprobs, ""
        if sample.text is not None:
            if finish_reason is None:
                text = sample.text.feed(token_ids)
            else:
                text = sample.text.close(token_ids, finish_reason)
            match = sample.text.match if sample.may_match else None
            if match is not None:
                num_own = match.num_tokens - sample.num_tokens  # tokens after the match are not the sequence's
                token_ids = token_ids[:num_own]
                logprobs = None if logprobs is None else logprobs[:num_own]
                if finish_reason is None:
                    self.send(CancelRequest(sample_id, FINISH_STOP, match.stop))
                finish_reason, stop_reason = FINISH_STOP, match.stop
        num_new = len(token_ids)
        sample.num_tokens += num_new
        request.num_generated += num_new
        if sample.index == 0 and delta.num_cached:
            request.num_cached = delta.num_cached
        if num_new:
            for observer in self.observers:
                observer.emitted(sample_id, num_new, now)
        is_last = False
        if finish_reason is not None:
            request.num_unfinished -= 1
            is_last = request.num_unfinished == 0
            if is_last:
                self.requests.pop(request.request_id, None)
            self._end(sample_id, finish_reason, now)
            if delta.finish_reason is not None:
                self._confirm(sample_id, delta.record, now)
        return Output(
            request.request_id,
            sample.index,
            text,
            token_ids,
            finish_reason,
            stop_reason,
            logprobs,
            delta.prompt_logprobs,
            is_last,
        )

    def _end(self, sample_id: str, finish_reason: str, now: float) -> None:
        """Nothing more goes out for a sample. The engine has yet to confirm, with its record."""
        del self._samples[sample_id]
        self._finish_times_s.append(now)
        self._ending[sample_id] = finish_reason
        if len(self._ending) > MAX_ENDING:
            self._confirm(next(iter(self._ending)), None, now)

    def _confirm(self, sample_id: str, record: RequestRecord | None, now: float) -> None:
        """The engine is done with a sample that ended; its record is kept."""
        finish_reason = self._ending.pop(sample_id, None)
        if finish_reason is None:
            return
        if record is not None:
            self.records[sample_id] = record
            if len(self.records) > MAX_RECORDS:
                del self.records[next(iter(self.records))]
        for observer in self.observers:
            observer.finished(sample_id, record, finish_reason, now)

    def _give_up(self, request: LiveRequest, error: Exception, now: float) -> list[Output]:
        """A bug of ours met one request: it fails, and is ended at the engine."""
        log.exception("request %s failed in the front end", request.request_id)
        self.cancel(request.request_id, now)
        failure = RequestError(500, f"{type(error).__name__} while the answer was put together", code="internal_error")
        return [Output(request.request_id, 0, "", (), FINISH_ERROR, is_last=True, error=failure)]

    def _failed(self, message: Failed, now: float) -> list[Output]:
        """The engine ended one sample with an error: its whole request fails."""
        sample = self._samples.get(message.request_id)
        if sample is None:
            self._confirm(message.request_id, None, now)
            return []
        if message.code == 404:  # the answer to a question about a request that has just ended
            return []
        self._end(message.request_id, FINISH_ERROR, now)
        self._confirm(message.request_id, None, now)
        request = sample.request
        self.cancel(request.request_id, now)
        codes = {400: "invalid_request", 503: "no_room", 504: "deadline_exceeded"}
        error = RequestError(message.code, message.message, code=codes.get(message.code, "engine_error"))
        return [Output(request.request_id, sample.index, "", (), FINISH_ERROR, is_last=True, error=error)]

    def _fail_all(self, error: RequestError, now: float) -> list[Output]:
        outputs = [
            Output(request_id, 0, "", (), FINISH_ERROR, is_last=True, error=error) for request_id in self.requests
        ]
        for sample_id in list(self._samples):
            self._end(sample_id, FINISH_ERROR, now)
        for sample_id in list(self._ending):
            self._confirm(sample_id, None, now)
        self.requests.clear()
        return outputs

    # ---- checks ----

    def _truncated(self, prompt: Sequence[int], params: SamplingParams) -> Sequence[int]:
        """The last `truncate_prompt_tokens` tokens; -1: as many as leave room for `max_tokens`."""
        keep = params.truncate_prompt_tokens
        if keep is None:
            return prompt
        if keep == -1:
            keep = max(1, self.max_model_len - (params.max_tokens or 1))
        if keep < 1:
            message = f"truncate_prompt_tokens must be -1 or at least 1, got {keep}"
            raise RequestError(400, message, code="invalid_value", param="truncate_prompt_tokens")
        return prompt[-keep:]

    def _check_ids(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Prompt and parameters hold ids of the vocabulary only."""
        if not prompt:
            raise RequestError(400, "the prompt is empty", code="empty_prompt", param="prompt")
        given = (
            ("prompt", prompt),
            ("stop_token_ids", params.stop_token_ids),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        )
        for param, ids in given:
            if len(ids) > self.vocab_size and param != "prompt":
                message = f"{param} holds {len(ids)} ids, more than the vocabulary of {self.vocab_size}"
                raise RequestError(400, message, code="invalid_value", param=param)
            if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
                wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
                message = f"{param}: token id {wrong} is not in the vocabulary of {self.vocab_size}"
                raise RequestError(400, message, code="invalid_token_id", param=param)

    def _retry_after_s(self, num_queued: int, now: float) -> float:
        """When the queue may have moved, from the rate at which the last requests ended: 1 to 60 s."""
        times_s = self._finish_times_s
        if len(times_s) < 2 or now <= times_s[0]:
            return 1.0
        rate_per_s = len(times_s) / (now - times_s[0])
        return min(60.0, max(1.0, math.ceil(num_queued / rate_per_s)))
