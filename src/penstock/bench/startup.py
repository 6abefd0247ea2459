"""`penstock bench startup`: from the command to the first token of the first answer, and where every second went.

Starts `penstock serve` again and again, watches what it prints and answers, and stops it. All times are of this
process's clock but the engine's own stages, which the server prints with its ready line; what lies between two of them
has a row of its own, so the rows add up to the whole. Knows a command and a URL, nothing of the server's inside.
"""

from __future__ import annotations

import http.client
import json
import re
import statistics
import time
from dataclasses import dataclass
from typing import Any

from penstock.bench.flags import machine, parse, write_json
from penstock.bench.server_process import ServerProcess, StartFailed, running_server
from penstock.config.flags import FlagParser
from penstock.config.values import ConfigError

STAGE = re.compile(r"(.+?) ([0-9.]+) s(?:, |$)")


@dataclass(slots=True)
class Start:
    """One start. `rows`: (what, seconds), adding up to `total_s`, from the command to the first token."""

    rows: list[tuple[str, float]]
    ready_s: float  # from the command to the ready line
    total_s: float


def main(arguments: list[str]) -> int:
    parser = FlagParser(
        prog="penstock bench startup",
        usage="penstock bench startup [flags below] [MODEL and flags of penstock serve]",
        description="From the command to the first token of the first answer. Other flags go to penstock serve.",
    )
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
    starts = []
    for number in range(options.num_iters_warmup + options.num_iters):
        start = measure(rest, options.timeout)
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
    if options.output_json:
        write_json(options.output_json, figures | {"arguments": rest} | machine())
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


def measure(serve_arguments: list[str], timeout_s: float = 300.0) -> Start:
    """Start a server, ask for one token, stop it. Raises StartFailed."""
    with running_server(serve_arguments, timeout_s) as server:
        found = server.ready_line()
        assert found is not None
        ready_at_s, match = found
        first_s = _first_token(server, timeout_s)
    told_s = float(match.group(1))  # of the server's own clock: from the start of its main to the ready line
    stages = [(name, float(seconds)) for name, seconds in STAGE.findall(match.group(2))]
    ready_s = ready_at_s - server.started_s
    rows = [("python and command line", max(0.0, ready_s - told_s)), *stages]
    # The printed stages are rounded to 10 ms and leave out what took less than 5: their sum is put right here.
    rows.append(("rounding", ready_s - sum(seconds for _, seconds in rows)))
    rows.append(("request to first token", first_s - ready_at_s))
    return Start(rows, ready_s, first_s - server.started_s)


def _first_token(server: ServerProcess, timeout_s: float) -> float:
    """time.monotonic() when the first token of a first request arrived. Raises StartFailed."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    try:
        body = {"prompt": "Once upon a time", "max_tokens": 1, "stream": True, "temperature": 0}
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
