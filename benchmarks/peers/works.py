"""The works that every engine does, what figure each gives, and what the machine allows at best.

Knows prompts and arithmetic; no engine, no process.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from checkpoints import kv_bytes_per_token, num_parameters

FIRST_ORDINARY_ID = 16

# Bytes a weight takes, scales included: the floor of what a decode step must read, whatever an engine really stores.
WEIGHT_BYTES = {"bf16": 2.0, "8bit": 1.0, "4bit": 0.5 + 2 / 128}


@dataclass(frozen=True)
class Work:
    """`num_requests` prompts of `num_shared` common and `num_input` own tokens, `num_output` tokens out of each.

    `figure`: "decode" (tokens a second after the first one), "output" (output tokens a second) or "seconds".
    With `prefill_too` the same work is also timed with one token out, in the same turn: what is left is decoding.
    """

    name: str
    title: str
    model: str
    num_requests: int
    num_input: int
    num_output: int
    figure: str
    num_shared: int = 0
    prefill_too: bool = False

    def prompts(self, vocab_size: int, number: int, probe: bool = False) -> list[list[int]]:
        """Never the same for two numbers or two works, so that no prefix cache helps but within the work itself."""
        rng = np.random.default_rng((zlib.crc32(self.name.encode()), number, int(probe)))
        shared = rng.integers(FIRST_ORDINARY_ID, vocab_size, self.num_shared)
        own = rng.integers(FIRST_ORDINARY_ID, vocab_size, (self.num_requests, self.num_input))
        return [[*shared.tolist(), *each.tolist()] for each in own]

    @property
    def context(self) -> float:
        """Mean tokens of context of a decode step."""
        return self.num_shared + self.num_input + self.num_output / 2

    def decode_step_bytes(self, config: dict[str, Any], group: str) -> float:
        """What one decode step reads at least: all weights once, and the KV of every request (bf16)."""
        kv = self.num_requests * self.context * kv_bytes_per_token(config)
        return num_parameters(config) * WEIGHT_BYTES[group] + kv


WORKS = {
    work.name: work
    for work in (
        Work("stream", "A, one stream, 128 in / 64 out", "A", 1, 128, 64, "decode", prefill_too=True),
        Work("batch", "A, 32 x (128 in / 64 out)", "A", 32, 128, 64, "output", prefill_too=True),
        Work("prefill", "A, prefill of 1,024", "A", 1, 1024, 1, "seconds"),
        Work("ttft", "A, first token after 128", "A", 1, 128, 1, "seconds"),
        Work("shared", "A, 32 x (512 shared + 64 in / 16 out)", "A", 32, 64, 16, "seconds", num_shared=512),
        Work("b32", "B, 32 x (128 in / 64 out)", "B", 32, 128, 64, "output", prefill_too=True),
        Work("b256", "B, 256 x (64 in / 32 out)", "B", 256, 64, 32, "output"),
    )
}
STARTUP = "startup"
STARTUP_TITLE = "A, process start to first token (128 in)"

# Engines are compared within a group: (group, peer) -> the peer's variants in it.
GROUPS: dict[str, dict[str, tuple[str, ...]]] = {
    "bf16": {
        "penstock": ("bf16", "bf12"),
        "transformers": ("bf16",),
        "vllm": ("bf16",),
        "openvino": ("bf16",),
        "llamacpp": ("bf16",),
    },
    "8bit": {"penstock": ("int8", "w8a8", "w8a8c8"), "vllm": ("w8a8",), "openvino": ("int8",), "llamacpp": ("int8",)},
    "4bit": {"penstock": ("int4", "w4a8"), "vllm": ("int4",), "openvino": ("int4",), "llamacpp": ("int4",)},
}

# What is asked of each group unless --works says otherwise: what its weights are chosen for.
WORKS_OF = {
    "bf16": (*WORKS, STARTUP),
    "8bit": ("stream", "batch", "prefill", "ttft", "b32", "b256"),
    "4bit": ("stream",),
}
