"""The commands as a newcomer types them, on the built-in model: they end with 0 and say something of use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.e2e.serving import MODEL, RealServer, clean_environment, penstock_command

from penstock import __version__


def test_demo_is_a_whole_round_trip() -> None:
    done = penstock_command("demo", timeout_s=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert re.search(rf"ready after [\d.]+ s: {MODEL} at http://127.0.0.1:\d+", done.stdout)
    facts = re.findall(r"(\d+) prompt tokens \((\d+) cached\), (\d+) answered", done.stdout)
    assert len(facts) == 2 and all(int(answered) > 0 for _, _, answered in facts)
    assert int(facts[0][1]) == 0 and 32 <= int(facts[1][1]) < int(facts[1][0])  # the next turn comes from the cache
    assert "stopped." in done.stdout


def test_the_demo_of_prefill_and_decode_apart() -> None:
    script = Path(__file__).parents[2] / "scripts" / "pd_demo.py"
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=240, env=clean_environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"handed over: [1-9]\d* prompts, [\d.]+ MB of KV, from prefill-0 to decode-0", done.stdout)
    assert "one engine that does both says the same" in done.stdout


def test_chat_from_a_pipe_is_a_conversation(server: RealServer) -> None:
    asked = ["chat", "--url", server.url, "--temperature", "0", "--max-tokens", "12"]
    done = penstock_command(*asked, stdin="Hello!\n/facts\nAnd then?\n/facts\n/nothing\n")
    assert (done.returncode, done.stderr) == (0, "")
    facts = re.findall(r"(\d+) prompt tokens \(\d+ cached\), (\d+) answered", done.stdout)
    assert len(facts) == 2 and int(facts[1][0]) > int(facts[0][0]) + int(facts[0][1])  # it remembers
    assert "/reset" in done.stdout  # an unknown command shows the known ones
    once = penstock_command(*asked, "Hello!")
    assert (once.returncode, once.stderr) == (0, "")
    assert done.stdout.startswith(once.stdout)
    refused = penstock_command(*asked, "--model", "gpt-4", "Hello!")
    assert refused.returncode == 1
    assert "gpt-4" in refused.stderr and refused.stderr.count("\n") == 1


def test_generate_offline_is_what_the_server_says(server: RealServer) -> None:
    prompt = "Once upon a time"
    greedy = ["--max-tokens", "8", "--temperature", "0", "--dtype", "float32", "--kv-cache-memory-bytes", "16M"]
    done = penstock_command("generate", "-p", prompt, "-p", "The dog", "--json", *greedy)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("plain torch computes, slower: ")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == [prompt, "The dog"]
    online = server.complete(prompt, max_tokens=8, temperature=0)
    assert rows[0]["outputs"][0]["text"] == online["choices"][0]["text"]
    assert rows[0]["prompt_tokens"] == online["usage"]["prompt_tokens"]


def test_plan_tells_the_memory_before_anything_loads() -> None:
    done = penstock_command("plan", "--kv-cache-memory-bytes", "64M")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("Qwen3ForCausalLM", "weights", "KV cache", "681 blocks", "longest request", "2048 tokens"):
        assert word in done.stdout
    told = json.loads(penstock_command("plan", "--json", "--free", "1G").stdout)
    assert told["free_bytes"] == 1 << 30
    assert told["weights_bytes"] + told["activation_bytes"] + told["runtime_bytes"] + told["kv_bytes"] <= 1 << 30


def test_doctor_has_a_verdict_for_everything(running: RealServer) -> None:
    done = penstock_command("doctor", "--port", "0")
    assert done.returncode == 0, done.stdout
    topics = {line.split()[1] for line in done.stdout.splitlines() if line.split()[0] in ("ok", "note")}
    assert {"python", "packages", "cpu", "memory", "disk", "port", "model", "torch", "kernels"} <= topics
    assert done.stdout.splitlines()[-1] == "all in order"
    taken = penstock_command("doctor", "--port", str(running.port))
    assert f"process {running.process.pid}" in taken.stdout


def test_what_a_bug_report_needs() -> None:
    done = penstock_command("collect-env")
    assert (done.returncode, done.stderr) == (0, "")
    for word in (__version__, "python", "torch", "memory", "cores"):
        assert word in done.stdout
    assert penstock_command("version").stdout == f"penstock {__version__}\n"


@pytest.mark.parametrize("arguments", [["chat", "--url", "http://127.0.0.1:9", "Hi"], ["bench", "nothing"], ["train"]])
def test_what_cannot_be_done_is_told_in_a_line(arguments: list[str]) -> None:
    done = penstock_command(*arguments)
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr and done.stderr.count("\n") <= 1
    assert done.stderr or "usage" in done.stdout
