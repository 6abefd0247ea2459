"""Do prefill and decode in processes of their own survive kill -9, SIGSTOP and clients that vanish, at any moment?

Starts `penstock serve --pd 2P2D` (on penstock-tiny) and makes --runs runs against it, a fresh server every
--runs-per-server of them. Each run sends --streams sampled requests at once (prompts of 100 to 1,700 tokens in chunks
of 128, 20 to 300 tokens of answer), waits a random time and does one thing to one or two of the processes or clients:
kill -9 of prefill or decode engines, SIGSTOP of them for 0.2 to 3 leases, or a client that drops its connection. All
of it is drawn from --seed and the number of the run. The servers start killed engines again. Checked after every run,
each breach is named in `failures`:

- each stream that its client read to the end is token-equal to one engine in this process (E0: no token lost, doubled
  or changed), or ended with exactly one typed error;
- all engines are back, nothing runs or waits, and free and cached blocks are all there are.

`effect` says how often the fault was felt: hand-offs that failed and engines that were started again. Prints one JSON
document, --out writes it. Exit code 1 with a failure. Linux only: it finds engines in /proc. Restarts of the front end
are not part of it: it is one process with its clients' connections, and its death ends them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import signal
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from penstock import LLM, SamplingParams
from penstock.bench.flags import machine, write_json
from penstock.bench.server_process import ServerProcess, running_server

MODEL = "penstock-tiny"
FAULTS = ("kill prefill", "kill decode", "kill one of each", "stop prefill", "stop decode", "disconnect")
RECOVER_S = 90.0
STREAM_S = 120.0  # a stream that says nothing for so long counts as hung
KV = ("--kv-cache-memory-bytes", "64M")


@dataclass(slots=True)
class Stream:
    """One request and what its client saw."""

    token_ids: list[int]
    fields: dict[str, Any]
    got: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    has_left: bool = False

    @property
    def outcome(self) -> str:
        return "left" if self.has_left else "error" if self.errors else "answered"


def read(server: ServerProcess, stream: Stream, begun: Callable[[http.client.HTTPConnection], None]) -> None:
    """Ask and read to the end, whatever it is."""
    body = {"prompt": stream.token_ids, **stream.fields, "stream": True, "return_token_ids": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=STREAM_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        begun(connection)
        response = connection.getresponse()
        if response.status != 200:
            stream.errors.append(f"{response.status} {response.read().decode()[:200]}")
            return
        for line in response:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                stream.errors.append(f"{event['error'].get('type')}: {event['error'].get('message')}")
            for choice in event.get("choices", ()):
                stream.got += choice.get("token_ids") or ()
                stream.finish_reason = choice["finish_reason"] or stream.finish_reason
    except (OSError, ValueError, http.client.HTTPException, AttributeError) as error:
        if not stream.has_left:
            stream.errors.append(f"connection: {type(error).__name__}: {error}")
    finally:
        connection.close()


def breach(stream: Stream, expected: list[int]) -> str | None:
    """What is wrong with a stream, in words."""
    if stream.has_left:
        return None if stream.got == expected[: len(stream.got)] else "wrong tokens before its client left"
    if stream.errors:
        if len(stream.errors) > 1:
            return f"{len(stream.errors)} errors: {stream.errors}"
        typed = not stream.errors[0].startswith("connection")
        same = stream.got == expected[: len(stream.got)]
        return None if typed and same else f"{stream.errors[0]}; {'equal' if same else 'wrong'} tokens before it"
    if stream.got != expected:
        at = next((i for i, pair in enumerate(zip(stream.got, expected)) if pair[0] != pair[1]), "the end")
        return f"{len(stream.got)} of {len(expected)} tokens, wrong from {at} on"
    return None if stream.finish_reason == "length" else f"finish reason {stream.finish_reason}"


# ---- the server, as seen from outside ----


def engine_pids(server: ServerProcess) -> dict[str, int]:
    """Process ids by engine name, of those that run now."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{server.process.pid}/task").iterdir():
        for child in (task / "children").read_text(encoding="ascii").split():
            with contextlib.suppress(OSError, ValueError, IndexError):
                words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
                found[words[words.index("penstock.build.engine_process") + 2]] = int(child)
    return {name: pid for name, pid in found.items() if name}


def get(server: ServerProcess, path: str) -> str:
    with urllib.request.urlopen(f"{server.url}{path}", timeout=30) as response:
        return str(response.read().decode())


def counters(server: ServerProcess) -> dict[str, int]:
    """Hand-offs by outcome."""
    wanted = r'^penstock:handoff_prompts_total\{.*outcome="(\w+)".*\} ([0-9.e+]+)$'
    found: Counter[str] = Counter()
    for name, value in re.findall(wanted, get(server, "/metrics"), re.M):
        found[name] += int(float(value))
    return found


