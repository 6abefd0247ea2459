"""Messages to prompt text: checks and normalises a conversation, picks the template, has it rendered elsewhere.

Templates are programs of strangers, so they run in worker processes (server/template_worker.py) with limits on time,
memory and output; a worker that breaks one is killed and replaced. This process never imports jinja2. Knows no
tokenizer, engine or HTTP: text comes out, and errors carry the status that fits them.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WORKER_FILE = Path(__file__).with_name("template_worker.py")
# All that a worker may see of our environment: how to run Python, and the time zone for strftime_now.
_WORKER_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_MARK "  # the space shows whether the template trims
_CLOSED = "the chat template renderer is closed"
_ASKS_FOR_NONE = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none")


class ChatError(ValueError):
    """A conversation that cannot be rendered. `param` names the field at fault, `status` the HTTP status."""

    def __init__(self, message: str, param: str = "messages", status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


class TemplateError(ChatError):
    """A template that cannot be compiled or rendered.

    kind: raised (by the template itself, the message is its own), syntax, forbidden (the sandbox), undefined, failed
    (another error inside), size, memory, time, died (status 500: the worker could not start or crashed).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message, param="chat_template", status=500 if kind == "died" else 400)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """What one rendering may take."""

    time_s: float = 5.0
    max_chars: int = 8_000_000  # of the text
    max_template_chars: int = 256_000  # of a template that comes with a request
    memory_bytes: int = 1 << 30  # address space of a worker, of which Python takes about 50 MB
    start_s: float = 60.0  # for a worker to come up


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the chat endpoints render; fields as in OpenAI's and vLLM's requests."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


# ---- normalising ----


