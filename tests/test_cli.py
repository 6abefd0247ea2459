"""The command line as users meet it: help, verbs, errors, exit codes; the client against a server of this test."""

from __future__ import annotations

import ast
import importlib.util
import io
import json
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.shared.tiny_tokenizers import byte_level, save

from penstock import __version__, cli
from penstock.commands import families
from penstock.commands.doctor import findings
from penstock.commands.packages import required, satisfies
from penstock.commands.serve import ready_text
from penstock.config.load import resolve

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "eos_token_id": 0,
}
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory without weights: `--load-format dummy` makes them up."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return save(byte_level(), directory, {"chat_template": TEMPLATE, "eos_token": "<|endoftext|>"})


def run(*arguments: str, stdin: str = "", timeout: float = 120, **environ: str) -> subprocess.CompletedProcess[str]:
    """`penstock ...` in a process of its own, without this process's settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PENSTOCK_", "VLLM_"))}
    command = [sys.executable, "-m", "penstock.cli", *arguments]
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=timeout, env=clean | environ, check=False
    )


# ---- start-up ----


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from penstock.cli import main; main(['--help']); print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    heavy = {"torch", "numpy", "yaml", "zmq", "msgspec", "starlette", "uvicorn", "tokenizers", "rich", "jinja2"}
    assert not heavy.intersection(line.split(".")[0] for line in done.stderr.splitlines())
    assert all(verb in done.stdout for verb in cli.VERBS)

    times = []
    for _ in range(5):
        started = time.perf_counter()
        run("--help")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.3


@pytest.mark.parametrize("arguments", [["serve", "--help"], ["plan", "--help=all"], ["chat", "-h"], ["help", "doctor"]])
def test_help_of_a_verb_imports_no_torch(arguments: list[str]) -> None:
    code = f"import sys; from penstock.cli import main; main({arguments!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stdout.startswith("usage: penstock")


def test_every_name_in_the_command_tables_exists() -> None:
    named = [(module, function) for module, function, _ in cli.VERBS.values()]
    named += [(module, "main") for table in (families.BENCH, families.TRAIN) for module, _ in table.values()]
    named += [("penstock.build.serve", "serve"), ("penstock.llm", "LLM"), ("penstock.core.request", "SamplingParams")]
    named += [("penstock.nn.weights.llama2c", "convert_llama2c")]
    missing = []
    for module, name in named:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        tree = ast.parse(Path(spec.origin).read_text()) if spec and spec.origin else ast.Module([], [])
        defined = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        if name not in defined:
            missing.append(f"{module}.{name}")
    assert not missing


# ---- errors ----


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["serv"], 2, "no command 'serv'; did you mean serve?"),
        (["xyzzy"], 2, "no command 'xyzzy'; penstock --help lists them"),
        (["serve", "--max-num-seq", "4"], 2, "unknown flag --max-num-seq; did you mean --max-num-seqs?"),
        (["serve", "-tp", "2"], 2, "-tp: not supported yet"),
        (["serve", "a", "--model", "b"], 2, "two models were given: a and b"),
        (["serve", "no/model"], 2, "hf download no/model"),
        (["serve", "--config", "none.yaml"], 2, "cannot read none.yaml: No such file or directory"),
        (["plan", "penstock-tny"], 2, "did you mean penstock-tiny?"),
        (["plan", "--free", "lots"], 2, "--free: 'lots' is not a size"),
        (["bench", "sevre"], 2, "did you mean serve?"),
        (["train", "vision"], 2, "has no 'vision'; there is lm"),
        (["convert", "gguf"], 2, "has no 'gguf'"),
        (["convert", "llama2c", "none.bin", "--tokenizer", "t", "none"], 1, "none.bin: No such file"),
        (["chat", "--url", "http://127.0.0.1:1", "hi"], 1, "no answer from http://127.0.0.1:1"),
        (["chat", "--url", "ftp://x", "hi"], 1, "is not an address such as"),
        (["generate", "--file", "none.txt"], 2, "--file: cannot read none.txt"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    arguments: list[str], code: int, says: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PENSTOCK_DEBUG", raising=False)
    assert cli.main(arguments) == code
    out, err = capfd.readouterr()
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("penstock: ")
    assert out == ""


def test_a_traceback_only_when_asked_for(tmp_path: Path) -> None:
    arguments = ["plan", str(tmp_path)]
    assert "Traceback" not in run(*arguments).stderr
    assert "Traceback" in run(*arguments, "--debug").stderr
    assert "Traceback" in run(*arguments, PENSTOCK_DEBUG="1").stderr


def test_a_bug_of_ours_has_its_own_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(cli.VERBS, "version", ("penstock.config.values", "no_such_function", ""))
    assert cli.main(["version"]) == 70
    assert "internal error, AttributeError" in capsys.readouterr().err


def test_a_port_in_use_is_told_before_anything_loads(model: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        done = run("serve", str(model), "--load-format", "dummy", "--port", str(port), timeout=60)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert f"{port} is in use by" in last
    assert f"(process {os.getpid()})" in last
    assert f"make serve PORT={port + 1}" in last


def test_what_is_said_when_the_server_is_ready(model: Path, tmp_path: Path) -> None:
    """The printed request is one that a shell runs, for chat models and for others."""
    timeline = [("import torch", 1.5), ("nothing", 0.0), ("load weights", 0.25)]
    ready = SimpleNamespace(model_id="tiny", device="cpu, 2 threads, plain torch", timeline=timeline)
    for directory, path, field in ((model, "chat/completions", "messages"), (tmp_path, "completions", "prompt")):
        config = resolve({"api_key": "k", "model": str(directory)}, environ={})
        text = ready_text(config, ready, "http://127.0.0.1:8001", 2.0)
        assert text.startswith(
            "ready after 2.0 s: import torch 1.50 s, load weights 0.25 s, front end and waiting 0.25 s"
        )
        assert "\n  on cpu, 2 threads, plain torch\n" in text
        command = text[text.index("curl") : text.index("}'") + 2].replace("\\\n", " ")
        words = shlex.split(command)
        assert words[1] == f"http://127.0.0.1:8001/v1/{path}"
        body = json.loads(words[words.index("-d") + 1])
        assert body["model"] == "tiny"
        assert field in body
        assert "authorization: Bearer $PENSTOCK_API_KEY" in words
        assert ("penstock chat" in text) == (field == "messages")


# ---- verbs ----


def test_version_and_environment_without_secrets() -> None:
    assert run("--version").stdout == run("version").stdout == f"penstock {__version__}\n"
    done = run("collect-env", PENSTOCK_API_KEY="s3cret", VLLM_API_KEY="s3cret", OMP_NUM_THREADS="2")
    assert done.returncode == 0
    assert "s3cret" not in done.stdout
    assert "PENSTOCK_API_KEY=(hidden)" in done.stdout
    assert "OMP_NUM_THREADS=2" in done.stdout


def test_plan_as_table_and_as_json(model: Path) -> None:
    table = run("plan", str(model)).stdout
    assert "Qwen3ForCausalLM" in table
    assert "KV cache" in table
    done = run("plan", str(model), "--json", "--free", "2GiB", "--max-num-seqs", "4")
    fields = json.loads(done.stdout)
    assert fields["free_bytes"] == 2 << 30
    assert fields["max_model_len"] == 256
    assert fields["num_blocks"] == [4 * 8 + 1]
    short = run("plan", str(model), "--free", "100M")
    assert short.returncode == 2
    assert "not enough memory" in short.stderr


def test_doctor_has_a_verdict_a_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["doctor", str(model), "--port", "0"])
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[1]: line.split()[0] for line in lines[:-1]}
    assert verdicts.keys() >= {"python", "packages", "cpu", "memory", "disk", "compiler", "port", "model", "torch"}
    assert set(verdicts.values()) <= {"ok", "note", "bad"}
    assert [topic for topic, verdict in verdicts.items() if verdict == "bad"] == ["model"]  # it has no weights
    assert any("lacks *.safetensors" in line for line in lines)
    assert (code, lines[-1]) == (1, "one thing to fix")


def test_doctor_tells_why_a_model_or_a_port_cannot_be_used(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        found = {}
        for finding in findings(str(tmp_path), port):
            found[finding.topic] = finding
            if finding.topic == "model":
                break  # before torch is looked at
    assert "config.json does not exist" in found["model"].text
    assert found["port"].verdict == "note"
    assert f"penstock serve --port {port + 1}" in found["port"].text


def test_generate_offline(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Once"}\n{"prompt": "The quick"}\n')
    options = ["generate", str(model), "--load-format", "dummy", "--max-tokens", "5", "--ignore-eos"]
    options += ["--temperature", "0"]
    assert cli.main([*options, "--json", "--file", str(prompts), "-n", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt"] for row in rows] == ["Once", "The quick"]
    assert all(row["output_tokens"] == 10 and len(row["outputs"]) == 2 for row in rows)
    assert rows[0]["outputs"][0]["text"] == rows[0]["outputs"][1]["text"]  # greedy

    monkeypatch.setattr("sys.stdin", io.StringIO("Once\n\n"))
    assert cli.main(options) == 0
    assert capsys.readouterr().out == "Once" + rows[0]["outputs"][0]["text"] + "\n"

    assert cli.main([*options, "--chat", "-p", "Once"]) == 0
    assert capsys.readouterr().out.startswith("> Once\n")
    assert cli.main([*options, "-p", "Once", "--top-p", "2"]) == 1
    assert "top_p" in capsys.readouterr().err


def test_demo_is_a_whole_round_trip(model: Path) -> None:
    done = run("demo", str(model), PENSTOCK_LOAD_FORMAT="dummy", OMP_NUM_THREADS="2", timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    for step in ("$ penstock serve", "ready after", "(streamed)", "answered, first after", "stopped."):
        assert step in done.stdout


def test_demo_shows_the_servers_last_words(tmp_path: Path) -> None:
    done = run("demo", str(tmp_path))
    assert done.returncode == 1
    assert "the server ended with exit code 2 before it was ready" in done.stderr
    assert "config.json does not exist" in done.stderr


def test_packages_and_versions() -> None:
    names = {name.lower() for name, _, have in required() if have}
    assert {"torch", "numpy", "pyzmq", "pyyaml"} <= names
    assert satisfies("2.13.0+cpu", ">=2.13")
    assert satisfies("2.13.1", ">=2.13,<3")
    assert not satisfies("2.9.1", ">=2.13")
    assert not satisfies("3.0", ">=2.13,<3")


# ---- chat, against a server that answers as OpenAI's do ----


class Answers(BaseHTTPRequestHandler):
    """Streams the last message back in upper case, a letter an event. "fail" fails, "break" ends mid-way."""

    seen: list[dict[str, Any]]
    key = ""

    def log_message(self, *_: Any) -> None:
        """No access log in the tests' output."""

    def do_GET(self) -> None:
        self._json(200, {"object": "list", "data": [{"id": "upper-case"}]})

    def do_POST(self) -> None:
        if self.key and self.headers.get("authorization") != f"Bearer {self.key}":
            return self._json(401, {"error": {"message": "a valid key is needed"}})
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        type(self).seen.append(body)
        text = body["messages"][-1]["content"]
        if text == "fail":
            return self._json(400, {"error": {"message": "this cannot be answered"}})
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        for letter in text.upper():
            self._event({"choices": [{"index": 0, "delta": {"content": letter}}]})
        if text == "break":
            return None
        usage = {"prompt_tokens": 7, "completion_tokens": len(text), "prompt_tokens_details": {"cached_tokens": 3}}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        return None

    def _event(self, event: dict[str, Any]) -> None:
        self.wfile.write(b": comment\n\ndata: " + json.dumps(event).encode() + b"\n\n")

    def _json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def server() -> Iterator[tuple[str, type[Answers]]]:
    handler = type("Handler", (Answers,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", handler
        http.shutdown()
        thread.join(10)


def test_chat_keeps_the_conversation(server: tuple[str, type[Answers]]) -> None:
    url, handler = server
    lines = "hello\nhow are you\n/facts\n/system be brief\nagain\n/reset\n/exit\nnever sent\n"
    done = run("chat", "--url", url + "/v1", "--temperature", "0", "--max-tokens", "9", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["HELLO", "HOW ARE YOU"]
    assert "7 prompt tokens (3 cached), 11 answered" in done.stdout
    assert [len(body["messages"]) for body in handler.seen] == [1, 3, 2]
    assert handler.seen[1]["messages"][1] == {"role": "assistant", "content": "HELLO"}
    assert handler.seen[2]["messages"][0] == {"role": "system", "content": "be brief"}
    assert handler.seen[0]["model"] == "upper-case"
    assert (handler.seen[0]["temperature"], handler.seen[0]["max_tokens"]) == (0, 9)
    assert handler.seen[0]["stream"] is True


def test_chat_answers_one_message_and_leaves(server: tuple[str, type[Answers]]) -> None:
    url, _ = server
    done = run("chat", "--url", url, "good", "morning")
    assert (done.returncode, done.stdout) == (0, "GOOD MORNING\n")


@pytest.mark.parametrize(("message", "says"), [("fail", "answered 400: this cannot be"), ("break", "before its end")])
def test_chat_tells_what_went_wrong(server: tuple[str, type[Answers]], message: str, says: str) -> None:
    url, _ = server
    done = run("chat", "--url", url, message)
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_chat_sends_its_key(server: tuple[str, type[Answers]]) -> None:
    url, handler = server
    handler.key = "right"
    refused = run("chat", "--url", url, "hi", PENSTOCK_API_KEY="wrong")
    assert "a valid key is needed (give the key with --api-key" in refused.stderr
    assert run("chat", "--url", url, "hi", PENSTOCK_API_KEY="right").stdout == "HI\n"
    assert run("chat", "--url", url, "hi", "--api-key", "right", PENSTOCK_API_KEY="wrong").stdout == "HI\n"
