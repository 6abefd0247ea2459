"""What a real server says besides answers: ids, metrics, tokens, the live numbers, explanations. Without any client."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tests.e2e.serving import MAX_MODEL_LEN, MODEL, RealServer, assert_error, streaming, until

import penstock

BODY: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 4, "ignore_eos": True}

# vLLM's names as far as they mean something for an engine on one machine without adapters and drafts.
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info")
COUNTERS = (
    "prompt_tokens", "prompt_tokens_cached", "generation_tokens", "num_preemptions", "prefix_cache_queries",
    "prefix_cache_hits", "request_success", "prompt_tokens_by_source", "admission_rejections",
)  # fmt: skip
HISTOGRAMS = (
    "time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
    "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
    "request_generation_tokens", "request_params_n", "request_params_max_tokens", "iteration_tokens_total",
    "request_prefill_kv_computed_tokens",
)  # fmt: skip


def metrics(server: RealServer) -> dict[str, float]:
    """Sum over the labels of every sample but buckets, by name without the prefix."""
    found: dict[str, float] = {}
    for line in server.http.get("/metrics").raise_for_status().text.splitlines():
        match = re.fullmatch(r"vllm:(\w+)\{(.*)\} (\S+)", line)
        if match is not None and not match[1].endswith("_bucket"):
            assert f'model_name="{MODEL}"' in match[2] and 'engine="0"' in match[2]
            found[match[1]] = found.get(match[1], 0) + float(match[3])
    return found


# ---- ids ----


def test_a_request_id_goes_through_and_is_made_when_missing(server: RealServer) -> None:
    sent = server.post("/v1/completions", BODY, **{"x-request-id": "order-66.a:b_c"})
    assert sent.headers["x-request-id"] == "order-66.a:b_c"
    assert sent.json()["id"] == "cmpl-order-66.a:b_c"
    made = [server.post("/v1/completions", BODY).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1] and all(re.fullmatch(r"[0-9a-f]{32}", each) for each in made)
    replaced = server.post("/v1/completions", BODY, **{"x-request-id": "a b;c"}).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", replaced)
    assert server.http.get("/nowhere").headers["x-request-id"]


# ---- numbers ----


def test_metrics_have_vllms_names_and_move(server: RealServer) -> None:
    server.complete(**BODY)
    before = settled(server)
    missing = [name for name in GAUGES if name not in before]
    missing += [name for name in COUNTERS if f"{name}_total" not in before]
    missing += [name for name in HISTOGRAMS if f"{name}_count" not in before or f"{name}_sum" not in before]
    assert not missing

    num_prompt = server.complete(**BODY, n=2)["usage"]["prompt_tokens"]
    after = settled(server, before["request_success_total"] + 2)
    grown = {name: after[name] - before[name] for name in before}
    assert grown["request_success_total"] == 2
    assert grown["generation_tokens_total"] == 8
    assert grown["prompt_tokens_total"] == 2 * num_prompt == grown["request_prompt_tokens_sum"]
    assert grown["prompt_tokens_by_source_total"] == 2 * num_prompt
    assert grown["request_generation_tokens_sum"] == 8 and grown["request_params_max_tokens_sum"] == 8
    assert (grown["request_params_n_count"], grown["request_params_n_sum"]) == (1, 2)
    assert grown["inter_token_latency_seconds_count"] == 6
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time"):
        assert grown[f"{name}_seconds_count"] == 2
    for name in ("time_to_first_token", "e2e_request_latency", "request_decode_time", "request_inference_time"):
        assert grown[f"{name}_seconds_sum"] > 0
    # A second equal prompt of many blocks is a hit.
    long = {"prompt": "metrics " * 120, "max_tokens": 1}
    server.complete(**long)
    hits = server.complete(**long)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert hits > 64
    cached = settled(server, after["request_success_total"] + 2)
    assert cached["prefix_cache_hits_total"] - after["prefix_cache_hits_total"] == hits
    assert cached["prompt_tokens_cached_total"] - after["prompt_tokens_cached_total"] == hits


def settled(server: RealServer, num_success: float | None = None) -> dict[str, float]:
    """The metrics once nothing runs, the engine's last report is in, and so many requests have ended."""
    if num_success is not None:
        until(lambda: metrics(server)["request_success_total"] == num_success, what="a count of every request")
    server.until_idle()
    return metrics(server)


def test_load_counts_requests_in_flight(server: RealServer) -> None:
    def load() -> int:
        return int(server.http.get("/load").json()["server_load"])

    assert load() == 0
    with streaming(server, "/v1/completions", {**BODY, "max_tokens": 300}) as events:
        next(events)
        assert load() == 1
    until(lambda: load() == 0, what="an empty server")