def normalise_messages(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """Messages as templates expect them; the given ones stay as they are. Raises ChatError for what is no message.

    - Fields that are null are dropped (as in transformers). `content` becomes text: parts are joined by newlines (as
      in vLLM), null becomes "", or stays None beside tool calls if `template` asks whether content is none.
    - `arguments` of tool calls become objects; text that is no JSON object stays text, for the template to judge.
    - `developer` becomes `system` unless the template knows that role, joined with a system message right before it.
    - Reasoning is found under `reasoning_content` and `thinking` whichever name it came by.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ChatError("messages must be a list of at least one message")
    knows_developer = "developer" in template
    keeps_none = _ASKS_FOR_NONE.search(template) is not None
    result: list[dict[str, Any]] = []
    for i, given in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(given, Mapping):
            raise ChatError(f"{where} must be an object, not {_kind(given)}", where)
        message = {key: value for key, value in given.items() if value is not None}
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise ChatError(f"{where}.role must be a text", f"{where}.role")
        if "tool_calls" in message:
            message["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
        none_content = None if keeps_none and message.get("tool_calls") else ""
        message["content"] = _content(message.get("content", none_content), f"{where}.content")
        reasoning = next((message[name] for name in _REASONING_FIELDS if name in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        if role == "developer" and not knows_developer:
            message["role"] = "system"
            if result and result[-1]["role"] == "system":
                message["content"] = f"{result.pop()['content']}\n\n{message['content']}"
        result.append(message)
    return result


def _kind(value: Any) -> str:
    """The JSON name of a value's type, for error texts."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


def _content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ChatError(f"{where} must be a text or a list of parts, not {_kind(content)}", where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        text = part if isinstance(part, str) else None
        if isinstance(part, Mapping) and kind in _TEXT_PARTS:
            text = part.get("refusal" if kind == "refusal" else "text")
        elif isinstance(part, Mapping):
            raise ChatError(f"{where}[{i}] is of type {kind!r}; this model takes text only", f"{where}[{i}]")
        if not isinstance(text, str):
            raise ChatError(f"{where}[{i}] must be a text part", f"{where}[{i}]")
        texts.append(text)
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, (list, tuple)):
        raise ChatError(f"{where} must be a list, not {_kind(calls)}", where)
    result = []
    for i, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ChatError(f"{where}[{i}] must be an object with a function and its name", f"{where}[{i}]")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                parsed = arguments
            arguments = parsed if isinstance(parsed, dict) else arguments
            function = {**function, "arguments": arguments}
        result.append({**call, "function": function} if "function" in call else dict(function))
    return result


def read_chat_template(value: str) -> str:
    """The setting `chat_template`: the path of a file, or the text of a template. Raises ChatError if it is neither."""
    try:
        if "\n" not in value and Path(value).is_file():
            return Path(value).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ChatError(f"chat template {value!r} cannot be read: {error}", "chat_template") from error
    if not any(char in value for char in "{}\n"):
        raise ChatError(f"chat template {value!r} is neither a file nor a template's text", "chat_template")
    return value


def chosen_templates(own: Mapping[str, str], setting: str | None) -> dict[str, str]:
    """A model's templates by name, unless the setting `chat_template` takes their place. Raises ChatError."""
    return dict(own) if setting is None else {"default": read_chat_template(setting)}


# ---- rendering ----


class _Worker:
    """One rendering process. Used by one thread at a time; dead after an error that was its own."""

    def __init__(self, limits: RenderLimits) -> None:
        """Start it and wait until it is ready. Raises TemplateError "died"."""
        self._limits = limits
        self._socket, theirs = socket.socketpair()
        environment = {name: os.environ[name] for name in _WORKER_VARIABLES if name in os.environ}
        command = [sys.executable, "-P", str(_WORKER_FILE), str(limits.memory_bytes)]
        nowhere = subprocess.DEVNULL
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=theirs.fileno(), stdout=nowhere, stderr=nowhere, env=environment
            )
        try:
            self._receive(time.monotonic() + limits.start_s)
        except (OSError, EOFError) as error:
            self.kill()
            raise TemplateError("died", "the process that renders chat templates does not start") from error

    @property
    def alive(self) -> bool:
        return self._process.returncode is None and self._process.poll() is None

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send, wait, receive. Kills the process and answers with the error if it is late or dies."""
        payload = json.dumps({**request, "time_s": self._limits.time_s}, ensure_ascii=False)
        data = payload.encode("utf-8", "surrogatepass")
        end_s = time.monotonic() + self._limits.time_s
        try:
            self._socket.settimeout(self._limits.time_s)
            self._socket.sendall(struct.pack(">I", len(data)) + data)
            result: dict[str, Any] = json.loads(self._receive(end_s).decode("utf-8", "surrogatepass"))
        except TimeoutError:
            self.kill()
            return {"error": "time", "message": f"rendering takes longer than {self._limits.time_s:g} s"}
        except (OSError, EOFError, ValueError):
            self.kill()
            return {"error": "died", "message": "the process that renders chat templates has crashed"}
        if result.get("error") == "memory":
            self.kill()  # its heap is full of what it could not finish
        return result

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def _receive(self, end_s: float) -> bytes:
        (length,) = struct.unpack(">I", self._read(4, end_s))
        return self._read(length, end_s)

    def _read(self, num_bytes: int, end_s: float) -> bytes:
        parts = []
        while num_bytes:
            self._socket.settimeout(max(end_s - time.monotonic(), 1e-3))
            part = self._socket.recv(min(num_bytes, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)


class _Lane:
    """A fixed number of workers, started when first needed, and as many threads for callers that must not block."""

    def __init__(self, num_workers: int, limits: RenderLimits) -> None:
        self._limits = limits
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()  # None: a place whose worker must be started
        for _ in range(num_workers):
            self._idle.put(None)
        self._num_workers = num_workers
        self.closed = False
        self.threads = ThreadPoolExecutor(num_workers, thread_name_prefix="chat-template")

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have a free worker answer; waits for one. Raises TemplateError "died" if none starts."""
        worker = self._idle.get()
        try:
            if self.closed:
                raise TemplateError("died", _CLOSED)
            if worker is None or not worker.alive:
                if worker is not None:
                    worker.kill()
                    worker = None
                worker = _Worker(self._limits)
            return worker.call(request)
        finally:
            self._idle.put(worker if worker is not None and worker.alive else None)

    def close(self) -> None:
        """Wait for calls under way, end the workers, refuse what comes later."""
        self.closed = True
        self.threads.shutdown(wait=True, cancel_futures=True)
        for worker in [self._idle.get() for _ in range(self._num_workers)]:
            if worker is not None:
                worker.kill()
            self._idle.put(None)  # whoever still waits wakes up, and is refused