def leftovers(server: ServerProcess, names: set[str]) -> str | None:
    """What is not as it was before the run; None: all is."""
    gone = names - set(engine_pids(server))
    if gone:
        return f"{', '.join(sorted(gone))} did not come back"
    snapshot = json.loads(get(server, "/live/snapshot"))
    totals, pools = snapshot["totals"], [each["kv"] for each in snapshot["engines"] if each["kv"]]
    states = ("used", "shared", "filling")
    held = {name: sum(kv[name] for kv in pools) for name in states if any(kv[name] for kv in pools)}
    busy = {name: totals[name] for name in ("num_requests_running", "num_requests_waiting") if totals[name]}
    if held or busy:
        return f"{held | busy} left"
    lost = [kv for kv in pools if kv["free"] + kv["cached"] != kv["num_blocks"]]
    return f"blocks are missing: {lost}" if lost else None


def recover(server: ServerProcess, names: set[str], killed: Sequence[int]) -> tuple[float, str | None]:
    """Seconds until all is as before the run, or what is not after RECOVER_S. `killed`: processes that must go."""
    begin = time.monotonic()
    while True:
        if missing(server) or any(pid in killed for pid in engine_pids(server).values()):
            wrong: str | None = f"not back: {', '.join(sorted(missing(server))) or 'a killed engine'}"
        else:
            wrong = leftovers(server, names)
        if wrong is None or time.monotonic() - begin > RECOVER_S:
            return time.monotonic() - begin, wrong
        time.sleep(0.1)


# ---- runs ----


def draw_streams(draw: random.Random, number: int) -> list[Stream]:
    shared = [draw.randrange(10, 400) for _ in range(draw.randrange(64, 700))]
    streams = []
    for _ in range(number):
        own = [draw.randrange(10, 400) for _ in range(draw.randrange(100, 1000))]
        fields = {
            "max_tokens": draw.randrange(20, 300),
            "ignore_eos": True,
            "temperature": draw.choice((0.0, 0.8)),
            "seed": draw.randrange(1 << 30),
        }
        streams.append(Stream(shared + own if draw.random() < 0.5 else own, fields))
    return streams


def inject(fault: str, draw: random.Random, server: ServerProcess, lease_s: float) -> dict[str, int]:
    """Do it to engines; whom it hit, with process ids. Returns when it is over."""
    pids = engine_pids(server)
    roles = {"kill one of each": ("prefill", "decode")}.get(fault, (fault.split()[-1],))
    victims = []
    for role in roles:
        named = sorted(name for name in pids if name.startswith(role))
        victims += draw.sample(named, min(len(named), draw.choice((1, 1, 2)) if len(roles) == 1 else 1))
    for name in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[name], signal.SIGKILL if fault.startswith("kill") else signal.SIGSTOP)
    if fault.startswith("stop"):
        time.sleep(lease_s * draw.uniform(0.2, 3.0))
        for name in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[name], signal.SIGCONT)
    return {name: pids[name] for name in victims}


def run_once(
    number: int, seed: int, server: ServerProcess, names: set[str], one: LLM, num_streams: int, lease_s: float
) -> dict[str, Any]:
    draw = random.Random(f"{seed}/{number}")
    streams, fault, delay_s = draw_streams(draw, num_streams), draw.choice(FAULTS), draw.uniform(0.0, 1.5)
    prompts = [{"prompt_token_ids": stream.token_ids} for stream in streams]
    params = [SamplingParams(**stream.fields) for stream in streams]
    expected = [list(each.outputs[0].token_ids) for each in one.generate(prompts, params, use_tqdm=False)]
    before, pids = counters(server), list[int]()
    connections: dict[int, http.client.HTTPConnection] = {}
    threads = [
        threading.Thread(target=read, args=(server, stream, lambda c, k=k: connections.update({k: c})), daemon=True)
        for k, stream in enumerate(streams)
    ]
    for thread in threads:
        thread.start()
    time.sleep(delay_s)
    if fault == "disconnect":
        victims = []
        for k in draw.sample(range(num_streams), draw.choice((1, 2, num_streams))):
            if threads[k].is_alive() and k in connections:
                streams[k].has_left = True
                with contextlib.suppress(OSError, AttributeError):
                    connections[k].sock.shutdown(2)
                victims.append(f"client {k}")
    else:
        hit = inject(fault, draw, server, lease_s)
        victims, pids = list(hit), list(hit.values())
    for thread in threads:
        thread.join(2 * STREAM_S)
    wrong = [f"run {number}, {fault}: stream {k} hung" for k, thread in enumerate(threads) if thread.is_alive()]
    for k, (stream, tokens) in enumerate(zip(streams, expected)):
        found = breach(stream, tokens)
        if found:
            wrong.append(f"run {number}, {fault}: stream {k}: {found}")
    recovery_s, left = recover(server, names, pids if fault.startswith("kill") else ())
    if left:
        wrong.append(f"run {number}, {fault}: {left}")
    after = counters(server)
    return {
        "run": number,
        "fault": fault,
        "victims": victims,
        "after_s": round(delay_s, 3),
        "outcomes": dict(Counter(stream.outcome for stream in streams)),
        "errors": [error for stream in streams for error in stream.errors],
        "handoffs": {name: after[name] - before.get(name, 0) for name in after},
        "recovery_s": round(recovery_s, 2),
        "failures": wrong,
    }


