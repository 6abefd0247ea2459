"""The answer to one call, whole or in chunks: from the front end's outputs to OpenAI's bodies and server-sent events.

A chunk that carries nothing but text, which is nearly all of them, is put together from bytes made once per choice.
Knows JSON shapes and outputs. Does not know HTTP, tasks or engines, nor when an output comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from penstock.core.plan import Logprobs
from penstock.engine.client import LiveRequest, Output
from penstock.server.shapes import (
    Json,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
    usage,
)

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

_encode = msgspec.json.Encoder().encode


def event(data: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + _encode(data) + b"\n\n"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client wants to see besides text."""

    num_logprobs: int | None = None  # best tokens per position; None: no log probabilities at all
    num_prompt_logprobs: int | None = None
    token_ids: bool = False
    usage: bool = False  # a last chunk with the counts
    running_usage: bool = False  # counts in every chunk


class Answer(Protocol):
    """How a call is answered. Either `chunks` of each output and then `end`, or `add` of each and then `whole`."""

    explained: Json | None  # told with the last finish_reason, if set by then

    def begin(self, requests: Sequence[LiveRequest]) -> None:
        """The requests that were submitted, one per prompt, in order."""
        ...

    def chunks(self, output: Output) -> bytes:
        """The events of an output; b"" if it shows nothing."""
        ...

    def end(self) -> bytes:
        """The events that close a stream."""
        ...

    def add(self, output: Output) -> None:
        """Keep an output for `whole`."""
        ...

    def whole(self) -> Json:
        """The answer in one piece."""
        ...


@dataclass(slots=True)
class _Choice:
    """What has come for one choice. `opened`: the bytes before its plain text, once the choice was opened."""

    request: LiveRequest
    index: int
    opened: bytes | None = None
    offset: int = 0  # characters so far, for text_offset
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, output: Output) -> None:
        self.texts.append(output.text)
        self.token_ids += output.token_ids
        if output.logprobs is not None:
            self.logprobs += output.logprobs
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


class _Frame:
    """What the answers of both endpoints have in common: head, choices, counts."""

    def __init__(self, head: Json, wishes: Wishes, opening: bytes, closing: bytes) -> None:
        self.head, self.wishes = head, wishes
        self.requests: Sequence[LiveRequest] = ()
        self.choices: list[_Choice] = []
        self.prompt_logprobs: dict[str, list[Logprobs | None]] = {}  # by request id
        self.is_plain = wishes.num_logprobs is None and not wishes.token_ids and not wishes.running_usage
        self._first_of: dict[str, int] = {}
        self._opening = b"data: " + _encode(head)[:-1] + b',"choices":[{"index":%d,' + opening
        self._closing = closing + (b',"usage":null' if wishes.usage else b"") + b"}\n\n"

    def begin(self, requests: Sequence[LiveRequest]) -> None:
        self.requests = requests
        for request in requests:
            self._first_of[request.request_id] = len(self.choices)
            self.choices += [_Choice(request, len(self.choices) + i) for i in range(request.params.n)]

    def choice(self, output: Output) -> _Choice:
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[output.request_id] = output.prompt_logprobs
        return self.choices[self._first_of[output.request_id] + output.index]

    def open(self, choice: _Choice) -> None:
        choice.opened = self._opening % choice.index

    def plain(self, choice: _Choice, text: str) -> bytes:
        """A chunk of an opened choice with text and nothing else."""
        assert choice.opened is not None
        return choice.opened + _encode(text) + self._closing if text else b""

    def chunk(self, choices: list[Json], **extra: object) -> bytes:
        """A chunk of any content."""
        data: Json = {**self.head, "choices": choices, **extra}
        if self.wishes.running_usage:
            data.setdefault("usage", usage(self.requests))
        elif self.wishes.usage:
            data.setdefault("usage", None)
        return event(data)

    def ended(self, choice: Json, output: Output, explained: Json | None) -> bytes:
        """The chunk with a finish_reason; the last one also explains, if asked to."""
        return self.chunk([choice], **({"explain": explained} if explained is not None and output.is_last else {}))


