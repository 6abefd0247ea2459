"""/v1/chat/completions and /v1/completions: from an HTTP request to its answer, whole or as a stream.

One path for both: read, check, turn into token ids, submit, then collect or stream the outputs, and cancel what runs
when the client leaves. JSON shapes are in `shapes`, checks in `requests`. Does not know the engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.request import SamplingParams
from penstock.engine.client import LiveRequest
from penstock.engine.tokenizer import TokenizerError
from penstock.server import live_shapes
from penstock.server.answers import DONE, KEEP_ALIVE, Answer, ChatAnswer, CompletionAnswer, Wishes, event
from penstock.server.chat import Conversation
from penstock.server.errors import ApiError, bad_request, model_not_found
from penstock.server.kv_transfer import Transfer
from penstock.server.limits import ClientGone, read_body
from penstock.server.requests import (
    read_prompts,
    read_request,
    refuse_unsupported,
    sampling_params,
    valid_request_id,
    warn_unknown,
)
from penstock.server.schema import ChatRequest, CompletionRequest, Sampling
from penstock.server.shapes import Json, TokenNames
from penstock.server.state import ServerState, Stream, as_api_error

log = logging.getLogger("penstock.server")

STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx must not wait for more
)


@dataclass(slots=True)
class Call:
    """One HTTP call with all that its answer needs."""

    request_id: str
    prompts: list[list[int]]
    params: SamplingParams
    answer: Answer
    body: Sampling
    headers: dict[str, str]


Prepare = Callable[[ServerState, HttpRequest, bytes], Awaitable[Call]]


def endpoint(state: ServerState, prepare: Prepare) -> Callable[[HttpRequest], Awaitable[ASGIApp]]:
    """The route function of a kind of call."""

    async def answer(request: HttpRequest) -> ASGIApp:
        body = await read_body(request, state.options.max_body_bytes)
        state.check_open(1)
        call = await prepare(state, request, body)
        transfer = Transfer.asked(call.body.kv_transfer_params, state)
        state.check_open(len(call.prompts) * call.params.n)
        if call.params.bad_words:  # once for all prompts, and off the loop when there are many
            call.params = await state.encode_bad_words(call.params)
        stream = Stream(bool(call.body.stream), state.now())
        requests = state.submit(
            call.request_id,
            call.prompts,
            call.params,
            stream,
            priority=call.body.priority,
            salt=call.body.cache_salt or "",
            prefill_at=transfer.prefill_at,
        )
        call.answer.begin(requests)
        if state.options.enable_log_requests:
            _log_request(call, requests)
        room = requests[0].params.max_tokens
        if room != call.params.max_tokens and _asked_tokens(call.body) is not None:
            _warn(call.headers, f"max_tokens lowered to {room}: the model's length allows no more")
        if call.body.stream:
            return EventStream(state, call, requests, stream)
        return await _collect(state, call, requests, stream, request.receive, transfer)

    return answer


async def prepare_chat(state: ServerState, request: HttpRequest, body: bytes) -> Call:
    """Check a chat request, render its conversation, tokenise it."""
    asked, unknown, params = await state.run(len(body), lambda: _read_chat(state, body))
    model = check_model(state, asked.model)
    options = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        options.setdefault("reasoning_effort", asked.reasoning_effort)
    text = await state.render(
        Conversation(
            asked.messages,
            tools=None if asked.tool_choice == "none" else asked.tools,
            documents=asked.documents,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            chat_template=asked.chat_template,
            chat_template_kwargs=options,
        )
    )
    prompts = await state.encode(
        [text], bool(asked.add_special_tokens), may_truncate=asked.truncate_prompt_tokens is not None
    )
    request_id = _choose_id(state, request, asked, 1, params.n)
    role = state.options.response_role if asked.add_generation_prompt else str(asked.messages[-1]["role"])
    prefix = _echoed(asked, role) if asked.echo else ""
    names = TokenNames(state.served.tokenizer, asked.return_tokens_as_token_ids)
    wishes = _wishes(asked, params.logprobs)
    answer = ChatAnswer(f"chatcmpl-{request_id}", model, _clock_s(), names, wishes, role, prefix)
    return Call(request_id, prompts, params, answer, asked, _headers(request_id, unknown))


def _read_chat(state: ServerState, body: bytes) -> tuple[ChatRequest, list[str], SamplingParams]:
    asked, unknown = read_request(body, ChatRequest)
    refuse_unsupported(asked)
    return asked, unknown, sampling_params(asked, state.served.default_sampling)


async def prepare_completion(state: ServerState, request: HttpRequest, body: bytes) -> Call:
    """Check a completion request and tokenise its prompts."""
    asked, unknown, params, given = await state.run(len(body), lambda: _read_completion(state, body))
    model = check_model(state, asked.model)
    words = [prompt for prompt in given if isinstance(prompt, str)]
    encoded = iter(
        await state.encode(
            words, asked.add_special_tokens is not False, may_truncate=asked.truncate_prompt_tokens is not None
        )
    )
    prompts = [next(encoded) if isinstance(prompt, str) else prompt for prompt in given]
    request_id = _choose_id(state, request, asked, len(prompts), params.n)
    names = TokenNames(state.served.tokenizer, asked.return_tokens_as_token_ids)
    answer = CompletionAnswer(
        f"cmpl-{request_id}",
        model,
        _clock_s(),
        names,
        _wishes(asked, params.logprobs),
        echo=_texts(state, given) if asked.echo else None,
        shows_output=not (asked.echo and asked.max_tokens == 0),
    )
    return Call(request_id, prompts, params, answer, asked, _headers(request_id, unknown))


def _read_completion(
    state: ServerState, body: bytes
) -> tuple[CompletionRequest, list[str], SamplingParams, list[str | list[int]]]:
    asked, unknown = read_request(body, CompletionRequest)
    refuse_unsupported(asked)
    return asked, unknown, sampling_params(asked, state.served.default_sampling), read_prompts(asked.prompt)


def _texts(state: ServerState, prompts: Sequence[str | list[int]]) -> list[str]:
    """The prompts as text. Raises ApiError for ids that no vocabulary has."""
    decode = state.served.tokenizer.decode
    try:
        return [p if isinstance(p, str) else decode(p, skip_special_tokens=False) for p in prompts]
    except TokenizerError as error:
        raise bad_request(str(error), "prompt") from None


def check_model(state: ServerState, name: str | None) -> str:
    """The served name to tell back. Raises ApiError 404 for a model that is not served; none means the only one."""
    names = state.served.names
    if not name:
        return names[0]
    if name not in names:
        raise model_not_found(name, names)
    return name


def _asked_tokens(body: Sampling) -> int | None:
    """The limit that the client itself set."""
    asked = body.max_completion_tokens if isinstance(body, ChatRequest) else None
    return body.max_tokens if asked is None else asked


def _log_request(call: Call, requests: Sequence[LiveRequest]) -> None:
    """Sizes and numbers, no text."""
    params = requests[0].params
    log.info(
        "request %s: prompts of %s tokens, n %d, max_tokens %s, temperature %g, top_p %g, top_k %d, %s",
        call.request_id,
        [len(request.token_ids) for request in requests],
        params.n,
        params.max_tokens,
        params.temperature,
        params.top_p,
        params.top_k,
        "stream" if call.body.stream else "whole",
    )


def _clock_s() -> int:
    return int(time.time())


def _wishes(asked: Sampling, num_logprobs: int | None) -> Wishes:
    options = asked.stream_options
    return Wishes(
        num_logprobs=num_logprobs,
        num_prompt_logprobs=asked.prompt_logprobs,
        token_ids=asked.return_token_ids,
        usage=options is not None and bool(options.include_usage),
        running_usage=options is not None and bool(options.include_usage and options.continuous_usage_stats),
    )


def _choose_id(state: ServerState, request: HttpRequest, asked: Sampling, num_prompts: int, num_samples: int) -> str:
    """The body's request_id, else the header's or a new one; with a suffix while that is in use."""
    request_id: str = request.scope["state"]["request_id"]
    if asked.request_id is not None:
        if not valid_request_id(asked.request_id):
            raise bad_request("request_id may hold letters, digits and ._:- only, at most 128", "request_id")
        request_id = asked.request_id
    return state.free_id(request_id, num_prompts, num_samples)


def _headers(request_id: str, unknown: list[str]) -> dict[str, str]:
    headers = {"x-request-id": request_id}
    warning = warn_unknown(unknown)
    if warning is not None:
        _warn(headers, warning)
    return headers


def _warn(headers: dict[str, str], text: str) -> None:
    before = headers.get("x-penstock-warning")
    headers["x-penstock-warning"] = text if before is None else f"{before}; {text}"


def _echoed(asked: ChatRequest, role: str) -> str:
    """vLLM's echo: the last message's text, if the answer continues it."""
    content = asked.messages[-1].get("content")
    return content if asked.messages[-1].get("role") == role and isinstance(content, str) else ""


# ---- answers ----


@asynccontextmanager
async def _watched(
    state: ServerState, requests: Sequence[LiveRequest], stream: Stream, receive: Receive
) -> AsyncIterator[None]:
    """Cancels the requests when the client leaves, and whatever still runs at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        state.end(requests)
        stream.leave()

    watcher = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        watcher.cancel()
        state.end(requests)