class ChatRenderer:
    """Renders conversations with a model's templates, or with a request's own where that is allowed.

    `templates`: name -> text; "default" is used, or "tool_use" if it exists and there are tools (as in transformers).
    `special_tokens`: variables of every template (bos_token, eos_token, ...). Requests' own templates have a worker
    of their own, so that a bad one delays no one else. Thread-safe. Exact: equals transformers' rendering (tests).
    """

    def __init__(
        self,
        templates: Mapping[str, str],
        special_tokens: Mapping[str, Any] | None = None,
        *,
        limits: RenderLimits | None = None,
        num_workers: int = 1,
        trust_request_chat_template: bool = False,
    ) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens or {})
        self._limits = limits or RenderLimits()
        self._trusts_requests = trust_request_chat_template
        self._own_lane = _Lane(num_workers, self._limits)
        self._request_lane = _Lane(1, self._limits)

    def check(self, template: str | None = None) -> None:
        """Compile `template`, or all of the model's, and render one message with each: for start-up.

        Also starts the worker. Raises TemplateError for a template that cannot work: syntax, time, size, memory,
        forbidden, died. One that refuses the trial message is fine: it may want others.
        """
        trial = {"messages": [{"role": "user", "content": "Hello"}], "tools": None, "documents": None}
        variables = {**self._special_tokens, **trial, "add_generation_prompt": True}
        for text in [template] if template is not None else self._templates.values():
            for given, harmless in ((None, ()), (variables, ("raised", "undefined", "failed"))):
                try:
                    self._answer(self._own_lane, text, given)
                except TemplateError as error:
                    if error.kind not in harmless:
                        raise TemplateError(error.kind, f"the chat template cannot be rendered: {error}") from None

    def render_sync(self, conversation: Conversation) -> str:
        """The prompt's text, special tokens included: encode it with add_special_tokens=False.

        Blocks, for a millisecond as a rule. Raises ChatError (TemplateError for what the template does).
        """
        lane, template, variables, final = self._prepare(conversation)
        return _cut_at_mark(self._answer(lane, template, variables), final)

    async def render(self, conversation: Conversation) -> str:
        """`render_sync` without blocking the event loop."""
        lane, template, variables, final = self._prepare(conversation)
        if lane.closed:
            raise TemplateError("died", _CLOSED)
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(lane.threads, self._answer, lane, template, variables)
        return _cut_at_mark(text, final)

    def close(self) -> None:
        """Wait for renderings under way, then end the workers."""
        self._own_lane.close()
        self._request_lane.close()

    def _answer(self, lane: _Lane, template: str, variables: dict[str, Any] | None) -> str:
        try:
            result = lane.call({"template": template, "variables": variables, "max_chars": self._limits.max_chars})
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, ChatError):
                raise
            raise ChatError(f"the conversation is no plain JSON: {error}") from error
        if "error" in result:
            raise TemplateError(result["error"], result["message"])
        text: str = result["text"]
        return text

    def _prepare(self, conversation: Conversation) -> tuple[_Lane, str, dict[str, Any], str | None]:
        """(lane, template, variables, the text to be continued or None) of a conversation."""
        lane, template = self._choose(conversation)
        messages = normalise_messages(conversation.messages, template)
        final = None
        if conversation.continue_final_message:
            if conversation.add_generation_prompt:
                raise ChatError(
                    "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
                )
            final = messages[-1]["content"]
            if not final:
                raise ChatError("the final message has no content to continue", "continue_final_message")
            messages[-1]["content"] = final + _CONTINUE_MARK
        for name in ("tools", "documents"):
            values = getattr(conversation, name)
            if values is not None and not all(isinstance(value, Mapping) for value in values):
                raise ChatError(f"{name} must be a list of objects", name)
        extra = dict(conversation.chat_template_kwargs or {})
        for name in ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"):
            if name in extra:
                raise ChatError(f"{name} has a field of its own in the request", "chat_template_kwargs")
        variables = {
            **self._special_tokens,
            **extra,
            "messages": messages,
            "tools": list(conversation.tools) if conversation.tools else None,
            "documents": list(conversation.documents) if conversation.documents is not None else None,
            "add_generation_prompt": conversation.add_generation_prompt,
        }
        return lane, template, variables, final

    def _choose(self, conversation: Conversation) -> tuple[_Lane, str]:
        template = conversation.chat_template
        if template is not None:
            if not self._trusts_requests:
                raise ChatError("this server takes no chat_template in requests", "chat_template")
            if len(template) > self._limits.max_template_chars:
                raise ChatError(
                    f"chat_template has {len(template)} characters, more than {self._limits.max_template_chars}",
                    "chat_template",
                )
            return self._request_lane, template
        name = "tool_use" if conversation.tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise ChatError(
                "this model has no chat template: start the server with --chat-template, or use /v1/completions",
                "chat_template",
            )
        return self._own_lane, self._templates[name]


def _cut_at_mark(text: str, final: str | None) -> str:
    """For continue_final_message: `text` up to the end of the final message's content."""
    if final is None:
        return text
    end = text.rfind(_CONTINUE_MARK.strip())
    if end < 0 or final.strip() not in text:
        raise ChatError("the chat template does not show the final message as it is, so it cannot be continued")
    if text.startswith(_CONTINUE_MARK, end):
        return text[:end]
    return text[:end].rstrip()  # the template trims contents, so it would have trimmed this one
