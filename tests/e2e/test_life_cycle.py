"""From the command to the exit code: loading, draining, dying, being refused. Each server here is ended by its test."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from tests.e2e.serving import (
    MODEL,
    SMALL,
    RealServer,
    assert_error,
    events_of,
    is_running,
    penstock_command,
    streaming,
    until,
)

ENDLESS: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 1500, "ignore_eos": True}


def in_thread(function: Any, *arguments: Any) -> tuple[threading.Thread, list[Any]]:
    """A started thread and the list that gets the function's result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments)), daemon=True)
    thread.start()
    return thread, results


def test_503_while_loading_then_sigterm_drains_to_exit_code_0() -> None:
    with RealServer(*SMALL) as server:
        # HTTP answers long before the model is there.
        def first_word() -> httpx.Response | None:
            try:
                return server.http.get("/health")
            except httpx.TransportError:
                return None

        loading = until(first_word, 60, "an open port")
        assert loading.status_code == 503 and loading.json()["status"] == "loading" and loading.json()["stage"]
        assert loading.headers["retry-after"]
        early = server.post("/v1/completions", ENDLESS)
        assert "loading" in assert_error(early, 503, code="loading")
        assert early.headers["retry-after"]
        assert server.http.get("/").status_code == 200  # the page may already be open
        assert_error(server.http.get("/live/snapshot"), 503, code="loading")

        server.until_ready()
        until(lambda: "ready after" in server.output(), what="a word that it is ready")
        with streaming(server, "/v1/completions", {**ENDLESS, "max_tokens": 400, "return_token_ids": True}) as events:
            num_tokens = len(next(events)["choices"][0]["token_ids"])
            for process_id in (server.process.pid, *server.children()):  # as systemd signals a whole service
                os.kill(process_id, signal.SIGTERM)
            until(lambda: server.http.get("/health").json()["status"] == "draining", what="draining")
            refused = server.post("/v1/completions", ENDLESS)
            assert "shutting down" in assert_error(refused, 503, code="draining")
            reasons = []
            for event in events:
                for choice in event["choices"]:
                    num_tokens += len(choice.get("token_ids") or ())
                    reasons.append(choice["finish_reason"])
        assert num_tokens == 400 and reasons[-1] == "length"
        assert server.wait() == 0
        assert server.errors().count("\n") == 1 and "SIGTERM" in server.errors()
        assert server.left_over() == []


def test_keys_are_needed_and_a_second_ctrl_c_kills_at_once() -> None:
    with RealServer(*SMALL, "--api-key", "sesame", "--api-key", "other", api_key="sesame") as server:
        server.until_ready()
        with httpx.Client(base_url=server.url) as stranger:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "sesam"}):
                response = stranger.post("/v1/completions", json=ENDLESS, headers=headers)
                assert_error(response, 401, code="invalid_api_key")
            for path in ("/v1/models", "/live/snapshot", "/load", "/explain/x", "/live"):
                assert_error(stranger.get(path), 401)
            assert stranger.get("/health").status_code == stranger.get("/").status_code == 200
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError):
                wrong.models.list()
            assert wrong.with_options(api_key="other").models.list().data[0].id == MODEL
        assert "sesame" not in server.output() + server.errors()

        with streaming(server, "/v1/completions", ENDLESS) as events:
            next(events)
            server.process.send_signal(signal.SIGINT)
            until(lambda: "once more" in server.errors(), what="a word about the first Ctrl-C")
            assert server.process.poll() is None
            begin = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.wait(10) == 128 + signal.SIGINT
            assert time.monotonic() - begin < 5
        until(lambda: server.left_over() == [], 10, "the end of the engine's process")
        assert "Traceback" not in server.errors()


def test_a_killed_engine_is_told_to_everybody_and_ends_the_server() -> None:
    with RealServer(*SMALL) as server:
        server.until_ready()
        waiting, answers = in_thread(server.post, "/v1/completions", ENDLESS)
        with server.http.stream("POST", "/v1/completions", json={**ENDLESS, "stream": True}) as response:
            events = events_of(response)
            next(events)
            until(lambda: server.snapshot()["totals"]["num_requests_running"] == 2, what="both requests running")
            os.kill(server.engine_pid(), signal.SIGKILL)
            last = list(events)[-1]
        assert last["error"]["code"] == "dead" and "SIGKILL" in last["error"]["message"]
        waiting.join(20)
        assert_error(answers[0], 503, code="dead")
        assert server.wait() == 1
        assert server.errors().count("\n") == 1 and "the engine died: its process ended with SIGKILL" in server.errors()
        assert server.left_over() == []


def test_an_engine_does_not_outlive_a_killed_server() -> None:
    with RealServer(*SMALL) as server:
        server.until_ready()
        engine_pid = server.engine_pid()
        with streaming(server, "/v1/completions", ENDLESS) as events:
            next(events)
            server.process.kill()
            assert server.wait() == -signal.SIGKILL
        until(lambda: not is_running(engine_pid), 10, "the end of the engine")
        until(lambda: server.left_over() == [], 10, "the end of the template workers")


def test_a_port_in_use_is_told_before_anything_loads(server: RealServer) -> None:
    done = penstock_command("serve", MODEL, "--port", str(server.port))
    assert done.returncode == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert f"{server.port} is in use by" in line and f"process {server.process.pid}" in line
    assert f"--port {server.port + 1}" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-cache-memory-bytes", "4K"], ["--kv-cache-memory-bytes", "KiB"]),
        (["--kv-cache-memory-bytes", "1M", "--max-model-len", "2048"], ["2048", "fit"]),
        (["--max-model-len", "100000"], ["100000", "2048"]),
        (["--kv-cache-memory-bytes", "4000G"], ["--kv-cache-memory-bytes"]),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], words: list[str]) -> None:
    done = penstock_command("serve", MODEL, "--port", "0", *arguments, timeout_s=60)
    assert done.returncode == 2, done.stdout + done.stderr
    [line] = done.stderr.splitlines()
    for word in words:
        assert word in line