class ChatAnswer:
    """Answer of /v1/chat/completions. `prefix`: text that goes before the model's (echo)."""

    def __init__(
        self, call_id: str, model: str, created: int, names: TokenNames, wishes: Wishes, role: str, prefix: str
    ) -> None:
        head = {"id": call_id, "object": "chat.completion.chunk", "created": created, "model": model}
        self._frame = _Frame(head, wishes, b'"delta":{"content":', b'},"logprobs":null,"finish_reason":null}]')
        self._names, self._wishes, self._role, self._prefix = names, wishes, role, prefix
        self.explained: Json | None = None

    def begin(self, requests: Sequence[LiveRequest]) -> None:
        self._frame.begin(requests)

    def chunks(self, output: Output) -> bytes:
        frame = self._frame
        choice = frame.choice(output)
        opening = b"" if choice.opened is not None else self._open(choice)
        if frame.is_plain:
            events = opening + frame.plain(choice, output.text)
        else:
            events = opening + self._rich(choice, output)
        if output.finish_reason is None:
            return events
        ended = {**_delta(choice.index, {}), "finish_reason": output.finish_reason, "stop_reason": output.stop_reason}
        return events + frame.ended(ended, output, self.explained)

    def _open(self, choice: _Choice) -> bytes:
        frame = self._frame
        frame.open(choice)
        extra: Json = {}
        if self._wishes.token_ids:
            extra["prompt_token_ids"] = choice.request.token_ids
        positions = frame.prompt_logprobs.get(choice.request.request_id)
        if self._wishes.num_prompt_logprobs is not None and positions is not None and choice.index == 0:
            extra["prompt_logprobs"] = prompt_logprobs(self._names, positions)
        role = frame.chunk([_delta(choice.index, {"role": self._role, "content": ""})], **extra)
        return role + frame.plain(choice, self._prefix)

    def _rich(self, choice: _Choice, output: Output) -> bytes:
        if not output.text and not output.token_ids:
            return b""
        shape = _delta(choice.index, {"content": output.text})
        if self._wishes.num_logprobs is not None and output.logprobs:
            shape["logprobs"] = chat_logprobs(self._names, output.logprobs, self._wishes.num_logprobs)
        if self._wishes.token_ids:
            shape["token_ids"] = list(output.token_ids)
        return self._frame.chunk([shape])

    def end(self) -> bytes:
        frame = self._frame
        return (frame.chunk([], usage=usage(frame.requests)) if self._wishes.usage else b"") + DONE

    def add(self, output: Output) -> None:
        self._frame.choice(output).add(output)

    def whole(self) -> Json:
        frame, num_top = self._frame, self._wishes.num_logprobs
        shaped = []
        for choice in frame.choices:
            text = self._prefix + "".join(choice.texts)
            shape: Json = {
                "index": choice.index,
                "message": {"role": self._role, "content": text, "refusal": None},
                "logprobs": None if num_top is None else chat_logprobs(self._names, choice.logprobs, num_top),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }
            if self._wishes.token_ids:
                shape["token_ids"] = choice.token_ids
            shaped.append(shape)
        body = {**frame.head, "object": "chat.completion", "choices": shaped, "usage": usage(frame.requests)}
        if self._wishes.token_ids:
            body["prompt_token_ids"] = frame.requests[0].token_ids
        if self._wishes.num_prompt_logprobs is not None:
            for positions in frame.prompt_logprobs.values():
                body["prompt_logprobs"] = prompt_logprobs(self._names, positions)
        if self.explained is not None:
            body["explain"] = self.explained
        return body


def _delta(index: int, delta: Json) -> Json:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


