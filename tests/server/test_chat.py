from __future__ import annotations

import asyncio
import copy
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.server import chat
from penstock.server.chat import (
    ChatError,
    ChatRenderer,
    Conversation,
    RenderLimits,
    TemplateError,
    normalise_messages,
    read_chat_template,
)

QUICK = RenderLimits(time_s=1.0, max_chars=10_000, memory_bytes=256 << 20)
USER = {"role": "user", "content": "Hello"}
CHATML = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def renderer() -> Iterator[ChatRenderer]:
    """A small template of the model, and requests that may bring their own."""
    made = ChatRenderer({"default": CHATML}, {"bos_token": "<s>"}, limits=QUICK, trust_request_chat_template=True)
    yield made
    made.close()


def _render(renderer: ChatRenderer, template: str, messages: list[dict[str, Any]] | None = None, **fields: Any) -> str:
    return renderer.render_sync(Conversation(messages or [USER], chat_template=template, **fields))


# ---- what templates may use ----


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),  # trim_blocks, lstrip_blocks
        ("{% for i in [0, 1, 2] %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for i in [0, 1, 2] %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "0"),
        ("{% generation %}a{{ messages[0].content }}{% endgeneration %}b", "aHellob"),
        ("{{ {'b': '<é>', 'a': [1, none]} | tojson }}", '{"b": "<é>", "a": [1, null]}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=true, sort_keys=true, indent=1) }}",
         '{\n "a": 1,\n "b": "\\u00e9"\n}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "4"),
        ("{{ dict(a=1).a }}{{ dict.fromkeys('x') | tojson }}", '1{"x": null}'),
        ("{{ bos_token }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", "<s>TrueTrueTrue"),
        ("{{ strftime_now('%Y') | int > 2020 }}", "True"),
        ("{{ missing }}{{ missing is defined }}", "False"),
    ],
)  # fmt: skip
def test_language(renderer: ChatRenderer, template: str, expected: str) -> None:
    """The additions of transformers to Jinja."""
    assert _render(renderer, template) == expected


def test_variables(renderer: ChatRenderer) -> None:
    """Documents, tools and chat_template_kwargs reach the template; kwargs go before special tokens, after data."""
    template = "{{ tools | tojson }}{{ documents | tojson }}{{ enable_thinking }}{{ bos_token }}"
    fields = {"tools": [{"a": 1}], "documents": [{"text": "d"}]}
    text = _render(renderer, template, **fields, chat_template_kwargs={"enable_thinking": False, "bos_token": "B"})
    assert text == '[{"a": 1}][{"text": "d"}]FalseB'
    with pytest.raises(ChatError, match="messages has a field of its own") as caught:
        _render(renderer, "x", chat_template_kwargs={"messages": []})
    assert caught.value.param == "chat_template_kwargs"
    for name in ("tools", "documents"):
        with pytest.raises(ChatError, match=f"{name} must be a list of objects"):
            _render(renderer, "x", **{name: ["no"]})
    with pytest.raises(ChatError, match="no plain JSON"):
        _render(renderer, "x", chat_template_kwargs={"a": object()})
    assert (
        _render(renderer, "{{ messages[0].content }}", [{"role": "user", "content": "\ud83d \x00 日"}])
        == "\ud83d \x00 日"
    )


def test_tool_use_template() -> None:
    named = ChatRenderer({"default": "D", "tool_use": "T"})
    try:
        assert named.render_sync(Conversation([USER])) == "D"
        assert named.render_sync(Conversation([USER], tools=[])) == "D"
        assert named.render_sync(Conversation([USER], tools=[{"type": "function"}])) == "T"
    finally:
        named.close()


# ---- messages ----


def test_content_becomes_text() -> None:
    parts = [
        {"type": "text", "text": "a"},
        "b",
        {"type": "input_text", "text": "c"},
        {"type": "refusal", "refusal": "d"},
    ]
    given = [{"role": "user", "content": parts, "name": "Ann"}, {"role": "assistant", "content": None}]
    before = copy.deepcopy(given)
    assert normalise_messages(given, "") == [
        {"role": "user", "content": "a\nb\nc\nd", "name": "Ann"},
        {"role": "assistant", "content": ""},
    ]
    assert given == before


