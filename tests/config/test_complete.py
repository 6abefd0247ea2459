"""What the user left open, filled in from a model's files and a machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.config.complete import Resolved, complete
from penstock.config.hardware import Machine
from penstock.config.load import resolve
from penstock.config.memory import MemoryPlanError
from penstock.config.values import ConfigError

MACHINE = Machine(3, "of a test", "Example", ("avx2", "avx512_bf16"), 16 << 30, 8 << 30, "a test", (), False, None)
OLD = replace(MACHINE, cpu_features=("avx2",))
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


def completed(directory: Path, machine: Machine = MACHINE, checkpoint: Any = None, **given: Any) -> Resolved:
    (directory / "config.json").write_text(json.dumps(CONFIG | (checkpoint or {})))
    return complete(resolve({"model": str(directory), **given}, environ={}), machine)


def test_nothing_stays_open(tmp_path: Path) -> None:
    resolved = completed(tmp_path)
    config = resolved.config
    assert (config.model.dtype, config.cache.kv_cache_dtype) == ("bfloat16", "bfloat16")
    assert (config.model.max_model_len, config.cache.block_size) == (512, 32)
    assert (config.runtime.device, config.runtime.num_threads) == ("cpu", 3)
    assert config.model.tokenizer == str(tmp_path)
    assert config.cache.kv_cache_memory_bytes == resolved.memory.kv_bytes
    assert config.origins["dtype"] == ("model", "as the checkpoint")
    assert config.origins["max_model_len"][0] == "model"
    assert config.origins["num_threads"] == ("auto", "of a test")


def test_what_the_user_said_stays(tmp_path: Path) -> None:
    given = {"dtype": "float32", "kv_cache_dtype": "float16", "max_model_len": 100, "block_size": 8, "num_threads": 1}
    resolved = completed(tmp_path, **given)
    config = resolved.config
    assert (config.model.dtype, config.cache.kv_cache_dtype) == ("float32", "float16")
    assert (config.model.max_model_len, config.cache.block_size, config.runtime.num_threads) == (100, 8, 1)
    assert {config.origins[name][0] for name in given} == {"flag"}
    assert resolved.layout.block_size == 8


def test_an_int8_cache_is_planned_with_its_scales(tmp_path: Path) -> None:
    """Also by vLLM's name."""
    for name in ("int8", "int8_per_token_head"):
        resolved = completed(tmp_path, kv_cache_dtype=name)
        assert resolved.config.cache.kv_cache_dtype == "int8"
        [group] = resolved.layout.groups
        assert group.head_bytes == 32 * (group.head_dim + 2)
        assert resolved.memory.kv_bytes % group.block_bytes == 0


def test_completing_twice_changes_nothing_that_was_decided(tmp_path: Path) -> None:
    once = completed(tmp_path)
    twice = complete(once.config, MACHINE)
    assert twice.config == once.config
    assert twice.memory.max_model_len == once.memory.max_model_len


def test_a_cpu_that_would_emulate_a_data_type_gets_float32(tmp_path: Path) -> None:
    assert completed(tmp_path, OLD).config.model.dtype == "float32"
    assert completed(tmp_path, OLD).config.origins["dtype"][0] == "auto"
    assert completed(tmp_path, checkpoint={"torch_dtype": "float16"}).config.model.dtype == "float32"
    assert completed(tmp_path, OLD, dtype="bfloat16").config.model.dtype == "bfloat16"


def test_native_kernels_take_bfloat16_where_the_cpu_does_not(tmp_path: Path) -> None:
    """Heads of 16 suit them; a named instruction set is no refusal; what they cannot compute is left to torch."""
    built = replace(OLD, native_built=True)
    for asked in ({}, {"cpu_kernels": "avx2"}, {"kv_cache_dtype": "int8"}):
        assert completed(tmp_path, built, **asked).config.model.dtype == "bfloat16"
    for asked in ({"cpu_kernels": "torch"}, {"kv_cache_dtype": "float32"}):
        assert completed(tmp_path, built, **asked).config.model.dtype == "float32"
    assert completed(tmp_path, replace(built, cpu_features=("sse4",))).config.model.dtype == "float32"
    for odd in ({"head_dim": 12}, {"intermediate_size": 100}):
        assert completed(tmp_path, built, checkpoint=odd).config.model.dtype == "float32"


def test_errors_of_model_and_memory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json does not exist"):
        complete(resolve({"model": str(tmp_path)}, environ={}), MACHINE)
    with pytest.raises(ConfigError, match="'GPT9' is not supported; supported: LlamaForCausalLM"):
        completed(tmp_path, checkpoint={"architectures": ["GPT9"]})
    with pytest.raises(ConfigError, match="more than the 512 positions"):
        completed(tmp_path, max_model_len=513)
    with pytest.raises(MemoryPlanError, match="not enough memory"):
        completed(tmp_path, replace(MACHINE, memory_free_bytes=200 << 20))
    with pytest.raises(ConfigError, match="--device: cuda is not supported yet"):
        completed(tmp_path, device="cuda")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_disk_path": "/anywhere"}, "--kv-offloading-size, too"),
        ({"kv_remote_url": "redis://127.0.0.1:1/0"}, "--kv-offloading-size, too"),
        ({"kv_pool_listen": "127.0.0.1:7000"}, "--kv-offloading-size, too"),
        ({"kv_offloading_size": 1, "enable_prefix_caching": False}, "switched off"),
    ],
)
def test_a_tier_that_nothing_could_reach_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        complete(resolve({"model": "penstock-tiny", **settings}), MACHINE)
