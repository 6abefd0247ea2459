"""How soon has a prefill engine its blocks back when the client leaves in the middle of its prompt?

Runs `penstock serve --pd 1P1D` (penstock-tiny) with its front end in this process, so that the engines' own reports can
be read as they come: a watcher asks for one after every step. --requests times a client sends a prompt of 1,900 tokens,
waits until the prefill engine computes, waits a random time more and drops its connection. Measured, on the machine's
one monotonic clock: `free_ms`, from the drop to the first report of the prefill engine in which no request holds a
block, and `behind_step_ms`, how much of that came after the end of the step that was running at the drop. What is
wanted (`kept`): free within 100 ms or, if that is later, when the step in flight has ended. A report is written where
the next step would be planned, so its time is that of the step boundary.

Prints one JSON document, --out writes it. Exit code 1 when blocks were never given back. Linux only.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import penstock.build.front_end as front_end
from penstock.bench.flags import machine, write_json
from penstock.build.serve import serve
from penstock.config.cluster import check_cluster
from penstock.config.load import resolve
from penstock.engine.messages import Report, Watch
from penstock.server.backend import ManyEngines

PROMPT_TOKENS = 1900
WANTED_S = 0.1
REPORT_S = 0.001  # after every step
TIMEOUT_S = 20.0
BOUNDARY_S = 0.005  # from a step's end to the report behind it, the prompt's blocks given back in between


class Overheard(ManyEngines):
    """The engines of a server, whose reports are kept."""

    newest: Overheard

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        Overheard.newest = self
        self.reports: list[Report] = []  # of the prefill engine

    def _receive(self, name: str, messages: Any) -> None:
        self.reports += [message for message in messages if name == "prefill-0" and isinstance(message, Report)]
        super()._receive(name, messages)

    def watch(self, seconds: float) -> None:
        """Have reports written after every step."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.send, Watch(time.monotonic() + seconds, REPORT_S))


def held(report: Report) -> int:
    """Blocks that requests hold."""
    return report.kv.used + report.kv.shared + report.kv.filling


def until(condition: Callable[[], Any]) -> Any:
    end_s = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        if time.monotonic() > end_s:
            raise TimeoutError
        time.sleep(0.0005)
    return found


def drop_one(port: int, draw: random.Random, wait_s: float) -> dict[str, float] | None:
    """One prompt and its client's end; None: it was computed before the client left."""
    engines = Overheard.newest
    engines.watch(2 * TIMEOUT_S)
    until(lambda: engines.reports and not held(engines.reports[-1]) and not engines.reports[-1].num_running)
    engines.reports.clear()
    body = {"prompt": [draw.randrange(10, 400) for _ in range(PROMPT_TOKENS)], "max_tokens": 64, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    until(lambda: any(held(report) for report in engines.reports))
    time.sleep(wait_s)
    left_s = time.monotonic()
    connection.sock.shutdown(2)
    connection.close()
    freed = until(lambda: next((r for r in engines.reports if r.now_s >= left_s and not held(r)), None))
    seen = [report for report in engines.reports if report.now_s <= freed.now_s]
    before = [report for report in seen if report.now_s < left_s]
    if not before or not held(before[-1]):
        return None
    later = [report for report in seen if report.num_steps_total > before[-1].num_steps_total]
    if freed.num_steps_total == before[-1].num_steps_total:
        step_end_s = left_s  # nothing ran
    else:
        step_end_s = later[0].now_s
    return {
        "free_ms": round(1e3 * (freed.now_s - left_s), 2),
        "step_left_ms": round(1e3 * max(0.0, step_end_s - left_s), 2),
        "behind_step_ms": round(1e3 * (freed.now_s - max(step_end_s, left_s)), 2),
        "steps_after": freed.num_steps_total - before[-1].num_steps_total,
        "kept": float(freed.now_s <= max(left_s + WANTED_S, step_end_s + BOUNDARY_S)),
    }


def distribution(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for name, q in
            (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))}  # fmt: skip


def measure(port: int, num_requests: int, seed: int, found: list[dict[str, float]], errors: list[str]) -> None:
    """All of them, then the server's end."""
    try:
        draw = random.Random(seed)
        for number in range(num_requests):
            dropped = drop_one(port, random.Random(f"{seed}/{number}"), draw.uniform(0.0, 0.08))
            if dropped is not None:
                found.append(dropped)
    except (TimeoutError, OSError) as error:
        errors.append(f"{type(error).__name__}: {error}: blocks were not given back, or the server is gone")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk", type=int, default=512, help="tokens of one step")
    parser.add_argument("--out")
    args = parser.parse_args()
    flags = {
        "model": "penstock-tiny", "pd": "1P1D", "port": 0, "max_num_batched_tokens": args.chunk, "pd_scaling": False,
        "pd_min_tokens": 64, "pd_max_short_output": 0, "kv_cache_memory_bytes": 64 << 20, "disable_log_stats": True,
    }  # fmt: skip
    config = resolve(flags)
    check_cluster(config.cluster)
    front_end.ManyEngines = Overheard
    found: list[dict[str, float]] = []
    errors: list[str] = []

    def ready(_: Any, url: str) -> None:
        port = int(url.rpartition(":")[2].strip("/"))
        arguments = (port, args.requests, args.seed, found, errors)
        threading.Thread(target=measure, args=arguments, daemon=True).start()

    serve(config, on_ready=ready)
    report = {
        "requests": args.requests, "in_mid_prompt": len(found), "chunk_tokens": args.chunk, "errors": errors,
        **{name: distribution([each[name] for each in found]) for name in
           ("free_ms", "step_left_ms", "behind_step_ms", "steps_after") if found},
        "kept": sum(each["kept"] for each in found) / max(1, len(found)), **machine(),
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    if args.out:
        write_json(args.out, report)
    return 1 if errors or not found else 0


if __name__ == "__main__":
    sys.exit(main())
