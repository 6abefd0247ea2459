"""`penstock bench serve`: load a running OpenAI-compatible server, any one, and print what its clients saw.

vLLM's flags, printed labels and JSON keys, so that scripts and dashboards made for them work. Made-up prompts go as
token ids to /v1/completions (exact lengths, no tokenizer in the way) and as text to /v1/chat/completions. Tokens are
counted by the server, in its usage chunk. Knows flags and files; `load` sends and `metrics` counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
import uuid
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from penstock.bench.dataset_flags import add_dataset, dataset
from penstock.bench.datasets import BenchRequest, Vocabulary
from penstock.bench.flags import find_tokenizer, parse
from penstock.bench.load import Run, Shot, arrivals, fire, run_load
from penstock.bench.metrics import DETAIL_KEYS, METRICS, block, figures, parse_goodput, result_json
from penstock.bench.openai_stream import Outcome, body_of
from penstock.config.flags import FlagParser
from penstock.config.load import first_api_key
from penstock.config.values import ConfigError
from penstock.server.http_client import BrokenAnswer, HttpServer, run_in_loop

BACKENDS = ("openai", "vllm", "openai-chat")
ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip
SHOWN_FAILURES = 10


class BenchError(RuntimeError):
    """The benchmark cannot go on; one line for people."""


def main(arguments: list[str]) -> int:
    """0 when every request succeeded, 1 when one failed or nothing could be measured."""
    options = parse(flags(), arguments)
    if options is None:
        return 0
    _check(options)
    return int(run_in_loop(lambda: _main(options)))  # type: ignore[call-overload]


def flags() -> FlagParser:
    """The command line: vLLM's names and defaults unless a help text says otherwise."""
    parser = FlagParser(prog="penstock bench serve", description="Load a running OpenAI-compatible server.")
    add = parser.add_argument
    add("--base-url", "--url", metavar="URL", help="the server, with or without /v1 [http://HOST:PORT]")
    add("--host", default="127.0.0.1", help="the server's host [127.0.0.1]")
    add("--port", type=int, default=8000, metavar="N", help="the server's port [8000]")
    add("--backend", default="openai", choices=BACKENDS, help="what is spoken; openai and vllm are the same [openai]")
    add("--endpoint", metavar="PATH", help="[/v1/completions, or /v1/chat/completions for openai-chat]")
    add("--model", metavar="NAME", help="model to ask for [the server's first]")
    add("--served-model-name", metavar="NAME", help="its name in requests, if --model is a directory")
    add("--tokenizer", metavar="DIR", help="whose tokens random prompts have [the model's, if it is here]")
    add("--api-key", metavar="KEY", help="[PENSTOCK_API_KEY]")
    add("--header", nargs="*", default=[], metavar="KEY=VALUE", help="more headers")
    add("--insecure", action="store_true", help="accept any TLS certificate")
    add_dataset(parser, num_prompts=1000)
    add("--request-rate", type=float, default=math.inf, metavar="X", help="requests per second; inf: all at once [inf]")
    add("--burstiness", type=float, default=1.0, metavar="X", help="shape of the gaps: 1 Poisson, less: bursts [1]")
    add("--max-concurrency", type=int, metavar="N", help="requests in flight at most")
    add("--num-warmups", type=int, default=0, metavar="N", help="requests before the clock starts [0]")
    add("--self-timed", action=argparse.BooleanOptionalAction, help="a trace's own times [on for timed_trace]")
    add("--ignore-eos", action="store_true", help="go on to the wanted length; always so for random and timed_trace")
    for name in SAMPLING:
        kind = int if name == "top_k" else float
        add("--" + name.replace("_", "-"), type=kind, metavar="X", help="sampling parameter [the server's]")
    add("--extra-body", type=json.loads, default={}, metavar="JSON", help="more fields of each request")
    add("--request-timeout", type=float, metavar="S", help="a request that takes longer fails")
    add("--ready-check-timeout-sec", type=float, default=0.0, metavar="S", help="wait this long for the server [0]")
    add("--percentile-metrics", default="ttft,tpot,itl", metavar="LIST", help=f"of {','.join(METRICS)} [ttft,tpot,itl]")
    add("--metric-percentiles", default="99", metavar="LIST", help="which percentiles [99]")
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits that a good request meets: ttft tpot e2el")
    add("--save-result", action="store_true", help="write the figures as JSON")
    add("--save-detailed", action="store_true", help="with the numbers and text of each request")
    add("--result-dir", metavar="DIR", help="where the file goes [here]")
    add("--result-filename", metavar="FILE", help="[LABEL-RATEqps-MODEL-DATE.json]")
    add("--label", metavar="NAME", help="first part of the file's name [the backend]")
    add("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="more fields of the file")
    add("--request-id-prefix", default=f"bench-{uuid.uuid4().hex[:8]}-", metavar="TEXT", help="of X-Request-Id")
    add("--disable-tqdm", action="store_true", help="no progress bar")
    return parser


def _check(options: argparse.Namespace) -> None:
    """What the command line alone can tell to be wrong. Raises ConfigError."""
    for name in ("num_prompts", "max_concurrency"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError("must be at least 1", "--" + name.replace("_", "-"))
    if not options.request_rate > 0:
        raise ConfigError("must be above 0, or inf", "--request-rate")
    if not options.burstiness > 0:
        raise ConfigError("must be above 0", "--burstiness")
    if options.self_timed is not None and options.dataset_name != "timed_trace":
        raise ConfigError("only a timed_trace has times", "--self-timed")
    options.metrics = [name.strip() for name in options.percentile_metrics.split(",") if name.strip()]
    for name in options.metrics:
        if name not in METRICS:
            raise ConfigError(f"{name!r} is none of {', '.join(METRICS)}", "--percentile-metrics")
    try:
        options.percentiles = [float(part) for part in options.metric_percentiles.split(",")]
    except ValueError:
        raise ConfigError(f"{options.metric_percentiles!r} is no list of numbers", "--metric-percentiles") from None
    if not all(0 <= percentile <= 100 for percentile in options.percentiles):
        raise ConfigError("percentiles lie between 0 and 100", "--metric-percentiles")
    if not isinstance(options.extra_body, dict):
        raise ConfigError("must be a JSON object", "--extra-body")
    options.goodput_ms = parse_goodput(options.goodput)
    options.header, options.metadata = _pairs(options.header, "--header"), _pairs(options.metadata, "--metadata")
    options.chat = options.backend == "openai-chat"
    options.endpoint = options.endpoint or ENDPOINTS[options.backend]
    if options.endpoint.rstrip("/").endswith("/chat/completions") != options.chat:
        raise ConfigError(f"{options.backend} does not speak to {options.endpoint}", "--endpoint")
    if options.dataset_name in ("random", "timed_trace"):
        options.ignore_eos = True


def _pairs(items: Sequence[str], flag: str) -> dict[str, str]:
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"{item!r} is not KEY=VALUE", flag)
        found[name.strip()] = value.strip()
    return found


async def _main(options: argparse.Namespace) -> int:
    key = options.api_key or first_api_key()
    headers = {"user-agent": "penstock-bench", **({"authorization": f"Bearer {key}"} if key else {}), **options.header}
    url = options.base_url or f"http://{options.host}:{options.port}"
    server = HttpServer(url, headers, verify=not options.insecure)
    try:
        model, root = await _model(server, options.ready_check_timeout_sec, options.model)
        found = find_tokenizer((options.tokenizer,) if options.tokenizer else (options.model, root, model))
        if options.tokenizer and found is None:
            raise ConfigError(f"{options.tokenizer} is no directory with a tokenizer", "--tokenizer")
        tokenizer_id, tokenizer = found or (None, None)
        if tokenizer is None and options.dataset_name != "custom":
            print("no tokenizer is known here: prompts are made of English words, about one token each")
        vocabulary = Vocabulary.of_words() if tokenizer is None else Vocabulary.of(tokenizer)
        name = options.served_model_name or model
        shots = _shots(options, server, dataset(options, tokenizer, vocabulary), name, vocabulary)
        run = await _run(options, server, shots)
    finally:
        server.close()
    result = figures(run.outcomes, run.duration_s, percentiles=options.percentiles, goodput_ms=options.goodput_ms)
    _tell_failures(run.outcomes)
    shown = {"max_concurrency": options.max_concurrency, "request_rate": options.request_rate}
    print(block(result, options.metrics, **shown))
    if options.save_result:
        data = _head(options, name, tokenizer_id) | result_json(result, run.outcomes, options.metrics, **shown)
        path = _save(options, data, name)
        print(f"figures are in {path}")
    return 1 if result.num_failed or not result.num_completed else 0


async def _model(server: HttpServer, wait_s: float, wanted: str | None) -> tuple[str, str | None]:
    """(model to ask for, the directory it was loaded from as the server tells it). Raises BenchError."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            status, body = await server.get("/v1/models")
            if status == 404 and wanted is not None:
                return wanted, None
            why = f"{server.url} answered {status} to /v1/models: {body[:200].decode('utf-8', 'replace')}"
            if status == 200:
                models = json.loads(body).get("data") or []
                mine = [m for m in models if wanted in (None, m.get("id"), m.get("root"))]
                if not models:
                    raise BenchError(f"the server at {server.url} has no model")
                chosen = mine[0] if mine else {"id": wanted, "root": None}
                return str(chosen["id"]), chosen.get("root")
        except BrokenAnswer as broken:
            why = f"{broken}; start a server with: penstock serve"
        except ValueError:
            why = f"{server.url} does not answer /v1/models with JSON"
        if time.monotonic() >= deadline_s:
            raise BenchError(why)
        await asyncio.sleep(0.2)


def _shots(
    options: argparse.Namespace,
    server: HttpServer,
    requests: Sequence[BenchRequest],
    model: str,
    vocabulary: Vocabulary,
) -> list[Shot]:
    """Requests as bytes with their times."""
    extra = {name: value for name in SAMPLING if (value := getattr(options, name)) is not None}
    extra |= options.extra_body
    self_timed = options.dataset_name == "timed_trace" and options.self_timed is not False
    if self_timed:
        times = [request.at_s or 0.0 for request in requests]
    else:
        rng = np.random.default_rng((options.seed, 2))
        times = arrivals(len(requests), options.request_rate, options.burstiness, rng)
    shots = []
    for number, (request, at_s) in enumerate(zip(requests, times, strict=True)):
        body = body_of(request, model, vocabulary, chat=options.chat, ignore_eos=options.ignore_eos, extra=extra)
        written = server.request("POST", options.endpoint, body, x_request_id=f"{options.request_id_prefix}{number}")
        shots.append(Shot(written, request.num_prompt, at_s))
    return shots


async def _run(options: argparse.Namespace, server: HttpServer, shots: list[Shot]) -> Run:
    """Warm-ups, then the measured run with its progress bar. Raises BenchError when a warm-up fails."""
    for begin in range(0, options.num_warmups, options.max_concurrency or 64):
        num = min(options.num_warmups - begin, options.max_concurrency or 64)
        for outcome in await asyncio.gather(*(fire(server, shots[0], options.request_timeout) for _ in range(num))):
            if outcome.error:
                raise BenchError(f"a warm-up request failed: {outcome.error}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    more = (TimeRemainingColumn(), TextColumn("{task.fields[rate]}"))
    shows = not options.disable_tqdm and sys.stdout.isatty()
    with Progress(*columns, *more, disable=not shows, transient=True) as bar:
        task = bar.add_task("Requests", total=len(shots), rate="")
        begin_s, num_tokens = time.perf_counter(), 0

        def told(outcome: Outcome) -> None:
            nonlocal num_tokens
            num_tokens += 0 if outcome.error else outcome.num_output
            rate = f"{num_tokens / (time.perf_counter() - begin_s):,.0f} output tok/s"
            bar.update(task, advance=1, rate=rate)

        return await run_load(
            server,
            shots,
            max_concurrency=options.max_concurrency,
            timeout_s=options.request_timeout,
            on_outcome=told,
        )


def _tell_failures(outcomes: Sequence[Outcome]) -> None:
    failed = [outcome.error for outcome in outcomes if outcome.error]
    for error in failed[:SHOWN_FAILURES]:
        print(f"failed: {error}")
    if len(failed) > SHOWN_FAILURES:
        print(f"... and {len(failed) - SHOWN_FAILURES} more")


def _head(options: argparse.Namespace, model: str, tokenizer_id: str | None) -> dict[str, Any]:
    """What was asked for, as the first keys of the file; metadata of the user's among them."""
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": model,
        "tokenizer_id": tokenizer_id,
        "num_prompts": options.num_prompts,
        **options.metadata,
        "request_rate": "inf" if math.isinf(options.request_rate) else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }


def _save(options: argparse.Namespace, data: dict[str, Any], model: str) -> Path:
    """Write the result file; its path."""
    if not options.save_detailed:
        data = {name: value for name, value in data.items() if name not in DETAIL_KEYS}
    concurrency = "" if options.max_concurrency is None else f"-concurrency{options.max_concurrency}"
    base = Path(model).name
    name = f"{options.label or options.backend}-{options.request_rate}qps{concurrency}-{base}-{data['date']}.json"
    path = Path(options.result_dir or ".") / (options.result_filename or name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
