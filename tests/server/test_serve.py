"""A server as its user meets it: a process with an engine's process. Start, port in use, signals, death."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.ports import free_port
from tests.server.harness import assert_error
from tests.server.scripted_engine import DIE
from tests.server.tiny_model import MODEL, tiny_tokenizer

from penstock.config.schema import Config, ModelOptions, ServerOptions
from penstock.config.values import ConfigError
from penstock.server.chat import Conversation
from penstock.server.port import listening_socket
from penstock.server.serve import sampling_defaults, served_model

SCRIPT = Path(__file__).with_name("serve_scripted.py")
ROOT = SCRIPT.parents[2]
PROMPT = {"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}


class Process:
    """serve_scripted.py on a free port."""

    def __init__(self, **options: Any) -> None:
        self.port = options.setdefault("port", free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
        self.popen = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(options)],
            env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def get(self, path: str) -> httpx.Response | None:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + path, timeout=10)
        return None

    def until_ready(self) -> list[Any]:
        """Wait for 200 on /health; what it said before."""
        said: list[Any] = []
        deadline_s = time.monotonic() + 60
        while time.monotonic() < deadline_s:
            assert self.popen.poll() is None, self.popen.communicate()[1]
            response = self.get("/health")
            if response is not None and response.status_code == 200:
                return said
            if response is not None:
                said.append(response.json())
            time.sleep(0.02)
        raise AssertionError("the server never became ready")

    def end(self, timeout_s: float = 30.0) -> tuple[int, str]:
        """(exit code, standard error), once it has ended."""
        _, errors = self.popen.communicate(timeout=timeout_s)
        return self.popen.returncode, errors

    def engine_pid(self) -> int:
        """The child that is the scripted engine."""
        for task in Path(f"/proc/{self.popen.pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                if "scripted_engine" in Path(f"/proc/{child}/cmdline").read_text(encoding="utf-8"):
                    return int(child)
        raise AssertionError("no engine process")


@pytest.fixture
def start() -> Iterator[Any]:
    processes: list[Process] = []

    def begin(**options: Any) -> Process:
        processes.append(Process(**options))
        return processes[-1]

    yield begin
    for process in processes:
        if process.popen.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)
            process.popen.communicate()
        assert process.popen.stderr is not None
        process.popen.stderr.close()


class Streaming(threading.Thread):
    """One streaming request of many tokens in the background; `text` is what came, `error` an event that said so."""

    def __init__(self, url: str, max_tokens: int = 200) -> None:
        super().__init__(daemon=True)
        self.url, self.max_tokens = url, max_tokens
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.start()
        assert self.begun.wait(20)

    def run(self) -> None:
        body = {**PROMPT, "max_tokens": self.max_tokens, "stream": True}
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=30) as response,
        ):
            for line in response.iter_lines():
                self.lines.append(line)
                self.begun.set()


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_it_answers_while_loading_serves_and_drains_on_sigterm(start: Any) -> None:
    process = start(step_s=0.02)
    said = process.until_ready()
    assert all(answer["status"] == "loading" for answer in said)
    answer = httpx.post(f"{process.url}/v1/completions", json=PROMPT)
    assert answer.status_code == 200
    assert answer.json()["model"] == MODEL
    engine = process.engine_pid()
    running = Streaming(process.url)
    process.popen.send_signal(signal.SIGTERM)
    refused = process.get("/v1/models")
    while refused is not None and process.get("/health").status_code == 200:
        time.sleep(0.01)
    refused = httpx.post(f"{process.url}/v1/completions", json=PROMPT)
    assert_error(refused, 503, code="draining")
    running.join(20)
    assert running.lines[-2:] == ["data: [DONE]", ""], "what runs is finished"
    code, errors = process.end()
    assert code == 0, errors
    assert "shutting down" in errors
    assert "Traceback" not in errors
    assert not is_alive(engine)


def test_a_signal_before_the_server_has_said_that_it_is_ready_drains_too(start: Any) -> None:
    """Readiness is told at the next look; until what came before has ended, the server answers that it drains."""
    look_s = 0.6
    process = start(step_s=0.01, look_s=look_s, start_s=1.5 * look_s)
    process.until_ready()
    running = Streaming(process.url, max_tokens=300)
    process.popen.send_signal(signal.SIGTERM)
    time.sleep(1.5 * look_s)
    assert running.is_alive()
    assert_error(httpx.post(f"{process.url}/v1/completions", json=PROMPT), 503, code="draining")
    running.join(20)
    assert running.lines[-2:] == ["data: [DONE]", ""], "what runs is finished"
    code, errors = process.end()
    assert code == 0, errors


def test_ctrl_c_twice_kills_at_once(start: Any) -> None:
    process = start(step_s=0.05, shutdown_timeout=60)
    process.until_ready()
    engine = process.engine_pid()
    running = Streaming(process.url, max_tokens=5000)
    process.popen.send_signal(signal.SIGINT)
    while process.get("/health").status_code == 200:
        time.sleep(0.01)
    assert process.popen.poll() is None
    begin = time.monotonic()
    process.popen.send_signal(signal.SIGINT)
    code, _ = process.end(10)
    assert time.monotonic() - begin < 3
    assert code == 128 + signal.SIGINT
    running.join(10)
    deadline_s = time.monotonic() + 5
    while is_alive(engine) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not is_alive(engine)


def test_a_drain_has_an_end(start: Any) -> None:
    """What does not finish within the shutdown time-out is aborted, and its client is told."""
    process = start(step_s=0.05, shutdown_timeout=0.5)
    process.until_ready()
    running = Streaming(process.url, max_tokens=5000)
    begin = time.monotonic()
    process.popen.send_signal(signal.SIGTERM)
    code, errors = process.end()
    assert code == 0, errors
    assert time.monotonic() - begin < 8
    running.join(10)
    chunks = [json.loads(line[6:]) for line in running.lines if line.startswith("data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "abort"


def test_the_engines_death_is_told_and_ends_the_server(start: Any) -> None:
    process = start(step_s=0.02)
    process.until_ready()
    running = Streaming(process.url, max_tokens=5000)
    os.kill(process.engine_pid(), signal.SIGKILL)
    code, errors = process.end()
    assert code == 1
    [line] = [line for line in errors.splitlines() if "the engine died" in line]
    assert "SIGKILL" in line
    assert "Traceback" not in errors
    running.join(10)
    told = json.loads(running.lines[-4].removeprefix("data: "))
    assert told["error"]["code"] == "dead"
    assert running.lines[-2] == "data: [DONE]"


def test_a_request_that_kills_the_engine_gets_an_answer(start: Any) -> None:
    process = start()
    process.until_ready()
    response = httpx.post(f"{process.url}/v1/completions", json={**PROMPT, "prompt": [DIE]}, timeout=30)
    assert_error(response, 503, code="dead")
    assert process.end()[0] == 1


@pytest.mark.parametrize("where", ["load", "launch"])
def test_a_start_that_fails_is_one_line(start: Any, where: str) -> None:
    process = start(**{"break": where})
    code, errors = process.end()
    assert code == 1
    assert [line for line in errors.splitlines() if line.startswith("ERROR")] == [
        "ERROR there is no such " + ("tokenizer" if where == "load" else "engine")
    ]
    assert "Traceback" not in errors


def test_a_port_in_use_is_found_before_anything_starts(start: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        begin = time.monotonic()
        code, errors = start(port=port).end()
    assert code == 2
    assert f"{port} is in use by" in errors
    assert f"process {os.getpid()}" in errors
    assert f"--port {port + 1}" in errors
    assert f"PORT={port + 1}" in errors
    assert errors.count("\n") == 1
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize(
    ("options", "words"),
    [({"host": "203.0.113.7"}, "203.0.113.7"), ({"ssl_certfile": "/nowhere.pem"}, "ssl-certfile")],
)
def test_what_cannot_be_listened_on_is_one_line(start: Any, options: dict[str, Any], words: str) -> None:
    code, errors = start(**options).end()
    assert code == 2
    assert words in errors
    assert errors.count("\n") == 1


def test_the_socket_listens_from_the_first_moment() -> None:
    with listening_socket(ServerOptions(port=0)) as sock, pytest.raises(ConfigError):
        listening_socket(ServerOptions(port=sock.getsockname()[1]))


def test_sampling_defaults_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    assert sampling_defaults(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 5, "do_sample": True}))
    assert sampling_defaults(tmp_path) == {"temperature": 0.6, "top_k": 20}
    path.write_text(json.dumps({"temperature": 0.6, "do_sample": False, "max_new_tokens": 7}))
    assert sampling_defaults(tmp_path) == {"max_new_tokens": 7}


@pytest.mark.parametrize("text", ["[1]", "{", '{"top_p": "x"}', '{"temperature": -5}', '{"max_new_tokens": 0}'])
def test_sampling_defaults_that_no_request_could_run_with_are_the_models_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json: .*--generation-config vllm"):
        sampling_defaults(tmp_path)


def test_a_model_is_served_under_its_names_with_its_template(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages[0].content }}")
    config = Config(model=ModelOptions(model=str(tmp_path), chat_template=str(template)))
    served = served_model(config, tmp_path, tiny_tokenizer(), 400)
    try:
        assert served.names == (str(tmp_path),)
        assert served.chat.render_sync(Conversation([{"role": "user", "content": "hi"}])) == "hi"
    finally:
        served.chat.close()
    named = Config(model=ModelOptions(served_model_name=("a", "b"), chat_template="{{"))
    with pytest.raises(ValueError, match="template"):
        served_model(named, tmp_path, tiny_tokenizer(), 400)
