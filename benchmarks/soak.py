"""Does a server stand hundreds of streaming clients, some of which vanish, without losing or keeping anything?

Starts `penstock serve` on a free port and --clients clients that ask, read the stream to its end and ask again;
--leave of the requests end with the client dropping the connection, half of them after a random number of events, half
after a random time (waiting in the queue, or in the prompt). Afterwards it checks, and names each breach in `failures`:

- no other request failed, and each got exactly the tokens it asked for;
- no block leaked: nothing runs or waits, and free and cached blocks are all there are;
- resident memory of both processes is flat: the median of the last quarter is at most --max-growth-mb (or 5 %) above
  that of the second quarter (the first one fills pools and bounded histories);
- no connection stayed open.

Front-end added latency, per token: from the engine's emission (the commit that `Tokens.sent_s` carries, read from the
server's own --record-path file) to the arrival of its event at the client; all processes use the same monotonic clock.
It holds the wire, the front end, the socket and this process's own delay, which `client_lag_ms` states beside it: the
lateness of a 10 ms timer in the clients' loop. Only requests whose events and tokens match one to one count (others
held back text for a while); their number is stated. Prints one JSON document, --out writes it. Exit code 1 with a
failure. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from penstock.bench.datasets import BenchRequest, Vocabulary
from penstock.bench.flags import find_tokenizer, machine, write_json
from penstock.bench.openai_stream import StreamReader, body_of
from penstock.bench.server_process import ServerProcess, running_server
from penstock.server.http_client import BrokenAnswer, HttpServer, run_in_loop

MODEL = "penstock-tiny"
SHARED_PREFIX_LEN = 64  # of a third of the prompts, so that blocks are shared and hit
SETTLE_S = 15.0
SAMPLE_S = 0.5
LAG_TIMER_S = 0.01
PERCENTILES = (50, 90, 99, 99.9)


@dataclass(slots=True)
class Served:
    """A request that was read to its end. Times: seconds of the monotonic clock."""

    request_id: str
    num_asked: int
    num_output: int
    token_times_s: list[float]


@dataclass(slots=True)
class Clients:
    """What the clients did and saw. Changed by their tasks, all in one loop."""

    served: list[Served] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    num_left: dict[str, int] = field(default_factory=lambda: {"prompt or queue": 0, "streaming": 0})
    num_asked: int = 0
    num_events: int = 0
    typical_s: float = 2.0  # of a request, for choosing when to leave


@dataclass(slots=True)
class Samples:
    """Resident bytes of a process, one entry per SAMPLE_S."""

    name: str
    pid: int
    rss_bytes: list[int] = field(default_factory=list)


def soak(
    num_clients: int,
    seconds: float,
    *,
    leave: float = 0.1,
    max_growth_mb: float = 16.0,
    seed: int = 0,
    serve_arguments: tuple[str, ...] = ("--kv-cache-memory-bytes", "128M"),
) -> dict[str, Any]:
    """Run it all; the report. `failures` is empty when everything held. Growth is judged from a minute on."""
    found = find_tokenizer([MODEL])
    assert found is not None
    vocabulary = Vocabulary.of(found[1])
    with tempfile.TemporaryDirectory(prefix="penstock-soak-") as folder:
        record = Path(folder) / "scheduler.rec"
        arguments = [MODEL, *serve_arguments, "--record-path", str(record), "--disable-log-stats"]
        with running_server(arguments) as server:
            report, clients = run_in_loop(  # type: ignore[misc]
                lambda: _drive(server, vocabulary, num_clients, seconds, leave, seed)
            )
        # The server has gone: the engine's file is complete.
        emitted_s, step_ms = emissions_s(record)
        added_ms, num_matched = added_latencies_ms(clients.served, emitted_s)
        record_mb = record.stat().st_size / 1e6
    exit_code = server.process.returncode
    report["added_latency_ms"] = {
        "definition": "from the engine's commit of a token to the arrival of its event at the client",
        **_percentiles(added_ms),
        "num_tokens": len(added_ms),
        "requests_matched": num_matched,
        "requests_served": len(clients.served),
    }
    report["engine_step_ms"] = {"num_steps": len(step_ms), **_percentiles(step_ms)}
    report["record_mb"] = round(record_mb, 1)
    report["server_exit_code"] = exit_code
    report["failures"] = failures(report, clients, max_growth_mb, judge_growth=seconds >= 60)
    return report


async def _drive(
    server: ServerProcess, vocabulary: Vocabulary, num_clients: int, seconds: float, leave: float, seed: int
) -> tuple[dict[str, Any], Clients]:
    """The clients, the samplers and the checks of the server that is still there."""
    http = HttpServer(server.url, {"user-agent": "penstock-soak"})
    clients = Clients()
    samples = [Samples("front end", server.process.pid), Samples("engine", _engine_pid(server.process.pid))]
    num_files = [_num_open_files(each.pid) for each in samples]
    lags_s: list[float] = []
    background = [asyncio.ensure_future(_sample(samples)), asyncio.ensure_future(_measure_lag(lags_s))]
    begin_s = time.monotonic()
    until_s = begin_s + seconds
    prefix = vocabulary.draw(np.random.default_rng(seed), SHARED_PREFIX_LEN)
    await asyncio.gather(
        *(_client(http, vocabulary, prefix, clients, n, until_s, leave, seed) for n in range(num_clients))
    )
    elapsed_s = time.monotonic() - begin_s
    for task in background:
        task.cancel()
    http.close()
    kv = await _settled(http)
    http.close()
    await asyncio.sleep(0.2)
    num_served_tokens = sum(each.num_output for each in clients.served)
    report = {
        "clients": num_clients,
        "seconds": round(elapsed_s, 1),
        "requests_asked": clients.num_asked,
        "requests_served": len(clients.served),
        "requests_left": clients.num_left,
        "left_share": round(sum(clients.num_left.values()) / max(clients.num_asked, 1), 4),
        "errors": clients.errors[:20],
        "num_errors": len(clients.errors),
        "output_tokens_per_s": round(num_served_tokens / elapsed_s, 1),
        "events_per_s": round(clients.num_events / elapsed_s, 1),
        "ttft_ms": _percentiles([1000 * s for s in clients.ttfts_s]),
        "client_lag_ms": _percentiles([1000 * s for s in lags_s]),
        "blocks": kv,
        "memory": [_memory(each) for each in samples],
        "open_files": {
            each.name: {"before": before, "after": _num_open_files(each.pid)}
            for each, before in zip(samples, num_files, strict=True)
        },
        **machine(),
    }
    return report, clients


async def _client(
    http: HttpServer,
    vocabulary: Vocabulary,
    prefix: list[int],
    clients: Clients,
    number: int,
    until_s: float,
    leave: float,
    seed: int,
) -> None:
    """One client: ask, read or leave, ask again."""
    rng = random.Random(f"{seed}:{number}")
    ids = np.random.default_rng((seed, number, 1))
    count = 0
    while time.monotonic() < until_s:
        own = vocabulary.draw(ids, rng.randint(16, 96))
        prompt = prefix + own if rng.random() < 1 / 3 else own
        request = BenchRequest(rng.randint(8, 64), len(prompt), prompt)
        # Special tokens have text then: one event for every token, which is what the latencies are counted by.
        extra = {"skip_special_tokens": False, "temperature": 0.8, "seed": rng.getrandbits(32)}
        body = body_of(request, MODEL, vocabulary, chat=False, ignore_eos=True, extra=extra)
        request_id = f"soak-{number}-{count}"
        count += 1
        clients.num_asked += 1
        written = http.request("POST", "/v1/completions", body, x_request_id=request_id)
        leaves = rng.random() < leave
        await _ask(http, written, request, request_id, clients, rng if leaves else None)


async def _ask(
    http: HttpServer,
    written: bytes,
    request: BenchRequest,
    request_id: str,
    clients: Clients,
    leaver: random.Random | None,
) -> None:
    """One request: read to its end or, with a `leaver`, left at a moment that it chooses."""
    reader = StreamReader(request.num_prompt)
    max_events = after_s = None
    if leaver is not None:
        if leaver.random() < 0.5:
            max_events = leaver.randint(1, max(1, request.num_output - 1))
        else:
            after_s = leaver.uniform(0.0, clients.typical_s)
    task: asyncio.Task[Any] | None = None

    def on_body(data: bytes, now_s: float) -> None:
        reader.feed(data, now_s)
        if max_events is not None and len(reader.outcome.token_times_s) >= max_events and task is not None:
            task.cancel()

    begin_s = time.perf_counter()
    task = asyncio.ensure_future(http.exchange(written, on_body))
    timer = asyncio.get_running_loop().call_later(after_s, task.cancel) if after_s is not None else None
    try:
        exchange = await task
    except asyncio.CancelledError:
        if leaver is None:
            raise
        num_seen = len(reader.outcome.token_times_s)
        clients.num_events += num_seen
        clients.num_left["streaming" if num_seen else "prompt or queue"] += 1
        return
    except BrokenAnswer as broken:
        clients.errors.append(f"{request_id}: {broken}")
        return
    finally:
        if timer is not None:
            timer.cancel()
    outcome = reader.finish()
    if exchange.status != 200 or outcome.error:
        refused = f"{exchange.status} {exchange.text()[:200]}" if exchange.status != 200 else outcome.error
        clients.errors.append(f"{request_id}: {refused}")
        return
    clients.num_events += len(outcome.token_times_s)
    clients.ttfts_s.append(outcome.token_times_s[0] - begin_s)
    clients.typical_s += 0.02 * (time.perf_counter() - begin_s - clients.typical_s)
    clients.served.append(Served(request_id, request.num_output, outcome.num_output, outcome.token_times_s))


async def _settled(http: HttpServer) -> dict[str, Any]:
    """The blocks by state when nothing runs any more, or after SETTLE_S."""
    deadline_s = time.monotonic() + SETTLE_S
    while True:
        status, body = await http.get("/live/snapshot")
        totals: dict[str, Any] = {}
        if status == 200:
            snapshot = json.loads(body)
            totals, kv = snapshot["totals"], snapshot["engines"][0]["kv"]
            states = {name: kv[name] for name in ("num_blocks", "used", "shared", "filling", "cached", "free")}
            states |= {"running": totals["num_requests_running"], "waiting": totals["num_requests_waiting"]}
            is_idle = not any(states[name] for name in ("running", "waiting", "used", "shared", "filling"))
            if is_idle or time.monotonic() > deadline_s:
                return states | {"preemptions": totals["num_preemptions_total"]}
        elif time.monotonic() > deadline_s:
            raise RuntimeError(f"/live/snapshot answered {status}")
        await asyncio.sleep(0.5)


# ---- the engine's recording ----


class _RowId(msgspec.Struct):
    request_id: str


class _Plan(msgspec.Struct):
    step: int
    rows: list[_RowId]


class _Result(msgspec.Struct):
    step: int
    tokens: list[list[int]]
    seconds: float


def emissions_s(path: Path) -> tuple[dict[str, list[float]], list[float]]:
    """From a file of `--record-path`: request id -> when the engine committed each of its tokens; milliseconds of each
    step of the rank."""
    found: dict[str, list[float]] = {}
    step_ms: list[float] = []
    plans: dict[int, list[_RowId]] = {}
    decode = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode
    as_text = msgspec.msgpack.Decoder(str).decode
    as_plan = msgspec.msgpack.Decoder(_Plan | None).decode
    as_result = msgspec.msgpack.Decoder(_Result).decode
    for record in _records(path):
        kind, *fields = decode(record)
        if (word := as_text(kind)) == "plan":
            plan = as_plan(msgspec.msgpack.decode(fields[1], type=bytes))
            if plan is not None:
                plans[plan.step] = plan.rows
        elif word == "commit":
            now_s, result = msgspec.msgpack.decode(fields[0], type=float), as_result(fields[1])
            step_ms.append(1000 * result.seconds)
            for row, tokens in zip(plans.pop(result.step), result.tokens, strict=True):
                if tokens:
                    found.setdefault(row.request_id, []).extend([now_s] * len(tokens))
    return found, step_ms


def _records(path: Path) -> Iterator[bytes]:
    """The recorder's file, record by record: four bytes of length, then msgpack."""
    with path.open("rb") as file:
        while len(size := file.read(4)) == 4:
            data = file.read(int.from_bytes(size, "little"))
            if len(data) < int.from_bytes(size, "little"):
                return  # cut short
            yield data


