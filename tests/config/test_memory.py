"""The memory plan: what it hands out fits, and what does not fit is told with what would."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.config.memory import (
    RUNTIME_BYTES,
    MemoryPlan,
    MemoryPlanError,
    plan_memory,
    request_blocks,
)
from penstock.config.model import KVLayout, ModelConfig, kv_layout, parse_model_config
from penstock.config.values import ConfigError, parse_size

GIB = 1 << 30


def model(**fields: Any) -> ModelConfig:
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    return parse_model_config(raw | fields)


MIXED = model(use_sliding_window=True, sliding_window=512, max_window_layers=2, max_position_embeddings=32768)


def plan(
    shape: ModelConfig, free_bytes: int, *, block_size: int = 32, kv_dtype: str = "bfloat16", **options: Any
) -> tuple[KVLayout, MemoryPlan]:
    layout = kv_layout(shape, block_size, kv_dtype)
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 512} | options
    return layout, plan_memory(shape, layout, free_bytes, weight_dtype="bfloat16", **limits)


def test_by_hand() -> None:
    """6 layers x 2 (K, V) x 2 heads x 64 x 2 bytes = 3,072 bytes a token, 98,304 a block of 32."""
    layout, made = plan(model(), 16 * GIB, kv_bytes=100 * 98_304)
    assert layout.groups[0].block_bytes == 98_304
    assert made.num_blocks == (100,)  # 99 to use and the null block
    assert made.max_model_len == 99 * 32
    assert made.kv_bytes == 100 * 98_304
    assert made.weights_bytes == 2 * model().num_parameters
    assert made.max_full_requests == pytest.approx(1.0)


def test_int8_nearly_doubles_the_blocks() -> None:
    """A head of 64 takes 64 bytes and a scale of 2 where bf16 takes 128: 1.94 times the blocks. Of 128: 1.97 times."""
    for head_dim, ratio in ((64, 128 / 66), (128, 256 / 130)):
        shape = model(head_dim=head_dim)
        _, wide = plan(shape, 16 * GIB, kv_bytes=GIB)
        layout, made = plan(shape, 16 * GIB, kv_bytes=GIB, kv_dtype="int8")
        assert layout.groups[0].block_bytes == 6 * 2 * 2 * 32 * (head_dim + 2)
        assert made.num_blocks[0] / wide.num_blocks[0] == pytest.approx(ratio, rel=1e-3)
        assert made.activation_bytes > wide.activation_bytes  # plain torch widens what it gathers


def test_a_default_plan_is_modest_and_holds_what_can_ever_run() -> None:
    _, made = plan(model(), 16 * GIB)
    assert made.max_model_len == 4096
    assert made.num_blocks == (1 + 32 * 128,)  # every one of 32 requests at full length, and the null block
    _, small = plan(model(), 2 * GIB)
    assert small.kv_bytes <= 0.4 * 2 * GIB
    _, large = plan(model(num_hidden_layers=48), 900 * GIB, max_num_seqs=4096)
    assert large.kv_bytes <= 8 * GIB


@given(
    free_mib=st.integers(700, 20_000),
    windows=st.booleans(),
    block_size=st.sampled_from([1, 16, 32, 64]),
    max_num_seqs=st.integers(1, 64),
    step=st.integers(64, 4096),
    wanted=st.none() | st.integers(1, 32768),
    kv_mib=st.none() | st.integers(1, 4000),
    kv_dtype=st.sampled_from(["bfloat16", "int8"]),
)
def test_what_is_planned_fits_and_serves_the_longest_request(
    free_mib: int, windows: bool, block_size: int, max_num_seqs: int, step: int, wanted: int | None,
    kv_mib: int | None, kv_dtype: str,
) -> None:  # fmt: skip
    """Weights, work, processes and KV stay within the share; one request of max_model_len fits each group."""
    shape = MIXED if windows else model(max_position_embeddings=32768)
    options = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": step,
        "max_model_len": wanted,
        "kv_bytes": None if kv_mib is None else kv_mib << 20,
    }
    try:
        layout, made = plan(shape, free_mib << 20, block_size=block_size, kv_dtype=kv_dtype, **options)
    except MemoryPlanError:
        return
    in_all = made.weights_bytes + made.activation_bytes + RUNTIME_BYTES + made.kv_bytes
    assert in_all <= 0.9 * (free_mib << 20) + 1
    assert made.kv_bytes == sum(n * g.block_bytes for n, g in zip(made.num_blocks, layout.groups, strict=True))
    if kv_mib is not None:
        assert made.kv_bytes <= kv_mib << 20
    assert made.max_model_len == wanted or wanted is None
    for blocks, group in zip(made.num_blocks, layout.groups, strict=True):
        assert blocks - 1 >= request_blocks(group, made.max_model_len, step)
    assert made.max_full_requests >= 1


def test_what_an_error_says_would_fit_does_fit() -> None:
    shape = model(max_position_embeddings=131072, num_hidden_layers=28, num_key_value_heads=6)
    with pytest.raises(MemoryPlanError) as caught:
        plan(shape, 2 * GIB, max_model_len=131072)
    text = str(caught.value)
    assert re.search(r"needs .* GiB \(weights .*, KV .*, work .*\), 1.8 GiB usable of 2 GiB free", text)
    (fits,) = re.findall(r"--max-model-len (\d+) would fit", text)
    assert plan(shape, 2 * GIB, max_model_len=int(fits))[1].max_model_len == int(fits)

    with pytest.raises(MemoryPlanError) as caught:
        plan(shape, 4 * GIB, kv_bytes=3900 << 20)
    (fits,) = re.findall(r"--kv-cache-memory-bytes (\w+) would fit", str(caught.value))
    assert plan(shape, 4 * GIB, kv_bytes=parse_size(fits))[1].max_full_requests >= 1

    with pytest.raises(MemoryPlanError) as caught:
        plan(model(), 4 * GIB, kv_bytes=1 << 20, max_model_len=4096)
    (fits,) = re.findall(r"--max-model-len (\d+) would fit", str(caught.value))
    assert plan(model(), 4 * GIB, kv_bytes=1 << 20, max_model_len=int(fits))[1].max_model_len == int(fits)

    with pytest.raises(MemoryPlanError) as caught:
        plan(model(), 4 * GIB, kv_bytes=1000)
    (fits,) = re.findall(r"--kv-cache-memory-bytes (\w+) would fit", str(caught.value))
    assert plan(model(), 4 * GIB, kv_bytes=parse_size(fits))[1].max_model_len >= 32


def test_a_model_that_cannot_fit_says_so() -> None:
    with pytest.raises(MemoryPlanError, match="a smaller model"):
        plan(model(num_hidden_layers=400), GIB)
    with pytest.raises(ConfigError, match="--max-model-len: 5000 is more than the 4096 positions"):
        plan(model(), 16 * GIB, max_model_len=5000)


def test_window_groups_take_few_blocks_and_do_not_starve_short_requests() -> None:
    layout, made = plan(MIXED, 8 * GIB, max_num_seqs=256, kv_bytes=1 * GIB)
    full, window = layout.groups
    assert request_blocks(full, 32768, 512) == 1024
    assert request_blocks(window, 32768, 512) == (512 + 512) // 32 + 2
    assert request_blocks(window, 100, 512) == 4
    at_once = [(n - 1) / request_blocks(g, 1024, 512) for n, g in zip(made.num_blocks, layout.groups, strict=True)]
    assert min(at_once) > 0.25 * max(at_once)


def test_the_positions_of_scaled_rotary_embeddings() -> None:
    assert model().num_positions == 4096
    assert model(rope_scaling={"rope_type": "linear", "factor": 4.0}).num_positions == 16384
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert model(rope_scaling=yarn, max_position_embeddings=40960).num_positions == 131072
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    assert model(rope_scaling=llama3, max_position_embeddings=131072).num_positions == 131072


def test_the_table_adds_up() -> None:
    _, made = plan(MIXED, 8 * GIB)
    table = dict(made.rows)
    assert table["weights"].startswith("2")
    assert "  window of 512" in table
    assert f"{made.max_model_len} tokens" in table["longest request"]
    assert "of 8 GiB free" in table["in all"]
    assert made.table().count("\n") == len(made.rows) - 1


def test_a_gpu_gives_all_that_is_left() -> None:
    _, made = plan(model(num_hidden_layers=48), 80 * GIB, max_num_seqs=4096, device="cuda")
    assert made.kv_bytes > 20 * GIB
