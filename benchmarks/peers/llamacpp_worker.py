"""llama.cpp's side: `llama-server` below this process, asked over HTTP by as many threads as there are prompts.

Its own Python package has no continuous batching, so the server it is. `prepare` writes the checkpoint as GGUF, and
quantizes it with llama.cpp's own tool. A server that dies of a signal in its first answer (seen with AMX and repacked
weights) is started once more without repacking; the settings tell.
"""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worker import KV_TOKENS_UNSHARED, Settings, main, model_shape

BINARIES = Path(sys.prefix) / "llama.cpp" / "bin"  # install.py builds them there
FORMATS = {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_0"}
MAX_SLOTS = 256
START_S = 300.0

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def prepare(settings: Settings) -> None:
    settings.prepared.mkdir(parents=True, exist_ok=True)
    plain = settings.prepared / "bf16.gguf"
    _write_gguf(settings.model, plain)
    kind = FORMATS[settings.variant]
    if settings.variant != "bf16":
        quantized = settings.prepared / f"{settings.variant}.gguf"
        subprocess.run([str(BINARIES / "llama-quantize"), str(plain), str(quantized), kind], check=True)
        plain.unlink()


def _write_gguf(model: Path, path: Path) -> None:
    import gguf
    import numpy as np

    shape = model_shape(model)
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name("synthetic")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_rope_freq_base(shape["rope_theta"])
    # A vocabulary that no prompt uses: bytes, as GPT-2 writes them, then numbered tokens.
    visible = [chr(n) if 33 <= n <= 126 or 161 <= n <= 172 or 174 <= n <= 255 else "" for n in range(256)]
    others = iter(range(256, 512))
    texts = [each or chr(next(others)) for each in visible]
    texts += [f"<t{n}>" for n in range(256, shape["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(texts))
    writer.add_token_merges([f"{texts[97]} {texts[98]}"])
    writer.add_eos_token_id(shape["eos_token_id"])
    writer.add_add_bos_token(False)

    file = model / "model.safetensors"
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    data = np.memmap(file, np.uint8, "r", 8 + header_bytes)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = np.asarray(data[begin:end])
        to = _gguf_name(name)
        if len(entry["shape"]) == 1:  # norms: float32
            writer.add_tensor(to, (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
        else:
            rows, columns = entry["shape"]
            raw = raw.reshape(rows, columns * 2)
            writer.add_tensor(to, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


class ServerDied(Exception):
    """With the signal that ended it."""


class LlamaCpp:
    def __init__(self, settings: Settings) -> None:
        self._model = settings.prepared / f"{settings.variant}.gguf"
        self._threads = settings.threads
        self._kv_tokens = KV_TOKENS_UNSHARED[settings.model.name]
        self._pool = concurrent.futures.ThreadPoolExecutor(MAX_SLOTS)
        extra: list[str] = []
        try:
            self._start(extra)
            self.run([[20, 21, 22, 23]], 2)
        except (ServerDied, OSError, http.client.HTTPException):
            self.close()
            extra = ["--no-repack"]
            self._start(extra)
        version = subprocess.run(
            [str(BINARIES / "llama-server"), "--version"], capture_output=True, text=True, check=False
        )
        found = (version.stderr + version.stdout).strip().splitlines()
        self.settings: dict[str, Any] = {
            "versions": {"llama.cpp": next((line for line in found if "version" in line), "")},
            "arguments": self._arguments(extra)[3:],
        }

    def _arguments(self, extra: list[str]) -> list[str]:
        threads = str(self._threads)
        return [
            str(BINARIES / "llama-server"), "-m", str(self._model), "--parallel", str(MAX_SLOTS), "--kv-unified",
            "-c", str(self._kv_tokens), "-fa", "on", "-t", threads, "-tb", threads, "-b", "2048", "-ub", "512",
            "--threads-http", str(MAX_SLOTS + 2), "--cache-ram", "0", "--slot-save-path", f"{self._model.parent}/",
            *extra,
        ]  # fmt: skip

    def _start(self, extra: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        command = [*self._arguments(extra), "--host", "127.0.0.1", "--port", str(self._port)]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerDied(f"llama-server ended with {self._process.returncode}")
            try:
                if self._ask("GET", "/health", None)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise ServerDied("llama-server is not ready")

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=3600)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def run(self, prompts: list[list[int]], num_output: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        answers = [self._pool.submit(self._complete, prompt, num_output) for prompt in prompts]
        done = [answer.result() for answer in answers]
        elapsed_s = time.perf_counter() - begin
        # Attention runs over all of the shared KV that is in use: old prompts, which nobody asks for again, would slow
        # down the next work.
        for slot, _ in done:
            self._ask("POST", f"/slots/{slot}?action=erase", {})
        return elapsed_s, [tokens for _, tokens in done]

    def _complete(self, prompt: list[int], num_output: int) -> tuple[int, list[int]]:
        """(the slot that it ran in, token ids)."""
        body = {
            "prompt": prompt, "n_predict": num_output, "ignore_eos": True, "temperature": 0, "top_k": 1,
            "samplers": ["top_k"], "cache_prompt": True, "return_tokens": True, "stream": False,
        }  # fmt: skip
        status, answer = self._ask("POST", "/completion", body)
        if status != 200:
            raise RuntimeError(f"llama-server answered {status}: {answer[:300]!r}")
        found = json.loads(answer)
        return found["id_slot"], [int(each) for each in found["tokens"]]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(20)


if __name__ == "__main__":
    # Told to end while it waits, it must not leave its server behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main(LlamaCpp, prepare)