def added_latencies_ms(served: list[Served], emitted_s: dict[str, list[float]]) -> tuple[list[float], int]:
    """(milliseconds from emission to arrival of every token of the requests that match, how many do)."""
    clocks = {time.get_clock_info(name).implementation for name in ("monotonic", "perf_counter")}
    assert len(clocks) == 1, "the engine's clock and the clients' are not one"
    added: list[float] = []
    num_matched = 0
    for each in served:
        sent = emitted_s.get(each.request_id, [])[: each.num_output]
        if len(sent) == len(each.token_times_s) == each.num_output:
            num_matched += 1
            added += [1000 * (got - gone) for got, gone in zip(each.token_times_s, sent, strict=True)]
    return added, num_matched


# ---- processes ----


async def _sample(samples: list[Samples]) -> None:
    while True:
        for each in samples:
            each.rss_bytes.append(_rss_bytes(each.pid))
        await asyncio.sleep(SAMPLE_S)


async def _measure_lag(lags_s: list[float]) -> None:
    while True:
        due_s = time.perf_counter() + LAG_TIMER_S
        await asyncio.sleep(LAG_TIMER_S)
        lags_s.append(max(0.0, time.perf_counter() - due_s))


def _rss_bytes(pid: int) -> int:
    fields = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def _num_open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def _engine_pid(server_pid: int) -> int:
    """The server's child that is the engine. Linux."""
    for task in Path(f"/proc/{server_pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            if b"penstock.build.engine" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise RuntimeError("the server has no engine process")


def _memory(samples: Samples) -> dict[str, Any]:
    """Resident megabytes: quarters of the run, and the growth from the second to the last."""
    mb = [size / 1e6 for size in samples.rss_bytes] or [0.0]
    quarter = max(1, len(mb) // 4)
    parts = [mb[i * quarter : (i + 1) * quarter] or mb[-1:] for i in range(3)] + [mb[3 * quarter :] or mb[-1:]]
    medians = [statistics.median(part) for part in parts]
    return {
        "process": samples.name,
        "quarter_median_rss_mb": [round(value, 1) for value in medians],
        "max_rss_mb": round(max(mb), 1),
        "growth_mb": round(medians[3] - medians[1], 2),
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {f"p{p:g}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES}
    return {**found, "max": round(max(values), 3), "mean": round(statistics.fmean(values), 3)}


def failures(report: dict[str, Any], clients: Clients, max_growth_mb: float, *, judge_growth: bool) -> list[str]:
    """Every breach, in words."""
    found = []
    if report["num_errors"]:
        found.append(f"{report['num_errors']} requests that nobody left failed; first: {report['errors'][0]}")
    short = [each for each in clients.served if each.num_output != each.num_asked]
    if short:
        found.append(f"{len(short)} requests got another number of tokens than asked; first: {short[0].request_id}")
    if not clients.served:
        found.append("no request was served")
    blocks = report["blocks"]
    states = ("used", "shared", "filling", "running", "waiting")
    found += [f"{blocks[name]} {name} after everything had ended" for name in states if blocks[name]]
    if blocks["free"] + blocks["cached"] != blocks["num_blocks"]:
        found.append(f"free {blocks['free']} and cached {blocks['cached']} are not all {blocks['num_blocks']} blocks")
    for name, files in report["open_files"].items():
        if files["after"] > files["before"] + 2:  # a connection may be on its way out
            found.append(f"the {name} has {files['after']} open files, {files['before']} before")
    for memory in report["memory"]:
        limit_mb = max(max_growth_mb, 0.05 * memory["quarter_median_rss_mb"][1])
        if judge_growth and memory["growth_mb"] > limit_mb:
            found.append(f"the {memory['process']} grew by {memory['growth_mb']} MB")
    if report["server_exit_code"] != 0:
        found.append(f"the server left with exit code {report['server_exit_code']}")
    matched = report["added_latency_ms"]["requests_matched"]
    if clients.served and matched < 0.5 * len(clients.served):
        found.append(f"only {matched} of {len(clients.served)} requests could be matched with the engine's recording")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--leave", type=float, default=0.1, help="share of requests whose client vanishes")
    parser.add_argument("--max-growth-mb", type=float, default=16.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("serve_arguments", nargs="*", help="after --: more flags of penstock serve")
    args = parser.parse_args()
    more = tuple(args.serve_arguments) or ("--kv-cache-memory-bytes", "128M")
    report = soak(
        args.clients,
        args.seconds,
        leave=args.leave,
        max_growth_mb=args.max_growth_mb,
        seed=args.seed,
        serve_arguments=more,
    )
    print(json.dumps(report, indent=1))
    if args.out:
        write_json(args.out, report)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
