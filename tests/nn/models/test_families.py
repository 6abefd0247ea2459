"""Tiny random models of every family, saved by transformers and read by our loader, give transformers' logits."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.nn.dense_attention import dense_batch, dense_logits

from penstock.config.model import load_model_config
from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.stream import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 301
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}


@dataclass(frozen=True)
class Case:
    """A config class of transformers and what differs from the common shape."""

    name: str
    kind: Any
    extra: dict[str, Any] = field(default_factory=dict)
    shard_size: str = "5GB"

    def __str__(self) -> str:
        return self.name


LLAMA, MISTRAL, QWEN2, QWEN3 = (
    transformers.LlamaConfig,
    transformers.MistralConfig,
    transformers.Qwen2Config,
    transformers.Qwen3Config,
)
CASES = [
    Case("llama", LLAMA),
    Case("llama-sharded", LLAMA, shard_size="30KB"),
    Case("llama-tied", LLAMA, {"tie_word_embeddings": True}),
    Case("llama-mha", LLAMA, {"num_key_value_heads": 4}),
    Case("llama-mqa", LLAMA, {"num_key_value_heads": 1}),
    Case("llama-wide-heads", LLAMA, {"head_dim": 24}),
    Case("llama-biases", LLAMA, {"attention_bias": True, "mlp_bias": True}),
    Case("llama-theta", LLAMA, {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    Case("llama3-rope", LLAMA, {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}),
    Case("llama-linear-rope", LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    Case("llama-yarn-rope", LLAMA, {"rope_parameters": {**YARN, "rope_theta": 1e4}}),
    Case("yarn-not-truncated", LLAMA, {"rope_parameters": {**YARN, "rope_theta": 1e4, "truncate": False}}),
    Case("yarn-mscale", LLAMA, {"rope_parameters": {**YARN, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    Case(
        "yarn-betas", LLAMA, {"rope_parameters": {**YARN, "rope_theta": 1e4, "beta_fast": 8.0, "attention_factor": 1.1}}
    ),
    Case("mistral", MISTRAL, {"sliding_window": None}),
    Case("mistral-window", MISTRAL, {"sliding_window": 9}),
    Case("mistral-window-sharded", MISTRAL, {"sliding_window": 5, "num_key_value_heads": 1}, shard_size="30KB"),
    Case("qwen2", QWEN2),
    Case("qwen2-tied", QWEN2, {"tie_word_embeddings": True}),
    Case("qwen2-window", QWEN2, {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    Case("qwen2-unused-window", QWEN2, {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 1}),
    Case("qwen3", QWEN3),
    Case("qwen3-tied-sharded", QWEN3, {"tie_word_embeddings": True}, shard_size="30KB"),
    Case("qwen3-wide-heads", QWEN3, {"head_dim": 32, "num_key_value_heads": 1}),
    Case("qwen3-biases", QWEN3, {"attention_bias": True}),
    Case("qwen3-yarn", QWEN3, {"rope_parameters": {**YARN, "rope_theta": 1e6}}),
]


def reference_model(case: Case, directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers with weights that spread its logits, saved in `directory`."""
    config = case.kind(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "max_position_embeddings": 128,
            "attn_implementation": "eager",
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **case.extra,
        }
    )
    torch.manual_seed(len(case.name))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (3.0 if "embed" in name or "lm_head" in name else 1.2) / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if name.endswith("weight") else -0.5))
    model = model.to(dtype)
    model.save_pretrained(directory, max_shard_size=case.shard_size)
    return model


def our_model(directory: Path, dtype: torch.dtype) -> LlamaModel:
    config = load_model_config(directory)
    model = create_model(config, dtype)
    load_weights(directory, model, model_routes(config))
    return model


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (1, 2, 37, 90)]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_equal_those_of_transformers(case: Case, tmp_path: Path) -> None:
    """float32, relative error of every logit <= 1e-5, whole prompts of 1 to 90 tokens in one batch."""
    reference = reference_model(case, tmp_path)
    num_files = len(list(tmp_path.glob("*.safetensors")))
    assert (num_files > 1) == (case.shard_size != "5GB")
    ours = dense_logits(our_model(tmp_path, torch.float32), prompts())
    with torch.inference_mode():
        theirs = torch.cat([reference(torch.tensor([prompt])).logits[0] for prompt in prompts()])
    assert theirs.std() >= 2
    assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("llama", "qwen2", "qwen3")], ids=str)
def test_half_precision_checkpoints(case: Case, stored: torch.dtype, tmp_path: Path) -> None:
    """A bf16 or fp16 checkpoint computed in float32 is exact; in its own dtype it agrees to that dtype's rounding."""
    reference_model(case, tmp_path, stored)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        theirs = torch.cat([reference(torch.tensor([prompt])).logits[0] for prompt in prompts()])
    model = our_model(tmp_path, torch.float32)
    assert model.config.dtype == str(stored).removeprefix("torch.")
    assert relative_error(dense_logits(model, prompts()), theirs) <= 1e-5
    half = our_model(tmp_path, stored)
    assert {parameter.dtype for parameter in half.parameters()} == {stored}
    assert half.rotary.cos.dtype == torch.float32, "tables in half precision would spoil far positions"
    logits = dense_logits(half, prompts())
    assert logits.dtype == torch.float32
    assert relative_error(logits, theirs) <= (6e-2 if stored == torch.bfloat16 else 1e-2)


@pytest.mark.parametrize("case", [case for case in CASES if case.name == "llama-linear-rope"], ids=str)
def test_positions_that_only_scaling_gives(case: Case, tmp_path: Path) -> None:
    """A prompt longer than max_position_embeddings, as long as the scaling allows."""
    reference = reference_model(case, tmp_path)
    model = our_model(tmp_path, torch.float32)
    assert (model.config.max_position, model.config.num_positions) == (128, 384)
    prompt = torch.randint(0, VOCAB, (384,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = reference(prompt[None]).logits[0]
    assert relative_error(dense_logits(model, [prompt.tolist()]), theirs) <= 1e-5
    short = create_model(model.config, torch.float32, num_positions=100)
    assert torch.equal(short.rotary.cos, model.rotary.cos[:100])


def test_batching_changes_nothing_but_rounding(tmp_path: Path) -> None:
    """Each prompt alone gives the logits it has in a batch: sequences do not see each other."""
    reference_model(CASES[0], tmp_path)
    model = our_model(tmp_path, torch.float32)
    together = dense_logits(model, prompts())
    alone = torch.cat([dense_logits(model, [prompt]) for prompt in prompts()])
    assert relative_error(together, alone) <= 1e-5


@torch.inference_mode()
def test_hidden_states_are_those_of_the_outputs(tmp_path: Path) -> None:
    reference_model(CASES[0], tmp_path)
    model = our_model(tmp_path, torch.float32)
    batch = dense_batch(model.config, prompts())
    every = model(batch)
    for outputs in ([0, 2, 39, 129], [], [57]):
        batch.outputs = torch.tensor(outputs, dtype=torch.int64)
        assert torch.equal(model(batch), every[outputs])


def test_tied_head_is_one_parameter(tmp_path: Path) -> None:
    reference_model(next(case for case in CASES if case.name == "llama-tied"), tmp_path)
    model = our_model(tmp_path, torch.float32)
    assert model.head.weight is model.embed.weight
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters
