"""`penstock bench startup`: from the command to the first token of the first answer, and where every second went.

Starts `penstock serve` again and again, watches what it prints and answers, and stops it; with --offline a Python that
makes an LLM instead. All times are of this process's clock but the engine's own stages, which the server prints with
its ready line; what lies between two of them has a row of its own, so the rows add up to the whole. After the first
token it reads from /proc what the processes have used: peak resident memory, beside what must be there (weights, the
prompt's KV, and what a Python holds that has imported torch), and processor time. Knows a command and a URL, nothing of
the server's inside.
"""

from __future__ import annotations

import http.client
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from penstock.bench.flags import add_model, chosen_settings, engine_config, machine, parse, write_json
from penstock.bench.process_usage import Usage, children, usage
from penstock.bench.server_process import ServerProcess, StartFailed, running_server
from penstock.config.complete import complete
from penstock.config.flags import FlagParser
from penstock.config.hardware import probe
from penstock.config.schema import SECTIONS, Config
from penstock.config.values import ConfigError

STAGE = re.compile(r"(.+?) ([0-9.]+) s(?:, |$)")
OFFLINE = """
import json, sys, time
from penstock import LLM, SamplingParams
told = json.loads(sys.argv[1])
llm = LLM(**told["settings"])
ready_s = time.monotonic()
llm.generate([told["prompt"]], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
print(json.dumps({"ready_s": ready_s, "first_s": time.monotonic(), "rows": llm.start_timeline}), flush=True)
sys.stdin.read()
"""
TORCH_ALONE = "import sys, torch; print(flush=True); sys.stdin.read()"


@dataclass(slots=True)
class Start:
    """One start. `rows`: (what, seconds), adding up to `total_s`, from the command to the first token."""

    rows: list[tuple[str, float]]
    ready_s: float  # from the command to the ready line
    total_s: float
    processes: dict[str, Usage] = field(default_factory=dict)  # after the first token; empty where there is no /proc


def main(arguments: list[str]) -> int:
    parser = FlagParser(
        prog="penstock bench startup",
        usage="penstock bench startup [flags below] [MODEL and flags of penstock serve]",
        description="From the command to the first token of the first answer. Other flags go to penstock serve.",
    )
    parser.add_argument("--offline", action="store_true", help="of an LLM in a Python process, not of a server")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="tokens of the first prompt [128]")
    parser.add_argument("--num-iters", type=int, default=5, metavar="N", help="measured starts [5]")
    parser.add_argument("--num-iters-warmup", type=int, default=1, metavar="N", help="starts before them [1]")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="a start may take this long [300]")
    parser.add_argument("--output-json", metavar="FILE", help="write the figures as JSON")
    own, rest = _split(parser, arguments)
    options = parse(parser, own)
    if options is None:
        return 0
    if options.num_iters < 1:
        raise ConfigError("must be at least 1", "--num-iters")
    if options.input_len < 1:
        raise ConfigError("must be at least 1", "--input-len")
    config = _config(rest)
    starts = []
    for number in range(options.num_iters_warmup + options.num_iters):
        if options.offline:
            start = measure_offline(config, options.input_len, options.timeout)
        else:
            start = measure(rest, options.input_len, options.timeout)
        is_warmup = number < options.num_iters_warmup
        print(f"{'warm-up' if is_warmup else 'start'}: ready after {start.ready_s:.2f} s, "
              f"first token after {start.total_s:.2f} s", flush=True)  # fmt: skip
        if not is_warmup:
            starts.append(start)
    figures = summary(starts)
    print("\nthe median start, second by second")
    for name, seconds in figures["timeline"]:
        print(f"  {name:<28} {seconds:7.3f} s")
    print(f"  {'first token':<28} {figures['median_total_s']:7.3f} s   (min {figures['min_total_s']:.3f}, "
          f"max {figures['max_total_s']:.3f})")  # fmt: skip
    figures |= memory_above_floor(starts, config, options.input_len)
    for name, peak in figures.get("median_peak_mb", {}).items():
        print(f"  {name:<28} {peak:7.0f} MB at most, {figures['median_cpu_s'][name]:.2f} s of processor")
    if "beyond_mb" in figures:
        print(f"  beyond weights, KV and torch {figures['beyond_mb']:7.0f} MB")
    if options.output_json:
        figures |= {"offline": options.offline, "input_len": options.input_len, "arguments": rest}
        write_json(options.output_json, figures | machine())
        print(f"figures are in {options.output_json}")
    return 0


def _split(parser: FlagParser, arguments: list[str]) -> tuple[list[str], list[str]]:
    """(our arguments, those of `penstock serve`)."""
    values = {flag: action.nargs != 0 for action in parser._actions for flag in action.option_strings}
    own: list[str] = []
    rest: list[str] = []
    left = iter(arguments)
    for argument in left:
        name = argument.partition("=")[0]
        name = name.replace("_", "-") if name.startswith("--") else name
        if name not in values:
            rest.append(argument)
            continue
        own.append(argument)
        if values[name] and "=" not in argument and name not in ("-h", "--help"):
            own += [value for value in (next(left, None),) if value is not None]
    return own, rest