async def _explained(state: ServerState, request: LiveRequest) -> Json | None:
    """Where the time of a request's first sample went, in the form of /explain."""
    record = await state.record(request.sample_id(0))
    if record is None:
        return None
    track = live_shapes.Track(
        record.request_id,
        record.prompt_tokens,
        record.arrival_s,
        record.first_token_s,
        record.finish_s,
        record.generation_tokens,
        record.finish_s,
        record.finish_reason,
        record,
    )
    told = live_shapes.explain(track, state.now())
    route = state.explain_route(request.sample_id(0))
    if route is not None:
        told["route"] = live_shapes.told_route(route, time.time() - state.now())
    return told


async def _collect(
    state: ServerState,
    call: Call,
    requests: list[LiveRequest],
    stream: Stream,
    receive: Receive,
    transfer: Transfer,
) -> Response:
    """The answer in one piece."""
    num_open = len(requests)
    async with _watched(state, requests, stream, receive):
        while num_open:
            for output in await stream.next():
                if output.error is not None:
                    raise as_api_error(output.error)
                call.answer.add(output)
                num_open -= output.is_last
        if call.body.explain:
            call.answer.explained = await _explained(state, requests[0])
    whole = transfer.told(call.answer.whole(), requests)
    return Response(msgspec.json.encode(whole), media_type="application/json", headers=call.headers)


