"""What tests of prefill and decode apart share: models, requests, and what one engine answers to them.

The reference is `LLM` in this process. Knows no hand-off.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from tests.e2e.serving import ASSETS, RealServer
from tests.shared.tiny_tokenizers import byte_level, save

from penstock import LLM, SamplingParams

CHUNK = 128  # tokens computed in one step: prompts take many
# Whatever is longer than 64 tokens is handed over, short answers too; engines keep their roles.
COMMON = (
    "--max-num-batched-tokens", str(CHUNK), "--pd-min-tokens", "64", "--pd-max-short-output", "0", "--no-pd-scaling",
    "--disable-log-stats", "--generation-config", "vllm",
)  # fmt: skip
KV_BYTES = "32M"


def prompt(num_tokens: int, seed: int, vocab_size: int = 400) -> list[int]:
    """Token ids that mean nothing; the first ones are special in many vocabularies."""
    draw = random.Random(seed)
    return [draw.randrange(10, vocab_size) for _ in range(num_tokens)]


def mistral(directory: Path) -> Path:
    """A model with a sliding window of 64 tokens; its weights are `--load-format dummy`."""
    config = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "sliding_window": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 0,
        "bos_token_id": 1,
    }
    save(byte_level(), directory, {"eos_token": "<|endoftext|>"})
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@dataclass(frozen=True)
class Asked:
    """One completion: what the API is asked and what `LLM.generate` is."""

    prompt: list[int]
    fields: dict[str, Any]

    @property
    def body(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "temperature": 0, **self.fields, "return_token_ids": True}

    @property
    def params(self) -> SamplingParams:
        fields = {"temperature": 0, **self.fields}
        return SamplingParams(**fields)


def asked(num_tokens: int, number: int, /, **fields: Any) -> Asked:
    return Asked(prompt(num_tokens, number), {"max_tokens": 16, "ignore_eos": True, **fields})


@dataclass(frozen=True)
class Answer:
    """One choice, as far as it must be equal however it was computed."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    logprobs: list[float] | None
    prompt_logprobs: list[float] | None


class Reference:
    """One engine. Answers are remembered."""

    def __init__(self, model: Path | str = ASSETS, **settings: Any) -> None:
        self.llm = LLM(model, kv_cache_memory_bytes=KV_BYTES, **settings)
        self._answers: dict[str, list[Answer]] = {}

    def answers(self, request: Asked) -> list[Answer]:
        key = json.dumps([request.prompt, request.fields])
        if key not in self._answers:
            [output] = self.llm.generate(request.prompt, request.params, use_tqdm=False)
            told = _prompt_logprobs(output.prompt_logprobs, request.prompt)
            self._answers[key] = [
                Answer(
                    list(each.token_ids),
                    each.text,
                    each.finish_reason,
                    None
                    if each.logprobs is None
                    else [entry[t].logprob for entry, t in zip(each.logprobs, each.token_ids)],
                    told,
                )
                for each in output.outputs
            ]
        return self._answers[key]

    def close(self) -> None:
        self.llm.close()


def _prompt_logprobs(rows: Any, token_ids: list[int]) -> list[float] | None:
    if rows is None:
        return None
    return [row[t].logprob for row, t in zip(rows[1:], token_ids[1:])]


def answers_of(body: dict[str, Any], request: Asked) -> list[Answer]:
    """The choices of a response that was not streamed."""
    found = []
    for choice in body["choices"]:
        logprobs, rows = choice["logprobs"], choice.get("prompt_logprobs")
        told = None
        if rows is not None:
            told = [row[str(t)]["logprob"] for row, t in zip(rows[1:], request.prompt[1:])]
        found.append(
            Answer(
                choice["token_ids"],
                choice["text"],
                choice["finish_reason"],
                None if logprobs is None else logprobs["token_logprobs"],
                told,
            )
        )
    return found


def ask(server: RealServer, request: Asked) -> list[Answer]:
    """Ask and wait."""
    response = server.post("/v1/completions", request.body)
    assert response.status_code == 200, response.text
    return answers_of(response.json(), request)


def handoffs(server: RealServer) -> dict[str, int]:
    """How many prompts were received by engines that decode, tries failed, prompts were computed where they are decoded
    (local), and prompts were sent: over all engines."""
    found: Counter[str] = Counter()
    for line in server.http.get("/metrics").text.splitlines():
        if line.startswith("penstock:handoff_prompts_total"):
            found[line.split('outcome="')[1].split('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    return found


def engine_pids(server: RealServer) -> dict[str, int]:
    """Process ids by engine name, of those that run now."""
    found = {}
    for pid in server.children():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8").split("\0")
        except OSError:
            continue
        if "penstock.build.engine_process" in words:
            found[words[words.index("penstock.build.engine_process") + 2]] = pid
    return found


def is_ready(server: RealServer) -> bool:
    try:
        return server.http.get("/health").status_code == 200
    except httpx.TransportError:
        return False
