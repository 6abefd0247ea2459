"""The load generator: sends prepared requests when their time has come, and collects what each one gave.

Knows arrival times, a bound on requests in flight, and requests as bytes. Does not know datasets, figures or flags.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from penstock.bench.openai_stream import Outcome, StreamReader
from penstock.server.http_client import BrokenAnswer, HttpServer

MAX_REFUSAL = 300  # characters of a refusal that are told


@dataclass(frozen=True, slots=True)
class Shot:
    """One request, ready to be sent. `at_s`: seconds after the start of the run; `num_prompt` as known here."""

    request: bytes
    num_prompt: int
    at_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Run:
    """What a load gave: outcomes in the order of arrival times, and the time of the whole in seconds."""

    outcomes: list[Outcome]
    duration_s: float


def arrivals(num: int, rate: float, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds after the start at which `num` requests are sent at `rate` per second; all 0 for an infinite rate.

    Gaps are gamma distributed with shape `burstiness` (1: Poisson; less: bursts; inf: even), and scaled so that the
    last arrival is at num / rate whatever the seed: as vLLM does it, so that throughputs of different seeds compare.
    """
    if rate == float("inf"):
        return [0.0] * num
    if burstiness == float("inf"):
        gaps = np.full(num, 1.0 / rate)
    else:
        gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), num)
    times = np.cumsum(gaps)
    if times[-1] > 0:
        times *= num / rate / times[-1]
    return times.tolist()  # type: ignore[no-any-return]


async def fire(server: HttpServer, shot: Shot, timeout_s: float | None = None) -> Outcome:
    """Send one request now and read its stream. Whatever goes wrong is in the outcome's `error`."""
    reader = StreamReader(shot.num_prompt)
    asked_s = time.perf_counter()
    start_s = asked_s
    error = ""
    try:
        exchange = await server.exchange(shot.request, reader.feed, timeout_s)
        start_s = exchange.sent_s
        if exchange.status != 200:
            error = f"{exchange.status}: {exchange.text()[:MAX_REFUSAL]}"
    except BrokenAnswer as broken:
        error = str(broken)
    outcome = reader.finish()
    outcome.asked_s, outcome.start_s = asked_s, start_s
    outcome.error = error or outcome.error
    if outcome.error:
        outcome.end_s = time.perf_counter()
    return outcome


async def run_load(
    server: HttpServer,
    shots: Sequence[Shot],
    *,
    max_concurrency: int | None = None,
    timeout_s: float | None = None,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> Run:
    """Fire `shots` at their times, at most `max_concurrency` at once, and wait for all."""
    gate = asyncio.Semaphore(max_concurrency or len(shots) or 1)
    tasks: list[asyncio.Task[Outcome]] = []

    async def one(shot: Shot) -> Outcome:
        due_s = time.perf_counter()
        async with gate:
            outcome = await fire(server, shot, timeout_s)
        outcome.asked_s = due_s
        on_outcome(outcome)
        return outcome

    gc.collect()
    gc.freeze()  # the requests stay until the end: no collection needs to look at them
    try:
        begin_s = time.perf_counter()
        for shot in sorted(shots, key=lambda shot: shot.at_s):
            delay_s = begin_s + shot.at_s - time.perf_counter()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            tasks.append(asyncio.ensure_future(one(shot)))
        outcomes = await asyncio.gather(*tasks)
        return Run(outcomes, time.perf_counter() - begin_s)
    finally:
        gc.unfreeze()
        for task in tasks:
            task.cancel()
