"""What the user left open, filled in from the model's files and the machine: data types, lengths, blocks, threads.

The last step of loading a configuration; nothing is decided again after it. Does not read weights, never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.config.hardware import Machine
from penstock.config.kv_pool import check_pool
from penstock.config.load import model_directory
from penstock.config.memory import MemoryPlan, plan_memory
from penstock.config.model import KVLayout, ModelConfig, ModelConfigError, kv_layout, load_model_config
from penstock.config.schema import CacheOptions, Config
from penstock.config.values import ConfigError

CPU_BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Resolved:
    """A configuration without open ends, and what it was completed from.

    In `config` these are never None or "auto" any more: dtype, kv_cache_dtype, block_size, max_model_len,
    kv_cache_memory_bytes (what the planned blocks take), quantization ("mixed" where layers differ), tokenizer (a
    directory), num_threads, device.
    """

    config: Config
    directory: Path
    model: ModelConfig
    layout: KVLayout
    memory: MemoryPlan


def complete(config: Config, machine: Machine) -> Resolved:
    """Fill in the open settings. Raises ConfigError (MemoryPlanError when it does not fit)."""
    directory = model_directory(config.model.model)
    try:
        model = load_model_config(directory)
    except ModelConfigError as error:
        raise ConfigError(str(error), "--model") from None
    origins = dict(config.origins)
    _check_tiers(config.cache)
    check_pool(config)
    if config.runtime.device == "cuda":
        raise ConfigError("cuda is not supported yet: this version computes on the CPU", "--device")

    quantization = _quantization(config, model)
    dtype, note = _dtype(config, model, machine, quantization)
    kv_dtype = dtype if config.cache.kv_cache_dtype == "auto" else config.cache.kv_cache_dtype
    block_size = config.cache.block_size or CPU_BLOCK_TOKENS
    layout = kv_layout(model, block_size, kv_dtype)
    memory = plan_memory(
        model,
        layout,
        machine.memory_free_bytes,
        weight_dtype=dtype,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_model_len=config.model.max_model_len,
        kv_bytes=config.cache.kv_cache_memory_bytes,
        share=config.cache.gpu_memory_utilization,
        quantization=quantization if can_pack(config.runtime.cpu_kernels, dtype, model, layout) else "none",
    )

    def fill(part: Any, name: str, value: Any, origin: str, why: str) -> Any:
        """`part` with one field set, if the user left it open."""
        if getattr(part, name) not in (None, "auto"):
            return part
        origins[name] = (origin, why)
        return replace(part, **{name: value})

    length_origin = ("model", "its positions") if memory.max_model_len == model.num_positions else ("auto", "memory")
    part = fill(config.model, "dtype", dtype, *note)
    part = fill(part, "quantization", quantization, "model", "as the checkpoint")
    part = fill(part, "max_model_len", memory.max_model_len, *length_origin)
    part = fill(part, "tokenizer", str(directory), "auto", "the model's")
    cache = fill(config.cache, "kv_cache_dtype", kv_dtype, "auto", "as the weights")
    cache = fill(cache, "block_size", block_size, "auto", "for the CPU")
    cache = fill(cache, "kv_cache_memory_bytes", memory.kv_bytes, "auto", f"of {machine.memory_note}")
    runtime = fill(config.runtime, "device", "cpu", "auto", "this version computes on the CPU")
    runtime = fill(runtime, "num_threads", machine.num_cores, "auto", machine.cores_note)
    done = replace(config, model=part, cache=cache, runtime=runtime, origins=origins)
    return Resolved(done, directory, model, layout, memory)


def _check_tiers(cache: CacheOptions) -> None:
    """Raise ConfigError for a tier that nothing could reach: no setting is silently ignored."""
    below = {
        "--kv-disk-path": cache.kv_disk_path,
        "--kv-remote-url": cache.kv_remote_url,
        "--kv-pool-listen": cache.kv_pool_listen,
    }
    for flag, value in below.items():
        if value is not None and cache.kv_offloading_size is None:
            raise ConfigError("everything below passes through host memory: give --kv-offloading-size, too", flag)
    if cache.kv_offloading_size is not None and not cache.enable_prefix_caching:
        raise ConfigError("tiers hold what the prefix cache publishes, which is switched off", "--kv-offloading-size")


def can_pack(cpu_kernels: str, dtype: str, model: ModelConfig, layout: KVLayout) -> bool:
    """Whether these settings leave the weights to native kernels; plain torch holds quantized ones dequantized."""
    heads = all(g.block_size == CPU_BLOCK_TOKENS and g.head_dim % 16 == 0 and g.head_dim <= 256 for g in layout.groups)
    return cpu_kernels != "torch" and dtype == "bfloat16" and heads and model.intermediate_size % 16 == 0


def _quantization(config: Config, model: ModelConfig) -> str:
    """The name of the weights' format. Raises ConfigError for another one than a quantized checkpoint has."""
    asked = config.model.quantization
    if model.quantization is None:
        return "none" if asked == "auto" else asked
    stored = model.quantization.name(model.modules)
    if asked not in ("auto", stored):
        raise ConfigError(f"{asked} was asked for, but the checkpoint is quantized already: {stored}", "--quantization")
    return stored


def _dtype(config: Config, model: ModelConfig, machine: Machine, quantization: str) -> tuple[str, tuple[str, str]]:
    """(data type of the weights, its origin): the checkpoint's, unless this CPU would emulate it."""
    if config.model.dtype != "auto":
        return config.model.dtype, config.origins.get("dtype", ("flag", ""))
    if quantization != "none" and config.runtime.cpu_kernels != "torch":
        return "bfloat16", ("auto", "what kernels of quantized weights compute in")
    if model.dtype == "float16":
        return "float32", ("auto", "the checkpoint's float16 is slow on CPUs")
    if model.dtype == "bfloat16" and not machine.has_fast_bf16:
        layout = kv_layout(model, config.cache.block_size or CPU_BLOCK_TOKENS, "bfloat16")
        native = machine.has_native_kernels and config.cache.kv_cache_dtype in ("auto", "bfloat16", "int8")
        if not native or not can_pack(config.runtime.cpu_kernels, "bfloat16", model, layout):
            return "float32", ("auto", "this CPU has no bfloat16 instructions")
    return model.dtype, ("model", "as the checkpoint")
