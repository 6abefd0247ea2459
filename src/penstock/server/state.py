"""What all endpoints of one server share: the front end, the texts' tools, and the streams on their way out.

Moves the engine's messages to the HTTP calls that wait for them, and words to token ids. Knows the front end by its
methods. Does not know JSON shapes, routes or sockets. Everything here runs in the server's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from penstock.config.schema import ClusterOptions, ServerOptions
from penstock.core.request import SamplingParams
from penstock.engine.client import LOADING, FrontEnd, LiveRequest, Observer, Output, RequestError
from penstock.engine.messages import Fatal, FromEngine, Progress, RequestRecord, ResetPrefixCache, ToEngine
from penstock.engine.tokenizer import Tokenizer, TokenizerError
from penstock.server.chat import ChatError, ChatRenderer, Conversation
from penstock.server.errors import ApiError, bad_request, queue_full, unavailable
from penstock.server.limits import ClientGone

log = logging.getLogger("penstock.server")

Result = TypeVar("Result")

KEEP_ALIVE_S = 15.0  # a stream that says nothing for so long sends a comment, so that proxies do not close it
OFF_LOOP_SIZE = 262_144  # bytes of JSON above which a body is read in a thread: 1 ms of the loop or so
CHARS_COST = 128  # a character is tokenised in the time of so many bytes of JSON: a thread above 2,048 characters
WORD_COST = 16  # characters that a call for one more text weighs
MAX_CHARS_PER_TOKEN = 1024  # longer than any vocabulary's token: a text above limit x this is not even tokenised


@dataclass(frozen=True, slots=True)
class Served:
    """A model as clients see it. `names`: what requests may call it, the first is told back."""

    names: tuple[str, ...]
    root: str
    tokenizer: Tokenizer
    chat: ChatRenderer
    vocab_size: int
    default_sampling: Mapping[str, Any] = field(default_factory=dict)


class Stream:
    """Outputs of one HTTP call, from the dispatcher to the task that writes them. One reader."""

    __slots__ = ("_items", "_waiter", "gone", "last_s", "wants_keep_alive")

    def __init__(self, wants_keep_alive: bool, now: float) -> None:
        self._items: list[Output] = []
        self._waiter: asyncio.Future[None] | None = None
        self.gone = False
        self.wants_keep_alive = wants_keep_alive
        self.last_s = now

    def put(self, output: Output) -> None:
        self._items.append(output)
        self.wake()

    def leave(self) -> None:
        """The client has gone: `next` raises from now on."""
        self.gone = True
        self.wake()

    def wake(self) -> None:
        """Let `next` return; with nothing to give if nothing came."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def next(self) -> list[Output]:
        """What has come since the last call, at least one output; nothing after `wake`. Raises ClientGone."""
        if not self._items and not self.gone:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self.gone:
            raise ClientGone
        items, self._items = self._items, []
        return items