def test_tool_calls_become_objects() -> None:
    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}

    calls = [
        call('{"x": [1, "é"]}'),
        call({"y": 2}),
        call(""),
        call("{broken"),
        call("[1]"),
        {"name": "g", "arguments": "{}"},
    ]
    message = {"role": "assistant", "content": None, "tool_calls": calls}
    (result,) = normalise_messages([message], "{{ message.content }}")
    assert [c["function"]["arguments"] for c in result["tool_calls"][:5]] == [
        {"x": [1, "é"]},
        {"y": 2},
        {},
        "{broken",
        "[1]",
    ]
    assert result["tool_calls"][5] == {"name": "g", "arguments": {}}
    assert calls[0]["function"]["arguments"] == '{"x": [1, "é"]}'
    assert result["content"] == ""
    (result,) = normalise_messages([message], "{% if message['content'] is none %}")
    assert result["content"] is None


def test_developer_becomes_system() -> None:
    developer = {"role": "developer", "content": "Be brief."}
    system = {"role": "system", "content": "Be kind."}
    assert normalise_messages([developer, USER], "") == [{"role": "system", "content": "Be brief."}, USER]
    merged = [{"role": "system", "content": "Be kind.\n\nBe brief."}, USER]
    assert normalise_messages([system, developer, USER], "") == merged
    assert normalise_messages([developer, USER], "role == 'developer'") == [developer, USER]


def test_reasoning_has_both_names() -> None:
    for name in ("reasoning", "reasoning_content", "thinking"):
        (message,) = normalise_messages([{"role": "assistant", "content": "x", name: "hm"}], "")
        assert message["reasoning_content"] == message["thinking"] == "hm"


@pytest.mark.parametrize(
    ("messages", "words", "param"),
    [
        ([], "at least one message", "messages"),
        ("Hello", "at least one message", "messages"),
        ({"role": "user"}, "at least one message", "messages"),
        ([USER, 3], r"messages\[1\] must be an object, not a number", "messages[1]"),
        ([{"content": "x"}], r"messages\[0\]\.role must be a text", "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], r"messages\[0\]\.role", "messages[0].role"),
        ([{"role": "user", "content": 3}], "a text or a list of parts, not a number", "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "takes text only", "messages[0].content[0]"),
        ([{"role": "user", "content": ["a", {"type": "text"}]}], "must be a text part", "messages[0].content[1]"),
        ([{"role": "user", "content": [None]}], "must be a text part", "messages[0].content[0]"),
        ([{"role": "assistant", "tool_calls": {}}], "must be a list, not an object", "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": [{"id": 1}]}], "a function and its name", "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "tool_calls": ["f"]}], "a function and its name", "messages[0].tool_calls[0]"),
    ],
)  # fmt: skip
def test_what_is_no_message(messages: Any, words: str, param: str) -> None:
    with pytest.raises(ChatError, match=words) as caught:
        normalise_messages(messages, "")
    assert (caught.value.param, caught.value.status) == (param, 400)


def test_continue_final_message(renderer: ChatRenderer) -> None:
    """The text ends where the final message ends, in spaces if the template keeps them."""
    messages = [USER, {"role": "assistant", "content": "Once upon "}]
    fields: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    shown = renderer.render_sync(Conversation(messages, **fields))
    assert shown == "<|user|>Hello<|end|><|assistant|>Once upon "
    trims = "{% for m in messages %}{{ m.content | trim }};{% endfor %}"
    assert _render(renderer, trims, messages, **fields) == "Hello;Once upon"
    with pytest.raises(ChatError, match="cannot be continued"):
        _render(renderer, "{{ messages[0].content }}", messages, **fields)
    with pytest.raises(ChatError, match="no content to continue"):
        _render(renderer, "x", [USER, {"role": "assistant", "content": None}], **fields)
    with pytest.raises(ChatError, match="exclude each other"):
        _render(renderer, "x", messages, continue_final_message=True)


# ---- what templates may not do ----


@pytest.mark.parametrize(
    ("template", "kind", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "raised", "^roles must alternate$"),
        ("a\n{% if %}", "syntax", "^line 2: "),
        ("{{ 1 | no_such_filter }}", "syntax", "no_such_filter"),
        ("{{ ''.__class__ }}", "forbidden", "__class__"),
        ("{{ messages.__class__.__mro__ }}", "forbidden", "__class__"),
        ("{{ '' | attr('__class__') }}", "forbidden", "__class__"),
        ("{{ '{0.__class__}'.format('') }}", "forbidden", "__class__"),
        ("{{ cycler.__init__.__globals__ }}", "forbidden", "__init__"),
        ("{{ raise_exception.__globals__ }}", "forbidden", "__globals__"),
        ("{{ messages.append(1) }}", "forbidden", "append"),
        ("{% set n = namespace(__class__=1) %}", "forbidden", "__class__"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "forbidden", "__class__"),
        ("{{ missing.field }}", "undefined", "'missing' is undefined"),
        ("{{ 1 / 0 }}", "failed", "ZeroDivisionError"),
        ("{{ range(9999999) }}", "failed", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed", "nested too deeply"),
        ("{% for i in range(20000) %}x{% endfor %}", "size", "longer than 10000"),
        ("{{ 'x' * 20000 }}", "size", "longer than 10000"),
        ("{{ 'x' * 10 ** 9 }}", "memory", "memory"),
    ],
)
def test_errors_of_templates(renderer: ChatRenderer, template: str, kind: str, words: str) -> None:
    """Each is a TemplateError of its kind, a 400, and the next rendering works."""
    with pytest.raises(TemplateError, match=words) as caught:
        _render(renderer, template)
    assert (caught.value.kind, caught.value.status, caught.value.param) == (kind, 400, "chat_template")
    assert _render(renderer, "{{ messages[0].content }}") == "Hello"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ('9' * 4000) | int ** 999999 }}",  # one native call that no signal handler could interrupt
    ],
)
def test_a_template_that_hangs_is_killed(renderer: ChatRenderer, template: str) -> None:
    began = time.monotonic()
    with pytest.raises(TemplateError, match=r"longer than 1 s") as caught:
        _render(renderer, template)
    assert time.monotonic() - began < 10
    assert (caught.value.kind, caught.value.status) == ("time", 400)
    assert _render(renderer, "ok") == "ok"