def missing(server: ServerProcess) -> set[str]:
    """Engines that the server has started again and that are not ready yet, in its own words."""
    found: set[str] = set()
    for _, line in server.lines:
        if "it is started again" in line:
            found.add(line.split(" engine ")[1].split(":")[0])
        elif line.endswith(" is back"):
            found.discard(line.split(" engine ")[1].split()[0])
    return found


def pd_faults(
    num_runs: int,
    *,
    seed: int = 0,
    pd: str = "2P2D",
    link: str = "shm",
    num_streams: int = 8,
    lease_s: float = 1.0,
    runs_per_server: int = 10,
    tell: Callable[[dict[str, Any]], None] = lambda run: None,
) -> dict[str, Any]:
    """Make the runs; the report. `tell` hears of each."""
    arguments = [
        MODEL, "--pd", pd, "--kv-link", link, "--kv-lease-s", str(lease_s), "--max-num-batched-tokens", "128",
        "--pd-min-tokens", "64", "--pd-max-short-output", "0", "--generation-config", "vllm", "--disable-log-stats",
        "--engine-restarts", "1000", *KV,
    ]  # fmt: skip
    runs: list[dict[str, Any]] = []
    wrong: list[str] = []
    begin = time.monotonic()
    with LLM(MODEL, kv_cache_memory_bytes="64M") as one:
        while len(runs) < num_runs:
            with running_server(arguments) as server:
                names = set(engine_pids(server))
                for number in range(len(runs), min(len(runs) + runs_per_server, num_runs)):
                    runs.append(run_once(number, seed, server, names, one, num_streams, lease_s))
                    tell(runs[-1])
                    if runs[-1]["failures"]:
                        wrong += [*runs[-1]["failures"], f"the server's last lines:\n{server.tail()}"]
                        break  # what is left of it would show in the next runs too
            if server.process.returncode != 0 and not runs[-1]["failures"]:
                wrong.append(f"after run {len(runs) - 1}: the server left with exit code {server.process.returncode}")
    recoveries_s = sorted(run["recovery_s"] for run in runs)
    return {
        "runs": num_runs,
        "seed": seed,
        "pd": pd,
        "link": link,
        "streams_per_run": num_streams,
        "lease_s": lease_s,
        "seconds": round(time.monotonic() - begin, 1),
        "by_fault": dict(Counter(run["fault"] for run in runs)),
        "streams": dict(sum((Counter(run["outcomes"]) for run in runs), Counter())),
        "errors": [error for run in runs for error in run["errors"]],
        "effect": {
            "engines_killed": sum(len(run["victims"]) for run in runs if run["fault"].startswith("kill")),
            "runs_with_failed_handoffs": sum(run["handoffs"].get("failed", 0) > 0 for run in runs),
            **dict(sum((Counter(run["handoffs"]) for run in runs), Counter())),
        },
        "recovery_s": {"p50": recoveries_s[len(recoveries_s) // 2], "max": recoveries_s[-1]},
        "failures": wrong,
        "each": runs,
        **machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pd", default="2P2D")
    parser.add_argument("--link", default="shm", choices=("shm", "tcp", "nixl", "mooncake"))
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--lease-s", type=float, default=1.0)
    parser.add_argument("--runs-per-server", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    args = parser.parse_args()
    report = pd_faults(
        args.runs,
        seed=args.seed,
        pd=args.pd,
        link=args.link,
        num_streams=args.streams,
        lease_s=args.lease_s,
        runs_per_server=args.runs_per_server,
        tell=lambda run: print(json.dumps(run), file=sys.stderr, flush=True),
    )
    print(json.dumps({name: value for name, value in report.items() if name != "each"}, indent=1))
    if args.out:
        write_json(args.out, report)
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