class EventStream:
    """The answer as server-sent events. Nothing is sent before the first output, so that an early failure still gets
    a status of its own; later ones become an error event."""

    def __init__(self, state: ServerState, call: Call, requests: list[LiveRequest], stream: Stream) -> None:
        self.state, self.call, self.requests, self.stream = state, call, requests, stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A task of its own: a wake-up for a token then does not walk down through all the middleware.
        await asyncio.ensure_future(self._write(scope, receive, send))

    async def _write(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, call, answer, num_open = self.state, self.call, self.call.answer, len(self.requests)
        send_body: Send = scope["state"]["send"]
        has_begun = False
        try:
            async with _watched(state, self.requests, self.stream, receive):
                while num_open:
                    outputs = await self.stream.next()  # many at once when the client is slower than the engine
                    events = [] if outputs else [KEEP_ALIVE]
                    for output in outputs:
                        if output.error is not None:
                            raise as_api_error(output.error)
                        num_open -= output.is_last
                        if num_open == 0 and call.body.explain:
                            answer.explained = await _explained(state, self.requests[0])
                        events.append(answer.chunks(output))
                    if num_open == 0:
                        events.append(answer.end())
                    body = b"".join(events)
                    if not body:
                        continue
                    if not has_begun:
                        await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
                        has_begun = True
                    await send_body({"type": "http.response.body", "body": body, "more_body": num_open > 0})
        except ClientGone:
            return
        except ApiError as error:
            if not has_begun:
                await error.response()(scope, receive, send)
                return
            await send_body({"type": "http.response.body", "body": event(error.body) + DONE, "more_body": False})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        return [*STREAM_HEADERS, *((name.encode(), value.encode()) for name, value in self.call.headers.items())]