def test_a_hanging_request_delays_no_other(renderer: ChatRenderer) -> None:
    """Templates of requests have a worker of their own; the model's own template is rendered meanwhile."""
    hangs = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"

    async def both() -> float:
        bad = asyncio.create_task(renderer.render(Conversation([USER], chat_template=hangs)))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        assert await renderer.render(Conversation([USER])) == "<|user|>Hello<|end|><|assistant|>"
        took = time.monotonic() - began
        assert not bad.done()
        with pytest.raises(TemplateError, match="longer than"):
            await bad
        return took

    renderer.check()  # starts the worker
    assert asyncio.run(both()) < 0.8


def test_many_at_once(renderer: ChatRenderer) -> None:
    """Concurrent renderings, good and bad, each get their own answer."""

    async def all_of_them() -> list[Any]:
        templates = ["{{ messages[0].content }}", "{{ raise_exception(messages[0].content) }}"]
        jobs = [
            renderer.render(Conversation([{"role": "user", "content": f"n{i}"}], chat_template=templates[i % 2]))
            for i in range(60)
        ]
        return await asyncio.gather(*jobs, return_exceptions=True)

    results = asyncio.run(all_of_them())
    assert [str(result) for result in results] == [f"n{i}" for i in range(60)]
    assert [isinstance(result, TemplateError) for result in results] == [i % 2 == 1 for i in range(60)]


def test_long_conversation() -> None:
    """Megabytes in and out, in characters of every length."""
    messages = [{"role": "user", "content": f"{i} aé日😀\ud83d" * 10_000} for i in range(20)]
    patient = ChatRenderer(
        {"default": "{% for m in messages %}{{ m.content }};{% endfor %}"}, limits=RenderLimits(time_s=60)
    )
    try:
        assert patient.render_sync(Conversation(messages)) == "".join(f"{m['content']};" for m in messages)
    finally:
        patient.close()