class ServerState:
    """One server. `send` takes a message to the engine, `is_clogged` says that the engine does not read them.
    `explain_route`: why a request went to its engine, where there are several.

    Until `open` is called the model's texts are not loaded, and until the engine says Ready nothing is taken:
    `check_open` raises 503 then.
    """

    def __init__(
        self,
        options: ServerOptions,
        send: Callable[[ToEngine], None],
        *,
        observers: tuple[Observer, ...] = (),
        seeds: Callable[[], int] | None = None,
        is_clogged: Callable[[], bool] = lambda: False,
        explain_route: Callable[[str], dict[str, Any] | None] = lambda request_id: None,
        now: Callable[[], float] = time.monotonic,
        cluster: ClusterOptions | None = None,
    ) -> None:
        self.options = options
        self.cluster = cluster or ClusterOptions()
        self.send = send
        self.now = now
        self.explain_route = explain_route
        self.created = int(time.time())
        self._observers = observers
        self._seeds = seeds
        self._is_clogged = is_clogged
        self._served: Served | None = None
        self._front: FrontEnd | None = None
        self._early: list[FromEngine] = []  # what the engine said before `open`
        self._stage = Progress("starting", 0, 0)
        self._dead_reason: str | None = None
        self._drain_until_s: float | None = None
        self._streams: dict[str, Stream] = {}  # by the front end's request id
        self._records: dict[str, asyncio.Future[RequestRecord]] = {}
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="tokenise")

    # ---- life ----

    def open(self, served: Served) -> None:
        """The model's texts are there: make the front end and tell it what the engine has said meanwhile."""
        self._served = served
        self._front = FrontEnd(
            self.send,
            served.tokenizer,
            served.vocab_size,
            max_queued=self.options.max_num_queued_reqs,
            seeds=self._seeds,
            observers=self._observers,
        )
        early, self._early = self._early, []
        self.dispatch(early)
        if self._dead_reason is not None:
            self.engine_lost(self._dead_reason)
        elif self._drain_until_s is not None:
            self._front.drain(self._drain_until_s)

    @property
    def served(self) -> Served:
        assert self._served is not None
        return self._served

    @property
    def front(self) -> FrontEnd:
        assert self._front is not None
        return self._front

    @property
    def phase(self) -> str:
        """loading, ready, draining, stopped or dead."""
        if self._front is not None:
            return self._front.state
        return "dead" if self._dead_reason is not None else "draining" if self._drain_until_s is not None else LOADING

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health."""
        phase = self.phase
        if phase == "ready":
            return 200, {"status": "ok"}
        body: dict[str, Any] = {"status": phase}
        if phase == LOADING:
            stage = self._stage
            body["stage"] = stage.stage
            body["progress"] = round(stage.done / stage.total, 4) if stage.total else None
        elif phase == "dead":
            body["reason"] = self.dead_reason
        return 503, body

    @property
    def dead_reason(self) -> str | None:
        return self._front.dead_reason if self._front is not None and self.phase == "dead" else self._dead_reason

    def check_open(self, num_samples: int) -> None:
        """Raise ApiError 503 or 429 if `num_samples` more sequences cannot be taken now."""
        if self._front is None:
            if self.phase == LOADING:
                raise unavailable(f"the model is still loading: {self._stage.stage}", LOADING)
            raise unavailable("the server is shutting down", self.phase)
        try:
            self._front.check_open(num_samples, self.now())
        except RequestError as error:
            raise as_api_error(error) from None
        if self._is_clogged():
            raise unavailable("the engine does not read its messages", "engine_busy")

    def drain(self, until_s: float) -> None:
        """Take nothing new; what runs may finish until `until_s`."""
        self._drain_until_s = until_s
        if self._front is not None:
            self._front.drain(until_s)

    def engine_lost(self, reason: str) -> None:
        """The engine is gone: everybody who waits is told."""
        self._dead_reason = reason
        if self._front is not None:
            self._deliver(self._front.engine_lost(reason, self.now()))

    def close(self) -> None:
        """Free the threads; the model's texts are their maker's to close."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    # ---- messages ----

    def dispatch(self, messages: Sequence[FromEngine]) -> None:
        """Hand the engine's messages to the front end, and what they mean to the streams."""
        for message in messages:
            if isinstance(message, Progress):
                self._stage = message
            elif isinstance(message, Fatal):
                self._dead_reason = message.message
            if self._front is None:
                self._early.append(message)
            else:
                self._deliver(self._front.handle(message, self.now()))
                if self._records:
                    self._answer_records()

    def _deliver(self, outputs: Sequence[Output]) -> None:
        streams, now = self._streams, self.now()
        for output in outputs:
            stream = streams.get(output.request_id)
            if stream is not None:
                stream.last_s = now
                stream.put(output)

    def keep_alive(self) -> None:
        """Wake the streams that have been silent for KEEP_ALIVE_S. To be called every few seconds."""
        now = self.now()
        for stream in self._streams.values():
            if stream.wants_keep_alive and now - stream.last_s >= KEEP_ALIVE_S:
                stream.last_s = now
                stream.wake()

    @property
    def num_calls(self) -> int:
        """Requests in flight, counted as clients do: one per prompt, whatever n is."""
        return 0 if self._front is None else len(self._front.requests)

    def reset_prefix_cache(self) -> None:
        self.send(ResetPrefixCache())

    # ---- requests ----

    def free_id(self, request_id: str, num_prompts: int, num_samples: int) -> str:
        """`request_id`, or with the first suffix -1, -2 ... with which no request of that name is in flight."""
        candidate, number = request_id, 0
        while not all(self.front.is_free(sub_id(candidate, k, num_prompts), num_samples) for k in range(num_prompts)):
            number += 1
            candidate = f"{request_id}-{number}"
        return candidate

    def submit(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        stream: Stream,
        *,
        priority: int = 0,
        salt: str = "",
        prefill_at: tuple[str, ...] = (),
    ) -> list[LiveRequest]:
        """Send one request per prompt; all outputs go to `stream`. Raises ApiError, and then nothing runs."""
        now = self.now()
        timeout_s = self.options.request_timeout_s
        deadline_s = None if timeout_s is None else now + timeout_s
        requests: list[LiveRequest] = []
        try:
            for k, token_ids in enumerate(prompts):
                name = sub_id(request_id, k, len(prompts))
                request = self.front.submit(
                    name,
                    token_ids,
                    params,
                    now,
                    priority=priority,
                    deadline_s=deadline_s,
                    salt=salt,
                    prefill_at=prefill_at,
                )
                requests.append(request)
                self._streams[name] = stream
        except ValueError as error:
            self.end(requests)
            if len(prompts) > 1 and getattr(error, "param", None) == "prompt":
                raise bad_request(f"prompt[{len(requests)}]: {error}", "prompt", getattr(error, "code", None)) from None
            raise as_api_error(error) from None
        return requests

    def end(self, requests: Sequence[LiveRequest]) -> None:
        """Nobody waits for these any more: what still runs is cancelled."""
        now = self.now()
        for request in requests:
            self._streams.pop(request.request_id, None)
            self.front.cancel(request.request_id, now)

    # ---- records ----

    async def record(self, sample_id: str, timeout_s: float = 1.0) -> RequestRecord | None:
        """The engine's record of a sample that ended; it may be on its way. None if it does not come."""
        record = self.front.records.get(sample_id)
        if record is not None:
            return record
        future = self._records.setdefault(sample_id, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(future)
        except TimeoutError:
            return None
        finally:
            self._records.pop(sample_id, None)

    def _answer_records(self) -> None:
        for sample_id, waiter in self._records.items():
            record = self.front.records.get(sample_id)
            if record is not None and not waiter.done():
                waiter.set_result(record)

    # ---- texts ----

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """`work()`, in a thread if `size` (bytes or characters it goes over) is so large that the loop would stall."""
        if size <= OFF_LOOP_SIZE:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.threads, work)

    async def encode(
        self, texts: Sequence[str], add_special_tokens: bool, *, may_truncate: bool = False
    ) -> list[list[int]]:
        """Token ids of each text. Long texts are tokenised in a thread, hopelessly long ones refused."""
        limit = self.front.max_model_len
        longest = max(map(len, texts), default=0)
        if longest > limit * MAX_CHARS_PER_TOKEN and not may_truncate:
            message = f"the prompt has {longest} characters: far more than the {limit} tokens that this model takes"
            raise bad_request(message, "prompt", "context_length_exceeded")
        tokenizer = self.served.tokenizer
        try:
            num_chars = sum(map(len, texts))
            return await self.run(
                num_chars * CHARS_COST, lambda: tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
            )
        except TokenizerError as error:
            raise bad_request(str(error), "prompt") from None

    async def encode_bad_words(self, params: SamplingParams) -> SamplingParams:
        """`params` with its bad words as token ids. Raises ApiError."""
        words, tokenizer = params.bad_words, self.served.tokenizer
        size = sum(map(len, words)) + len(words) * WORD_COST
        try:
            ids = await self.run(size * CHARS_COST, lambda: tokenizer.encode_bad_words(words))
        except ValueError as error:
            raise as_api_error(error) from None
        return replace(params, bad_words_ids=ids)

    async def render(self, conversation: Conversation) -> str:
        """The prompt's text of a conversation. Raises ApiError."""
        try:
            return await self.served.chat.render(conversation)
        except ChatError as error:
            raise ApiError(error.status, str(error), param=error.param) from None


def sub_id(request_id: str, index: int, num_prompts: int) -> str:
    """Front end's id of one prompt of a request: the request's own when there is one."""
    return request_id if num_prompts == 1 else f"{request_id}-{index}"


def as_api_error(error: Exception) -> ApiError:
    """The front end's and the parameters' errors as HTTP answers."""
    param: str | None = getattr(error, "param", None)
    if not isinstance(error, RequestError):
        return bad_request(str(error), param)
    if error.status == 429:
        return queue_full(str(error), error.retry_after_s)
    if error.status == 503:
        return unavailable(str(error), error.code, error.retry_after_s)
    return ApiError(error.status, str(error), param=param, code=error.code)
