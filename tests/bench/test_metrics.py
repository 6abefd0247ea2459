"""The arithmetic of a serving benchmark on events made by hand, and the labels and keys that others read."""

from __future__ import annotations

import math

import pytest

from penstock.bench.metrics import DETAIL_KEYS, METRICS, block, figures, parse_goodput, percentile_word, result_json
from penstock.bench.openai_stream import Outcome
from penstock.config.values import ConfigError

# ecosystem survey, read in vLLM's benchmark: what dashboards look for
LABELS = (
    "Successful requests:", "Failed requests:", "Benchmark duration (s):", "Total input tokens:",
    "Total generated tokens:", "Request throughput (req/s):", "Request goodput (req/s):",
    "Output token throughput (tok/s):", "Peak output token throughput (tok/s):", "Peak concurrent requests:",
    "Total token throughput (tok/s):", "Mean TTFT (ms):", "Median TTFT (ms):", "P99 TTFT (ms):", "Mean TPOT (ms):",
    "Median TPOT (ms):", "P99 TPOT (ms):", "Mean ITL (ms):", "Median ITL (ms):", "P99 ITL (ms):", "Mean E2EL (ms):",
    "Median E2EL (ms):", "P99 E2EL (ms):",
)  # fmt: skip
KEYS = {
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "input_lens", "output_lens", "ttfts", "itls",
    "latencies", "start_times", "queue_times", "generated_texts", "errors", "max_output_tokens_per_s",
    "max_concurrent_requests",
}  # fmt: skip
KEYS |= {f"{word}_{name}_ms" for word in ("mean", "median", "std", "p99") for name in ("ttft", "tpot", "itl", "e2el")}


def outcomes() -> list[Outcome]:
    """Three successes and a failure; times in seconds.

    A: sent at 10.0, tokens at 10.1, 10.2, 10.4, ends there; 3 tokens.
    B: asked for at 10.0, sent at 10.4 (as A ends), tokens at 10.9 and 11.9: 4 tokens in two events.
    C: sent at 10.5, one token at 10.6.
    """
    return [
        Outcome(5, 3, asked_s=10.0, start_s=10.0, end_s=10.4, token_times_s=[10.1, 10.2, 10.4], text="abc"),
        Outcome(7, 4, asked_s=10.0, start_s=10.4, end_s=11.9, token_times_s=[10.9, 11.9], text="de"),
        Outcome(2, 1, asked_s=10.5, start_s=10.5, end_s=10.6, token_times_s=[10.6], text="f"),
        Outcome(9, 2, asked_s=10.0, start_s=10.0, end_s=10.7, token_times_s=[10.2], error="503: full"),
    ]


def test_figures() -> None:
    goodput = {"ttft": 200.0, "tpot": 200.0, "e2el": 1000.0}
    found = figures(outcomes(), 2.0, percentiles=(50.0, 99.0), goodput_ms=goodput)
    assert (found.num_completed, found.num_failed) == (3, 1)
    assert (found.num_input, found.num_output) == (14, 8)
    assert found.request_throughput == 1.5
    assert found.output_throughput == 4.0
    assert found.total_throughput == 11.0
    assert found.request_goodput == 1.0  # A and C; B's first token was late
    # Second 0 holds A's 3 tokens, half of B's 4, and C's 1; the second after it the rest of B's.
    assert found.peak_output_throughput == 6.0
    assert found.peak_concurrent == 2  # B took A's place
    spreads = found.spreads
    assert spreads["ttft"].mean_ms == pytest.approx((100 + 500 + 100) / 3)
    assert spreads["ttft"].median_ms == pytest.approx(100)
    # A: 0.3 s over 2 tokens; B: 1.0 s over 3; C has one token and no TPOT.
    assert spreads["tpot"].mean_ms == pytest.approx((150 + 1000 / 3) / 2)
    assert spreads["itl"].mean_ms == pytest.approx((100 + 200 + 1000) / 3)
    assert spreads["itl"].percentiles_ms[0] == (50.0, pytest.approx(200))
    assert spreads["e2el"].mean_ms == pytest.approx((400 + 1500 + 100) / 3)
    assert spreads["client_queue_time"].mean_ms == pytest.approx(400 / 3)
    assert spreads["e2el_including_client_queue"].mean_ms == pytest.approx(2000 / 3 + 400 / 3)
    assert spreads["ttft"].std_ms == pytest.approx(math.sqrt(2 * (400 / 3) ** 2 / 3 + (800 / 3) ** 2 / 3))


