"""Streamed answers of OpenAI-compatible servers: the body of a request, and the events of its answer with their times.

Knows the JSON of completions and chat completions. Does not know connections, arrival processes or figures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec

from penstock.bench.datasets import BenchRequest, Vocabulary


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Event(msgspec.Struct):
    """What is looked at in an event; everything else is skipped without being made."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode
_encode = msgspec.json.Encoder().encode


def body_of(
    request: BenchRequest,
    model: str,
    vocabulary: Vocabulary | None,
    *,
    chat: bool,
    ignore_eos: bool = False,
    extra: dict[str, Any] | None = None,
) -> bytes:
    """The JSON of a streaming request that asks for a usage chunk. `extra` fields win over ours."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if chat:
        text = request.text
        if text is None:
            assert request.token_ids is not None and vocabulary is not None
            text = vocabulary.text_of(request.token_ids)
        body["messages"] = [{"role": "user", "content": text}]
        body["max_completion_tokens"] = request.num_output
    else:
        body["prompt"] = request.text if request.token_ids is None else request.token_ids
        body["max_tokens"] = request.num_output
    if ignore_eos:
        body["ignore_eos"] = True
    return _encode({**body, **(extra or {})})


@dataclass(slots=True)
class Outcome:
    """What one request gave. Times in seconds of time.perf_counter.

    `token_times_s`: arrival of each event that carried text; a request that showed no text has the time of its first
    event there. `num_prompt`, `num_output`: as the server counted them, where it did. `error` is "" for a success.
    """

    num_prompt: int
    num_output: int = 0
    asked_s: float = 0.0  # when it was to be sent; later than that, the client itself held it back
    start_s: float = 0.0
    end_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    text: str = ""
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """From sending to the first text."""
        return self.token_times_s[0] - self.start_s if self.token_times_s else 0.0

    @property
    def latency_s(self) -> float:
        """From sending to the last event with a choice."""
        return self.end_s - self.start_s

    @property
    def itls_s(self) -> list[float]:
        """Gaps between events that carried text."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]


class StreamReader:
    """Fed with the body of one streamed answer; keeps what a benchmark wants to know."""

    def __init__(self, num_prompt: int) -> None:
        self.outcome = Outcome(num_prompt)
        self.is_done = False
        self.finish_reason: str | None = None
        self._texts: list[str] = []
        self._rest = b""
        self._first_s: float | None = None

    def feed(self, data: bytes, now_s: float) -> None:
        """Bytes that arrived at `now_s`; cut anywhere."""
        data = self._rest + data
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        *blocks, self._rest = data.split(b"\n\n")
        for block in blocks:
            for line in block.split(b"\n"):
                if line.startswith(b"data:"):
                    self._event(line[5:].strip(), now_s)

    def finish(self) -> Outcome:
        """The outcome, when the body has ended. Without a usage chunk, an event counts as a token."""
        outcome = self.outcome
        outcome.text = "".join(self._texts)
        if not outcome.token_times_s and self._first_s is not None:
            outcome.token_times_s.append(self._first_s)
        if not outcome.num_output:
            outcome.num_output = len(outcome.token_times_s)
        if not outcome.error and self._first_s is None:
            outcome.error = "the stream ended without a choice"
        elif not outcome.error and not self.is_done and self.finish_reason is None:
            outcome.error = "the stream ended before its answer did"
        return outcome

    def _event(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.is_done = True
            return
        try:
            event = _decode(data)
        except msgspec.DecodeError as error:
            self.outcome.error = f"an event is not JSON of the expected shape: {error}"
            return
        if event.error is not None:
            said = event.error
            self.outcome.error = str(said.get("message", said) if isinstance(said, dict) else said)
        if event.usage is not None:
            self.outcome.num_prompt = event.usage.prompt_tokens or self.outcome.num_prompt
            self.outcome.num_output = event.usage.completion_tokens
        for choice in event.choices or ():
            text = choice.text
            delta = choice.delta
            if delta is not None:
                text = delta.content or delta.reasoning or delta.reasoning_content
            if text:
                self._texts.append(text)
                self.outcome.token_times_s.append(now_s)
            if self._first_s is None:
                self._first_s = now_s
            self.outcome.end_s = now_s
            self.finish_reason = choice.finish_reason or self.finish_reason
