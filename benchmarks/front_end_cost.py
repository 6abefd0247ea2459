"""What does the front end cost per streamed token, and how much later does a client see it?

Three processes, as in `penstock serve`: the real server (run_server: HTTP, front end, detokeniser, metrics, live page's
observer), an engine that computes nothing and gives every request one token each --step-ms, and this one, the clients:
plain sockets that stream /v1/completions. Before a figure counts, every stream must have got exactly its tokens' text.

Per number of streams one JSON line: CPU microseconds of the server process per token (requests' own cost included),
and milliseconds from the engine's send to the client's read, which also holds the wire, the kernel and the client. On a
machine that is busy or has few cores, the latter says more about the machine than about the server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, pre_tokenizers

from penstock.config.schema import Config, ModelOptions, ServerOptions
from penstock.engine.messages import AddRequest, CancelRequest, Drain, Ready, Stopped, TokenDelta, Tokens
from penstock.engine.tokenizer import Tokenizer
from penstock.engine.wire import dial
from penstock.server.backend import OneEngine
from penstock.server.chat import ChatRenderer
from penstock.server.serve import run_server
from penstock.server.state import Served

WORDS = "abcdefghijklmnopqrstuvwxyz "


def byte_tokenizer() -> Tokenizer:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = LibraryTokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return Tokenizer(library)


def text_of(num_tokens: int) -> str:
    return (WORDS * (num_tokens // len(WORDS) + 1))[:num_tokens]


# ---- the engine's process ----


def engine(address: str, stamps_path: str, num_streams: int, num_tokens: int, step_s: float) -> None:
    """Stream s's token k is the k-th letter; when it was sent is written to stamps[s, k]."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stamps = np.memmap(stamps_path, dtype=np.float64, mode="r+", shape=(num_streams, num_tokens))
    letters = byte_tokenizer().encode(text_of(num_tokens))
    wire = dial(address)
    wire.send(Ready("none", 8192, 32, 1000, num_streams, "none", [], []))
    running: dict[str, list[int]] = {}
    due = time.monotonic()
    while True:
        for message in wire.receive():
            if isinstance(message, AddRequest):
                running[message.request_id] = [int(message.request_id[1:]), 0, message.params.max_tokens or 0]
            elif isinstance(message, CancelRequest):
                running.pop(message.request_id, None)
            elif isinstance(message, Drain):
                wire.send(Stopped())
                wire.close()
                return
        if not running:
            wire.wait(0.05)
            due = time.monotonic()
            continue
        now = time.monotonic()
        deltas = []
        for request_id, state in list(running.items()):
            stream, position, limit = state
            stamps[stream, position] = now
            state[1] = position + 1
            is_last = position + 1 == limit
            deltas.append(TokenDelta(request_id, [letters[position]], "length" if is_last else None))
            if is_last:
                del running[request_id]
        wire.send(Tokens(deltas, now))
        due = max(due + step_s, time.monotonic())
        time.sleep(due - time.monotonic() if due > time.monotonic() else 0)


# ---- the server's process ----


def server(port: int, engine_arguments: list[str]) -> int:
    tokenizer = byte_tokenizer()
    options = ServerOptions(port=port, disable_log_stats=True)
    config = Config(model=ModelOptions(served_model_name=("none",)), server=options)

    def launch(address: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, __file__, "--engine", address, *engine_arguments])

    return run_server(config, OneEngine(launch), lambda: Served(("none",), "none", tokenizer, ChatRenderer({}), 256))


# ---- the clients ----


async def stream(port: int, index: int, num_tokens: int) -> tuple[str, list[float]]:
    """(text, when each chunk was read) of one stream."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    body = {"prompt": "Once upon a time", "max_tokens": num_tokens, "stream": True, "request_id": f"s{index}"}
    encoded = json.dumps(body).encode()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(encoded)
        + encoded
    )
    data, read_s = b"", []
    while piece := await reader.read(1 << 16):
        now = time.monotonic()
        read_s += [now] * piece.count(b'"text":"')
        data += piece
    writer.close()
    lines = [line for line in data.split(b"\n") if line.startswith(b"data: {")]
    return "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines), read_s


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(num_streams: int, num_tokens: int, step_s: float, port: int) -> dict[str, Any]:
    """Start a server, stream, stop it."""
    with tempfile.NamedTemporaryFile() as file:
        np.memmap(file.name, dtype=np.float64, mode="w+", shape=(num_streams, num_tokens)).flush()
        arguments = [file.name, str(num_streams), str(num_tokens), str(step_s)]
        process = subprocess.Popen([sys.executable, __file__, "--server", str(port), *arguments])
        try:
            await until_ready(port)
            await asyncio.gather(*[stream(port, index, 5) for index in range(min(8, num_streams))])
            before_s, begin_s = cpu_s(process.pid), time.monotonic()
            results = await asyncio.gather(*[stream(port, index, num_tokens) for index in range(num_streams)])
            used_s, wall_s = cpu_s(process.pid) - before_s, time.monotonic() - begin_s
        finally:
            process.terminate()
            process.wait(30)
        stamps = np.memmap(file.name, dtype=np.float64, mode="r", shape=(num_streams, num_tokens))
        delays_ms = []
        for index, (text, read_s) in enumerate(results):
            assert text == text_of(num_tokens), f"stream {index} got another text"
            delays_ms += [1e3 * (read - sent) for read, sent in zip(read_s, stamps[index], strict=False)]
    quantiles = statistics.quantiles(delays_ms, n=100)
    return {
        "num_streams": num_streams,
        "num_tokens": num_streams * num_tokens,
        "step_ms": step_s * 1e3,
        "server_cpu_us_per_token": round(1e6 * used_s / (num_streams * num_tokens), 2),
        "tokens_per_s": round(num_streams * num_tokens / wall_s),
        "delay_p50_ms": round(quantiles[49], 3),
        "delay_p99_ms": round(quantiles[98], 3),
        "load_average": os.getloadavg()[0],
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


async def until_ready(port: int) -> None:
    for _ in range(600):
        await asyncio.sleep(0.1)
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            continue
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        head = await reader.read()
        writer.close()
        if head.startswith(b"HTTP/1.1 200"):
            return
    raise RuntimeError("the server does not become ready")


def main() -> int:
    if sys.argv[1:2] == ["--engine"]:
        address, path, num_streams, num_tokens, step_s = sys.argv[2:]
        engine(address, path, int(num_streams), int(num_tokens), float(step_s))
        return 0
    if sys.argv[1:2] == ["--server"]:
        return server(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64, 500])
    parser.add_argument("--tokens", type=int, default=200, help="per stream")
    parser.add_argument("--step-ms", type=float, default=30.0)
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    for num_streams in arguments.streams:
        told = asyncio.run(measure(num_streams, arguments.tokens, arguments.step_ms / 1e3, arguments.port))
        print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