def test_nothing_succeeded() -> None:
    found = figures([Outcome(3, error="no")], 1.0)
    assert found.num_completed == 0
    assert found.output_throughput == found.peak_output_throughput == 0
    assert found.spreads["ttft"].mean_ms == 0
    assert "Failed requests:                         1" in block(found, ["ttft"])


def test_the_block_has_vllms_labels_in_order() -> None:
    found = figures(outcomes(), 2.0, goodput_ms={"ttft": 200.0})
    lines = block(found, ["ttft", "tpot", "itl", "e2el"]).splitlines()
    labels = [line[:40].rstrip() for line in lines if not line.startswith(("=", "-"))]
    assert labels == list(LABELS)
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert lines[1] == "Successful requests:                     3         "
    assert lines[3] == "Benchmark duration (s):                  2.00      "
    assert "---------------Time to First Token----------------" in lines
    assert "-----Time per Output Token (excl. 1st token)------" in lines
    assert "---------------Inter-token Latency----------------" in lines
    assert "----------------End-to-end Latency----------------" in lines
    assert lines[-1] == "=" * 50


def test_the_block_tells_only_what_was_asked_for() -> None:
    found = figures(outcomes(), 2.0, percentiles=(90.0, 99.9))
    text = block(found, ["itl", "client_queue_time", "e2el_including_client_queue"], max_concurrency=3)
    assert "goodput" not in text
    assert "TTFT" not in text
    assert "Maximum request concurrency:             3" in text
    assert "P90 ITL (ms):" in text
    assert "P99.9 ITL (ms):" in text
    assert "Mean Client Queue Time (ms):" in text
    assert "incl. Client Queue" not in text  # everything was sent at once: it would only say how many there were
    rated = block(found, list(METRICS), max_concurrency=3, request_rate=5.0)
    assert "Request rate configured (RPS):           5.00" in rated
    assert "Mean E2EL incl. Client Queue (ms):" in rated


def test_the_json_has_vllms_keys() -> None:
    found = figures(outcomes(), 2.0)
    data = result_json(found, outcomes(), ["ttft", "tpot", "itl", "e2el"])
    assert set(data) == KEYS
    assert set(DETAIL_KEYS) <= set(data)
    assert data["request_goodput"] is None
    assert data["output_lens"] == [3, 4, 1, 0]
    assert data["input_lens"] == [5, 7, 2, 9]
    assert data["ttfts"] == pytest.approx([0.1, 0.5, 0.1, 0.2])
    assert data["itls"][0] == pytest.approx([0.1, 0.2])
    assert data["queue_times"][1] == pytest.approx(0.4)
    assert data["errors"] == ["", "", "", "503: full"]
    assert data["generated_texts"] == ["abc", "de", "f", ""]
    assert data["p99_e2el_ms"] == found.spreads["e2el"].percentiles_ms[0][1]


def test_goodput_flags() -> None:
    assert parse_goodput(["ttft:300", "e2el:1.5"]) == {"ttft": 300.0, "e2el": 1.5}
    for wrong in ("ttft", "ttft:x", "itl:3", "tpot:-1", "tpot:nan"):
        with pytest.raises(ConfigError, match="--goodput"):
            parse_goodput([wrong])


def test_percentile_words() -> None:
    assert [percentile_word(p) for p in (50.0, 99.0, 99.9)] == ["50", "99", "99.9"]