def summary(starts: list[Start]) -> dict[str, Any]:
    """The start with the median total, row by row, and the spread over all."""
    by_total = sorted(starts, key=lambda start: start.total_s)
    middle = by_total[(len(by_total) - 1) // 2]
    return {
        "num_iters": len(starts),
        "timeline": middle.rows,
        "median_total_s": middle.total_s,
        "min_total_s": by_total[0].total_s,
        "max_total_s": by_total[-1].total_s,
        "median_ready_s": statistics.median(start.ready_s for start in starts),
        "starts": [{"total_s": start.total_s, "ready_s": start.ready_s, "rows": start.rows} for start in starts],
    }


def memory_above_floor(starts: list[Start], config: Config, input_len: int) -> dict[str, Any]:
    """Medians of peak memory and processor time by process, and what the one with the engine holds beyond its floor.

    The floor: weights, KV of one prompt, and the peak of a Python that imports torch. In MiB. Empty without /proc.
    """
    if not all(start.processes for start in starts):
        return {}
    peaks = {name: statistics.median(s.processes[name].peak_mb for s in starts) for name in starts[0].processes}
    cpu = {name: statistics.median(s.processes[name].cpu_s for s in starts) for name in starts[0].processes}
    resolved = complete(config, probe())
    floor = {
        "weights": resolved.memory.weights_bytes / 2**20,
        "kv": sum(-(-input_len // g.block_size) * g.block_bytes for g in resolved.layout.groups) / 2**20,
        "import torch": _torch_alone_mb(),
    }
    engine = next(name for name in ("engine", "python") if name in peaks)
    return {
        "median_peak_mb": peaks,
        "median_cpu_s": cpu,
        "floor_mb": floor,
        "beyond_mb": peaks[engine] - sum(floor.values()),
    }


def measure_offline(config: Config, input_len: int, timeout_s: float = 300.0) -> Start:
    """Start a Python that makes an LLM and asks for one token. Raises StartFailed."""
    told = {"settings": chosen_settings(config), "prompt": _prompt(input_len)}
    begin_s = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", OFFLINE, json.dumps(told)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        killer = threading.Timer(timeout_s, process.kill)
        killer.start()
        assert process.stdout is not None
        line = process.stdout.readline()  # empty when it has failed: its error is on the terminal
        used = usage(process.pid)
        process.communicate()
        killer.cancel()
    if not line:
        raise StartFailed(f"the Python process ended with exit code {process.returncode}")
    found = json.loads(line)
    total_s, ready_s = found["first_s"] - begin_s, found["ready_s"] - begin_s
    stages = [(str(name), float(seconds)) for name, seconds in found["rows"]]
    rows = [("python", ready_s - sum(seconds for _, seconds in stages)), *stages]
    rows.append(("prompt to first token", total_s - ready_s))
    return Start(rows, ready_s, total_s, {} if used is None else {"python": used})


def measure(serve_arguments: list[str], input_len: int = 128, timeout_s: float = 300.0) -> Start:
    """Start a server, ask for one token, stop it. Raises StartFailed."""
    with running_server(serve_arguments, timeout_s) as server:
        found = server.ready_line()
        assert found is not None
        ready_at_s, match = found
        first_s = _first_token(server, input_len, timeout_s)
        found_usage = {"front end": usage(server.process.pid)}
        found_usage |= {name: usage(pid) for pid, name in children(server.process.pid)}
    told_s = float(match.group(1))  # of the server's own clock: from the start of its main to the ready line
    stages = [(name, float(seconds)) for name, seconds in STAGE.findall(match.group(2))]
    ready_s = ready_at_s - server.started_s
    rows = [("python and command line", max(0.0, ready_s - told_s)), *stages]
    # The printed stages are rounded to 10 ms and leave out what took less than 5: their sum is put right here.
    rows.append(("rounding", ready_s - sum(seconds for _, seconds in rows)))
    rows.append(("request to first token", first_s - ready_at_s))
    used = {name: each for name, each in found_usage.items() if each is not None}
    return Start(rows, ready_s, first_s - server.started_s, used)


def _prompt(input_len: int) -> list[int]:
    """Token ids that every vocabulary has."""
    return [16 + (7 * n) % 97 for n in range(input_len)]


def _torch_alone_mb() -> float:
    with subprocess.Popen(
        [sys.executable, "-c", TORCH_ALONE], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        used = usage(process.pid)
        process.communicate()
    return 0.0 if used is None else used.peak_mb


def _config(serve_arguments: list[str]) -> Config:
    """The settings that the arguments of `penstock serve` mean."""
    parser = FlagParser(prog="penstock bench startup", sections=tuple(SECTIONS))
    add_model(parser)
    return engine_config(parser.parse(serve_arguments))


def _first_token(server: ServerProcess, input_len: int, timeout_s: float) -> float:
    """time.monotonic() when the first token of a first request arrived. Raises StartFailed."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    try:
        body = {"prompt": _prompt(input_len), "max_tokens": 1, "stream": True, "temperature": 0}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise StartFailed(f"the first request was answered {answer.status}: {answer.read(500)!r}")
        while line := answer.readline():
            if line.startswith(b"data:"):
                return time.monotonic()
        raise StartFailed("the first answer had no token")
    except (OSError, http.client.HTTPException) as error:
        raise StartFailed(f"the first request failed: {error}\n{server.tail()}") from None
    finally:
        connection.close()