class CompletionAnswer:
    """Answer of /v1/completions. The choices of prompt k are those from k * n on.

    `echo`: text of each prompt, or None; it comes first, with its log probabilities where those are asked for.
    `shows_output` False: echo with max_tokens 0. Only the prompt is shown, a token that was sampled is not counted.
    """

    def __init__(
        self,
        call_id: str,
        model: str,
        created: int,
        names: TokenNames,
        wishes: Wishes,
        *,
        echo: Sequence[str] | None,
        shows_output: bool,
    ) -> None:
        head = {"id": call_id, "object": "text_completion", "created": created, "model": model}
        self._frame = _Frame(head, wishes, b'"text":', b',"logprobs":null,"finish_reason":null,"stop_reason":null}]')
        self._names, self._wishes, self._echo, self._shows_output = names, wishes, echo, shows_output
        self.explained: Json | None = None

    def begin(self, requests: Sequence[LiveRequest]) -> None:
        self._frame.begin(requests)

    def chunks(self, output: Output) -> bytes:
        frame = self._frame
        choice = frame.choice(output)
        events = b"" if choice.opened is not None else self._open(choice)
        if self._shows_output:
            events += frame.plain(choice, output.text) if frame.is_plain else self._rich(choice, output)
        if output.finish_reason is None:
            return events
        ended = _piece(choice.index, "")
        ended["finish_reason"], ended["stop_reason"] = self._ending(output.finish_reason, output.stop_reason)
        return events + frame.ended(ended, output, self.explained)

    def _open(self, choice: _Choice) -> bytes:
        frame, wishes = self._frame, self._wishes
        frame.open(choice)
        positions = frame.prompt_logprobs.get(choice.request.request_id)
        shape = _piece(choice.index, self._echo_of(choice))
        if self._echo is not None and wishes.num_logprobs is not None and positions is not None:
            shape["logprobs"], choice.offset = completion_logprobs(
                self._names, positions, choice.request.token_ids, wishes.num_logprobs, 0
            )
        if wishes.num_prompt_logprobs is not None and positions is not None:
            shape["prompt_logprobs"] = prompt_logprobs(self._names, positions)
        if wishes.token_ids:
            shape["prompt_token_ids"] = choice.request.token_ids
            shape["token_ids"] = []
        is_empty = self._echo is None and not wishes.token_ids and wishes.num_prompt_logprobs is None
        return b"" if is_empty else frame.chunk([shape])

    def _rich(self, choice: _Choice, output: Output) -> bytes:
        if not output.text and not output.token_ids:
            return b""
        shape = _piece(choice.index, output.text)
        if self._wishes.num_logprobs is not None and output.logprobs:
            shape["logprobs"], choice.offset = completion_logprobs(
                self._names, output.logprobs, output.token_ids, self._wishes.num_logprobs, choice.offset
            )
        if self._wishes.token_ids:
            shape["token_ids"] = list(output.token_ids)
        return self._frame.chunk([shape])

    def end(self) -> bytes:
        return (self._frame.chunk([], usage=self._usage()) if self._wishes.usage else b"") + DONE

    def add(self, output: Output) -> None:
        self._frame.choice(output).add(output)

    def whole(self) -> Json:
        shaped = [self._whole_choice(choice) for choice in self._frame.choices]
        body = {**self._frame.head, "choices": shaped, "usage": self._usage()}
        if self.explained is not None:
            body["explain"] = self.explained
        return body

    def _whole_choice(self, choice: _Choice) -> Json:
        wishes, request = self._wishes, choice.request
        positions = self._frame.prompt_logprobs.get(request.request_id)
        text = "".join(choice.texts) if self._shows_output else ""
        shape = _piece(choice.index, self._echo_of(choice) + text)
        if wishes.num_logprobs is not None:
            all_ids: list[int] = []
            all_positions: list[Logprobs | None] = []
            if self._echo is not None and positions is not None:
                all_ids, all_positions = list(request.token_ids), list(positions)
            if self._shows_output:
                all_ids += choice.token_ids
                all_positions += choice.logprobs
            shape["logprobs"], _ = completion_logprobs(self._names, all_positions, all_ids, wishes.num_logprobs, 0)
        if wishes.num_prompt_logprobs is not None and positions is not None:
            shape["prompt_logprobs"] = prompt_logprobs(self._names, positions)
        if wishes.token_ids:
            shape["prompt_token_ids"] = request.token_ids
            shape["token_ids"] = choice.token_ids if self._shows_output else []
        shape["finish_reason"], shape["stop_reason"] = self._ending(choice.finish_reason, choice.stop_reason)
        return shape

    def _ending(self, finish_reason: str | None, stop_reason: int | str | None) -> tuple[str | None, int | str | None]:
        return (finish_reason, stop_reason) if self._shows_output else ("length", None)

    def _echo_of(self, choice: _Choice) -> str:
        return "" if self._echo is None else self._echo[choice.index // choice.request.params.n]

    def _usage(self) -> Json:
        requests = self._frame.requests
        return usage(requests, 0 if self._shows_output else sum(request.num_generated for request in requests))


def _piece(index: int, text: str) -> Json:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
