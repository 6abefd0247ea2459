"""A server that plans ahead, in a pool so small that requests must wait, recorded: the same tokens and plans again."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.e2e.serving import MAX_MODEL_LEN, RealServer

from penstock.engine.recorder import replay

ASKED: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "top_p": 1.0}
NUM_REQUESTS = 12


def answers(server: RealServer) -> list[str]:
    """Texts of requests that run at the same time, some of them with a long beginning in common."""
    beginning = "A story that many tell. " * 20

    def ask(number: int) -> str:
        prompt = (beginning if number % 3 else "") + f"Story number {number} begins:"
        return str(server.complete(prompt, seed=number, priority=number % 2, **ASKED)["choices"][0]["text"])

    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        return list(pool.map(ask, range(NUM_REQUESTS)))


def test_depth_2_in_a_tiny_pool_gives_the_same_tokens_and_replays(server: RealServer, tmp_path: Path) -> None:
    record = tmp_path / "record.bin"
    tiny = ("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", "4M")
    more = ("--async-scheduling", "on", "--scheduling-policy", "priority", "--max-num-batched-tokens", "48")
    with RealServer(*tiny, *more, "--record-path", str(record)) as other:
        other.until_ready()
        num_blocks = other.snapshot()["engines"][0]["kv"]["num_blocks"]
        assert MAX_MODEL_LEN // 32 <= num_blocks < 2 * NUM_REQUESTS  # not all of them fit
        assert answers(other) == answers(server)
        other.until_idle()
        other.process.send_signal(signal.SIGTERM)
        assert other.wait() == 0
    assert replay(record) > ASKED["max_tokens"]