def test_a_killed_worker_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The out-of-memory killer may take a worker, idle or at work: one error at most, then a new one."""
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remember(*args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(chat.subprocess, "Popen", remember)
    own = ChatRenderer({"default": CHATML}, limits=RenderLimits(time_s=20))
    try:
        own.check()
        started[0].send_signal(signal.SIGKILL)
        started[0].wait()
        assert own.render_sync(Conversation([USER])).startswith("<|user|>")

        killing = threading.Timer(0.2, started[1].kill)
        killing.start()
        with pytest.raises(TemplateError, match="crashed") as caught:
            own.check("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
        killing.join()
        assert (caught.value.kind, caught.value.status) == ("died", 500)
        assert own.render_sync(Conversation([USER])).startswith("<|user|>")
        assert len(started) == 3
    finally:
        own.close()
    assert all(process.returncode is not None for process in started)


def test_worker_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat.sys, "executable", "/bin/false")
    broken = ChatRenderer({"default": "x"})
    try:
        with pytest.raises(TemplateError, match="does not start") as caught:
            broken.render_sync(Conversation([USER]))
        assert caught.value.status == 500
    finally:
        broken.close()


def test_closed() -> None:
    closed = ChatRenderer({"default": "x"})
    closed.close()
    closed.close()
    for call in (
        lambda: closed.render_sync(Conversation([USER])),
        lambda: asyncio.run(closed.render(Conversation([USER]))),
    ):
        with pytest.raises(TemplateError, match="closed"):
            call()


def test_worker_sees_little_of_us() -> None:
    """The worker's environment holds no secret of the server, it ends with the server, and Ctrl-C is not for it."""
    script = (
        "import os, signal, sys\n"
        "from penstock.server.chat import ChatRenderer, Conversation, _Worker, RenderLimits\n"
        "worker = _Worker(RenderLimits())\n"
        "pid = worker._process.pid\n"
        "os.kill(pid, signal.SIGINT)\n"
        "assert worker.call({'template': 'x', 'variables': {}, 'max_chars': 9}) == {'text': 'x'}\n"
        "print(pid, open(f'/proc/{pid}/environ').read(), flush=True)\n"
        "os._exit(0)\n"
    )
    source = str(Path(chat.__file__).parents[2])
    environment = {**os.environ, "PENSTOCK_API_KEY": "secret-1234", "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    pid, _, variables = done.stdout.partition(" ")
    assert "PATH=" in variables
    assert "secret-1234" not in variables
    deadline = time.monotonic() + 10
    while _runs(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _runs(int(pid))


def _runs(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_importing_chat_is_light() -> None:
    """Neither jinja2 nor torch in the server's process: templates are compiled elsewhere."""
    script = "import sys, penstock.server.chat; assert not {'jinja2', 'torch', 'transformers'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(chat.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=60)


# ---- settings ----


def test_template_of_a_request_needs_permission() -> None:
    strict = ChatRenderer({"default": "x"})
    try:
        with pytest.raises(ChatError, match="takes no chat_template in requests") as caught:
            strict.render_sync(Conversation([USER], chat_template="{{ 1 }}"))
        assert caught.value.param == "chat_template"
    finally:
        strict.close()


def test_template_of_a_request_has_a_limit(renderer: ChatRenderer) -> None:
    with pytest.raises(ChatError, match="300000 characters, more than 256000"):
        _render(renderer, "x" * 300_000)


def test_model_without_template() -> None:
    plain = ChatRenderer({})
    try:
        plain.check()
        with pytest.raises(ChatError, match="no chat template"):
            plain.render_sync(Conversation([USER]))
    finally:
        plain.close()


def test_check(renderer: ChatRenderer) -> None:
    """Start-up finds templates that cannot work, and accepts one that only refuses the trial message."""
    renderer.check()
    renderer.check("{{ raise_exception('system message first') }}")
    renderer.check("{{ messages[5].content.x }}")
    for template, kind in (
        ("{% for %}", "syntax"),
        ("{{ ''.__class__ }}", "forbidden"),
        ("{{ 'x' * 99999 }}", "size"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "time"),
    ):
        with pytest.raises(TemplateError) as caught:
            renderer.check(template)
        assert caught.value.kind == kind


def test_read_chat_template(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ 'é' }}", encoding="utf-8")
    assert read_chat_template(str(path)) == "{{ 'é' }}"
    assert read_chat_template(CHATML) == CHATML
    assert read_chat_template("a\nb") == "a\nb"
    with pytest.raises(ChatError, match="neither a file nor"):
        read_chat_template(str(tmp_path / "missing.jinja"))
    path.write_bytes(b"\xff")
    with pytest.raises(ChatError, match="cannot be read"):
        read_chat_template(str(path))
