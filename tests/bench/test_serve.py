"""`penstock bench serve` against a real `penstock serve` on the built-in model, and what its command line refuses."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.bench import serve
from penstock.bench.metrics import DETAIL_KEYS
from penstock.bench.serve import BenchError
from penstock.bench.server_process import ServerProcess, free_port, running_server
from penstock.config.values import ConfigError

KEYS = {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate",
    "burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s",
    "max_concurrent_requests",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with running_server(["penstock-tiny", "--kv-cache-memory-bytes", "64M", "--disable-log-stats"]) as running:
        yield running


def bench(server: ServerProcess, folder: Path, *arguments: str) -> dict[str, object]:
    """Run it with the arguments; the result file's content. Every request must succeed."""
    common = ["--base-url", server.url, "--disable-tqdm", "--save-result", "--result-dir", str(folder)]
    code = serve.main([*common, "--result-filename", "out.json", *arguments])
    assert code == 0
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def test_random_prompts(server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bench(
        server, tmp_path, "--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "5", "--seed", "3",
        "--num-warmups", "2", "--max-concurrency", "3", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--metric-percentiles", "50,99", "--goodput", "e2el:600000", "--metadata", "machine=test", "--save-detailed",
        "--label", "mine", "--temperature", "0",
    )  # fmt: skip
    assert set(data) >= KEYS | set(DETAIL_KEYS) | {"p50_ttft_ms", "p99_e2el_ms", "machine"}
    assert (data["completed"], data["failed"]) == (6, 0)
    assert data["total_input_tokens"] == 6 * 20
    assert data["output_lens"] == [5] * 6  # end tokens are ignored
    assert data["input_lens"] == [20] * 6
    assert data["model_id"] == data["tokenizer_id"] == "penstock-tiny"
    assert data["request_rate"] == "inf"
    assert data["max_concurrent_requests"] <= 3
    assert data["request_goodput"] == data["request_throughput"]
    assert all(0 < ttft <= latency for ttft, latency in zip(data["ttfts"], data["latencies"], strict=True))
    printed = capsys.readouterr().out
    assert "============ Serving Benchmark Result ============" in printed
    assert "Successful requests:                     6         " in printed
    assert "Maximum request concurrency:             3         " in printed
    assert "P50 E2EL (ms):" in printed


def test_chat_with_arrivals(server: ServerProcess, tmp_path: Path) -> None:
    data = bench(
        server, tmp_path, "--backend", "openai-chat", "--num-prompts", "5", "--input-len", "12", "--output-len", "4",
        "--request-rate", "50", "--burstiness", "2",
    )  # fmt: skip
    assert set(data) & set(DETAIL_KEYS) == set()
    assert (data["completed"], data["total_output_tokens"]) == (5, 20)
    assert data["duration"] >= 5 / 50
    assert data["request_rate"] == 50.0


def test_a_trace_is_played_in_its_time_and_its_prefixes_hit(server: ServerProcess, tmp_path: Path) -> None:
    rows = [
        {"timestamp": 150 * n, "input_length": 1024 + 100 * n, "output_length": 64, "hash_ids": [0, 1, 10 + n]}
        for n in range(4)
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    before = hits(server)
    data = bench(
        server, tmp_path, "--dataset-name", "timed_trace", "--dataset-path", str(path), "--num-prompts", "4",
        "--timed-trace-length-scale", "0.125", "--timed-trace-speed", "0.5", "--save-detailed",
    )  # fmt: skip
    assert data["input_lens"] == [128, 140, 153, 166]
    assert data["output_lens"] == [8] * 4
    starts = data["start_times"]
    assert 0.6 < starts[-1] - starts[0] < 30, "0.9 s at half the speed, however busy the machine is"
    wanted = before + 3 * 96  # 128 tokens are shared by all four, and the last token of a prompt is always computed
    until = time.monotonic() + 5
    while hits(server) < wanted and time.monotonic() < until:  # the engine reports a few times a second
        time.sleep(0.05)
    assert hits(server) >= wanted


def hits(server: ServerProcess) -> float:
    import httpx

    text = httpx.get(f"{server.url}/metrics").text
    [line] = [line for line in text.splitlines() if line.startswith("vllm:prefix_cache_hits_total{")]
    return float(line.split()[-1])


def test_failures_are_counted_and_told(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--base-url", server.url, "--num-prompts", "3", "--input-len", "5000", "--disable-tqdm"]
    assert serve.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "Failed requests:                         3" in printed
    assert "failed: 400:" in printed
    with pytest.raises(BenchError, match="a warm-up request failed: 404"):
        serve.main([*arguments, "--model", "nothing-like-it", "--num-warmups", "1"])


def test_a_custom_file_without_a_tokenizer(server: ServerProcess, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Once upon a time"}\n{"prompt": "The cat"}\n', encoding="utf-8")
    data = bench(
        server, tmp_path, "--dataset-name", "custom", "--dataset-path", str(path), "--num-prompts", "4",
        "--custom-output-len", "3", "--model", "penstock-tiny",
    )  # fmt: skip
    assert data["completed"] == 4
    assert data["total_output_tokens"] <= 12


def test_nobody_at_the_address() -> None:
    with pytest.raises(BenchError, match="start a server with: penstock serve"):
        serve.main(["--port", str(free_port()), "--ready-check-timeout-sec", "0.3"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--num-prompts", "0"], "--num-prompts"),
        (["--request-rate", "0"], "--request-rate"),
        (["--request-rate", "nan"], "--request-rate"),
        (["--burstiness", "0"], "--burstiness"),
        (["--max-concurrency", "0"], "--max-concurrency"),
        (["--percentile-metrics", "ttft,foo"], "'foo' is none of"),
        (["--metric-percentiles", "101"], "--metric-percentiles"),
        (["--metric-percentiles", "x"], "--metric-percentiles"),
        (["--goodput", "itl:3"], "--goodput"),
        (["--self-timed"], "only a timed_trace has times"),
        (["--endpoint", "/v1/chat/completions"], "--endpoint"),
        (["--metadata", "novalue"], "KEY=VALUE"),
        (["--extra-body", "[]"], "--extra-body"),
        (["--dataset-name", "hf"], "--dataset-name"),
        (["--num-promts", "3"], "did you mean --num-prompts"),
    ],
)
def test_bad_command_lines_are_refused_before_anything_is_sent(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        serve.main(["--port", str(free_port()), *arguments])


def test_datasets_need_their_files(server: ServerProcess) -> None:
    for arguments in (["--dataset-name", "sharegpt"], ["--dataset-name", "random", "--dataset-path", "x.json"]):
        with pytest.raises(ConfigError, match="--dataset-path"):
            serve.main(["--base-url", server.url, *arguments])
    with pytest.raises(ConfigError, match="--tokenizer"):
        serve.main(["--base-url", server.url, "--tokenizer", "/nothing/here"])
