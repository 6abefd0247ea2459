"""`penstock bench throughput`, `latency` and `startup` on the built-in model: they run, and their figures add up."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from penstock.bench import latency, startup, throughput
from penstock.bench.process_usage import usage
from penstock.bench.server_process import StartFailed
from penstock.bench.startup import Start
from penstock.config.values import ConfigError

SMALL = ["--kv-cache-memory-bytes", "64M"]


def test_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t.json"
    arguments = ["--num-prompts", "5", "--input-len", "40", "--output-len", "4", "--output-json", str(out)]
    assert throughput.main(["penstock-tiny", *SMALL, *arguments, "--random-range-ratio", "0.5"]) == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["num_requests"] == 5
    assert 5 * 20 <= data["total_prompt_tokens"] <= 5 * 60
    assert 5 * 2 <= data["total_output_tokens"] <= 5 * 6
    assert data["total_num_tokens"] == data["total_prompt_tokens"] + data["total_output_tokens"]
    assert data["tokens_per_second"] == pytest.approx(data["total_num_tokens"] / data["elapsed_time"])
    assert data["requests_per_second"] == pytest.approx(5 / data["elapsed_time"])
    assert data["num_cached_tokens"] == 0  # the warm-up has put nothing of these prompts into the cache
    printed = capsys.readouterr().out
    assert f"Throughput: {data['requests_per_second']:.2f} requests/s, " in printed
    assert f"Total num prompt tokens:  {data['total_prompt_tokens']}\n" in printed
    assert f"Total num output tokens:  {data['total_output_tokens']}\n" in printed


def test_latency(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "l.json"
    arguments = ["--num-iters", "3", "--num-iters-warmup", "1", "--batch-size", "2", "--input-len", "8"]
    assert latency.main([*SMALL, *arguments, "--output-len", "3", "--output-json", str(out)]) == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    assert len(data["latencies"]) == 3
    assert min(data["latencies"]) <= data["percentiles"]["50"] <= max(data["latencies"])
    assert data["avg_latency"] == pytest.approx(sum(data["latencies"]) / 3)
    printed = capsys.readouterr().out
    assert "Avg latency: " in printed
    assert "90% percentile latency: " in printed


def test_percentiles_of_known_latencies() -> None:
    found = latency.summary([float(n) for n in range(1, 102)])
    assert found["percentiles"] == {"10": 11, "25": 26, "50": 51, "75": 76, "90": 91, "99": 100}
    assert found["avg_latency"] == 51


def test_every_second_of_a_start_is_accounted_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.json"
    arguments = ["--num-iters", "1", "--num-iters-warmup=0", "--output-json", str(out), "penstock-tiny", *SMALL]
    assert startup.main(arguments) == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    assert data["arguments"] == ["penstock-tiny", *SMALL]
    rows = dict(data["timeline"])
    assert {"python and command line", "import torch", "load weights", "request to first token"} <= set(rows)
    assert sum(rows.values()) == pytest.approx(data["median_total_s"], abs=1e-6)
    assert 0 < data["median_ready_s"] < data["median_total_s"]
    assert abs(rows["rounding"]) < 0.05  # the server's own rows are the truth to within what they print
    assert {"front end", "engine"} <= set(data["median_peak_mb"])
    assert data["median_peak_mb"]["engine"] == pytest.approx(sum(data["floor_mb"].values()) + data["beyond_mb"])
    assert 0 < data["floor_mb"]["weights"] < 60 and data["floor_mb"]["import torch"] > 50
    assert data["median_cpu_s"]["engine"] > 0.1
    printed = capsys.readouterr().out
    assert "second by second" in printed and "beyond weights, KV and torch" in printed


def test_an_offline_start(tmp_path: Path) -> None:
    out = tmp_path / "s.json"
    own = ["--offline", "--num-iters", "1", "--num-iters-warmup=0", "--input-len", "40", "--output-json", str(out)]
    assert startup.main([*own, "penstock-tiny", *SMALL]) == 0
    data = json.loads(out.read_text(encoding="utf-8"))
    rows = dict(data["timeline"])
    assert {"python", "import torch", "load weights", "prompt to first token"} <= set(rows)
    assert sum(rows.values()) == pytest.approx(data["median_total_s"], abs=1e-6)
    assert min(rows.values()) >= 0
    assert data["offline"] is True and set(data["median_peak_mb"]) == {"python"}


def test_an_offline_start_that_fails() -> None:
    with pytest.raises(StartFailed, match="exit code 1"):
        startup.measure_offline(startup._config(["penstock-tiny", "--max-model-len", "99999999"]), 8, 60)


def test_usage_of_a_process() -> None:
    used = usage(os.getpid())
    assert used is not None and used.peak_mb > 10 and used.cpu_s > 0.1
    memory = np.ones(40 << 17)  # 40 MiB, touched
    after = usage(os.getpid())
    assert after is not None and after.peak_mb >= used.peak_mb and after.cpu_s >= used.cpu_s
    assert len(memory) and usage(2**22 + 1) is None


def test_a_server_that_does_not_start_is_told_with_its_words() -> None:
    with pytest.raises(StartFailed, match="no directory and no built-in model"):
        startup.main(["--num-iters", "1", "penstock-tyni"])


def test_the_median_start_is_one_that_happened() -> None:
    starts = [Start([("a", total)], total / 2, total) for total in (4.0, 1.0, 3.0, 2.0)]
    found = startup.summary(starts)
    assert found["timeline"] == [("a", 2.0)]
    assert (found["median_total_s"], found["min_total_s"], found["max_total_s"]) == (2.0, 1.0, 4.0)
    assert found["median_ready_s"] == 1.25


def test_bad_numbers() -> None:
    for run, arguments in (
        (throughput.main, ["--num-prompts", "0"]),
        (latency.main, ["--batch-size", "0"]),
        (startup.main, ["--num-iters", "0"]),
    ):
        with pytest.raises(ConfigError, match=arguments[0]):
            run(arguments)