def test_small_endpoints(server: RealServer) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ping").status_code == server.http.post("/ping").status_code == 200
    assert server.http.get("/version").json() == {"version": penstock.__version__}
    card = server.http.get("/v1/models").json()["data"][0]
    assert card["max_model_len"] == MAX_MODEL_LEN and card["root"] == MODEL
    page = server.http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    linked = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert linked and all(server.http.get(f"/{path}").status_code == 200 for path in linked)
    assert_error(server.http.get("/nowhere"), 404, code="not_found")
    assert "GET" in assert_error(server.http.post("/version"), 405, code="method_not_allowed")


# ---- tokens ----


@pytest.mark.parametrize(
    "text",
    ["Once upon a time", " leading and trailing ", "Zürich, 東京 🙂", "a\r\n\tb\0c", "<|im_end|> as text", "x" * 300],
)
def test_tokens_and_back(server: RealServer, text: str) -> None:
    told = server.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["max_model_len"] == MAX_MODEL_LEN
    assert server.post("/detokenize", {"tokens": told["tokens"]}).json() == {"prompt": text}


def test_tokenize_gives_what_a_chat_is_charged_for(server: RealServer) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    ids = server.post("/tokenize", {"messages": messages}).json()["tokens"]
    asked = {"messages": messages, "max_tokens": 6, "seed": 1, "return_token_ids": True}
    chat = server.post("/v1/chat/completions", asked).json()
    assert chat["prompt_token_ids"] == ids and chat["usage"]["prompt_tokens"] == len(ids)
    plain = server.complete(ids, max_tokens=6, seed=1)
    assert plain["choices"][0]["text"] == chat["choices"][0]["message"]["content"]


# ---- the live view ----


def test_the_snapshot_shows_a_request_and_its_blocks(server: RealServer) -> None:
    body = {**BODY, "prompt": "The live view. " * 20, "max_tokens": 400}
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        request_id = response.headers["x-request-id"]
        lines = response.iter_lines()  # kept: httpx closes the connection when it goes
        next(lines)
        seen = until(lambda: _with_blocks(server), what="a block in use")
        [engine] = seen["engines"]
        kv = engine["kv"]
        assert kv["used"] + kv["shared"] + kv["filling"] + kv["cached"] + kv["free"] == kv["num_blocks"]
        assert kv["map"]["cells"]
        assert seen["totals"]["num_requests_running"] == 1 and 0 < seen["totals"]["kv_cache_usage_perc"] < 1
        [row] = [row for row in seen["requests"] if row["request_id"] == request_id]
        assert row["state"] in ("prefill", "decode") and row["finish_ts"] is None

        during = server.http.get(f"/explain/{request_id}").json()
        assert during["finish_reason"] is None and during["prompt_tokens"] == row["prompt_tokens"]
        assert during["spans"][0]["kind"] == "queue" and during["prefix"]["runs"]
    server.until_idle()
    [row] = [row for row in server.snapshot()["requests"] if row["request_id"] == request_id]
    assert row["state"] == "aborted" and row["finish_ts"] is not None
    after = server.http.get(f"/explain/cmpl-{request_id}").json()
    assert after["finish_reason"] == "abort"
    assert during["generation_tokens"] <= after["generation_tokens"] < 400
    assert_error(server.http.get("/explain/nobody"), 404, code="request_not_found")


def _with_blocks(server: RealServer) -> dict[str, Any] | None:
    found = server.snapshot()
    return found if found["engines"][0]["kv"]["used"] else None


def test_the_live_stream_begins_with_hello(server: RealServer) -> None:
    names: list[str] = []
    with server.http.stream("GET", "/live") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("event: "):
                names.append(line[7:])
            if len(names) == 4:
                break
    assert names == ["hello", "snapshot", "snapshot", "snapshot"]
    hello = server.http.get("/live/snapshot", params={"hello": 1}).json()
    assert hello["model"]["id"] == MODEL
    settings = {row["name"]: (row["value"], row["origin"]) for row in hello["config"]}
    assert settings["max_model_len"] == (MAX_MODEL_LEN, "flag") and settings["api_key"][0] == "not set"


# ---- the cache ----


def test_the_prefix_cache_can_be_forgotten(server: RealServer) -> None:
    body = {"prompt": "Forget this prompt. " * 20, "max_tokens": 1}

    def cached() -> int:
        return int(server.complete(**body)["usage"]["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 0
    assert server.http.post("/reset_prefix_cache").json() == {"status": "ok"}
    until(lambda: server.snapshot()["engines"][0]["kv"]["cached"] == 0, what="an empty cache")
    assert cached() == 0
    assert cached() > 0
