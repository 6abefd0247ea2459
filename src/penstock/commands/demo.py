"""`penstock demo`: one whole round trip in the terminal. Starts a server, chats, streams, shows facts, stops it.

Uses the server as any client would; knows only its URL and its process id.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from penstock.commands.arguments import parse_or_help
from penstock.commands.chat import facts
from penstock.commands.openai_http import OpenAIServer, ServerError
from penstock.config.flags import FlagParser
from penstock.config.load import BUILT_IN_MODELS

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0
QUESTION = "Hello! Who are you?"
STORY = "Tell me a short story about a cat and a red ball."
MORE = "Tell me more."


class DemoFailed(RuntimeError):
    """The round trip did not work; one line for people."""


def main(arguments: list[str]) -> int:
    parser = FlagParser(prog="penstock demo", description="One whole round trip: start, chat, stream, facts, stop.")
    parser.add_argument("model", nargs="?", default=BUILT_IN_MODELS[0], help="model to show [penstock-tiny]")
    parsed = parse_or_help(parser, arguments)
    if parsed is None:
        return 0
    with tempfile.TemporaryDirectory(prefix="penstock-demo-") as folder:
        log = Path(folder) / "server.log"
        port = _free_port()
        command = [sys.executable, "-m", "penstock.cli", "serve", parsed.model, "--port", str(port)]
        print(f"$ penstock serve {parsed.model} --port {port}")
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            _show(process, OpenAIServer(f"http://127.0.0.1:{port}", timeout_s=120.0))
        except (DemoFailed, ServerError) as error:
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            print(f"\npenstock demo: {error}\nthe server's last lines:", file=sys.stderr)
            print("\n".join("  " + line for line in tail), file=sys.stderr)
            return 1
        finally:
            _end(process)
    return 0


def _show(process: subprocess.Popen[bytes], server: OpenAIServer) -> None:
    started = time.perf_counter()
    _wait_until_ready(process, server)
    model = server.model()
    print(f"ready after {time.perf_counter() - started:.1f} s: {model} at {server.url}\n")

    body: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 60}
    print(f"> {QUESTION}")
    answer = server.post("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": QUESTION}]})
    print(answer["choices"][0]["message"]["content"].strip() + "\n")

    print(f"> {STORY}   (streamed)")
    messages = [{"role": "user", "content": STORY}]
    text, usage = _stream(server, {**body, "max_tokens": 100, "messages": messages})
    print(f"> {MORE}   (what came before is in the prefix cache)")
    messages += [{"role": "assistant", "content": text}, {"role": "user", "content": MORE}]
    _, usage = _stream(server, {**body, "max_tokens": 40, "messages": messages})
    if not usage.get("completion_tokens"):
        raise DemoFailed("the stream ended without tokens or without usage")

    process.send_signal(signal.SIGTERM)
    try:
        code = process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DemoFailed(f"the server did not stop within {STOP_TIMEOUT_S:.0f} s of SIGTERM") from None
    if code != 0:
        raise DemoFailed(f"the server left with exit code {code} after SIGTERM")
    print("stopped. Next: make serve, then penstock chat, or open the page the server names.")


def _stream(server: OpenAIServer, body: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Print a streamed answer and its facts; returns its text and usage."""
    usage: dict[str, Any] = {}
    pieces: list[str] = []
    started = time.perf_counter()
    first_s = 0.0
    body = {**body, "stream_options": {"include_usage": True}}
    for event in server.stream("/v1/chat/completions", body):
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            piece = choice.get("delta", {}).get("content") or ""
            if piece and not first_s:
                first_s = time.perf_counter() - started
            pieces.append(piece)
            print(piece, end="", flush=True)
    print(f"\n  {facts(usage, first_s, time.perf_counter() - started)}\n")
    return "".join(pieces), usage


def _wait_until_ready(process: subprocess.Popen[bytes], server: OpenAIServer) -> None:
    """Until /health says 200. Raises DemoFailed when the server ends, or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoFailed(f"the server ended with exit code {process.returncode} before it was ready")
        with contextlib.suppress(ServerError):
            server.get("/health")
            return
        time.sleep(0.1)
    raise DemoFailed(f"the server was not ready within {START_TIMEOUT_S:.0f} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that nothing is left behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
