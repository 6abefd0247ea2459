"""The memory plan: how many KV blocks, how long a request, from shapes and free bytes. Pure arithmetic, no torch.

Knows what the plain-torch forward pass holds at once, as an estimate that errs on the large side. Does not know the
machine (config.hardware probes it) nor allocate anything. All sizes are in bytes, lengths in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from penstock.config.model import DTYPE_BYTES, KVGroup, KVLayout, ModelConfig
from penstock.config.quantization import CheckpointQuantization
from penstock.config.values import ConfigError, format_bytes

# Resident memory of an engine process and a front end with a model of 1 MiB: 337 + 57 MiB measured (torch 2.13, CPU).
RUNTIME_BYTES = 400 << 20
# On the CPU penstock is a guest: it takes this share of free memory for KV unless told otherwise, and at most 8 GiB
# or one longest request, whichever is more.
CPU_KV_SHARE = 0.4
CPU_KV_BYTES = 8 << 30
# Length for which the blocks that remain after one longest request are split over KV groups: window groups are full
# soon and full groups are not, so splitting for the longest request would starve short ones of window blocks.
TYPICAL_TOKENS = 4096
# Attention gathers the context of the rows of a step layer by layer, padded by up to a quarter; what a narrower cache
# holds is then widened to the dtype of the weights.
GATHER_PADDING = 1.25
# Per packed parameter.
LAYER_BYTES = {"int8": 1.0, "w8a8": 1.0, "int4": 0.5 + 4 / 128, "w4a8": 0.5 + 4 / 128, "bf12": 1.51}
HEAD_BYTES = {**dict.fromkeys(LAYER_BYTES, 1.0), "bf12": LAYER_BYTES["bf12"]}


class MemoryPlanError(ConfigError):
    """It does not fit. The message says what is needed, what is there, and what would fit."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where the memory goes. `num_blocks` per KV group counts the null block, which no request gets."""

    num_blocks: tuple[int, ...]
    max_model_len: int
    weights_bytes: int
    activation_bytes: int  # of the largest step
    runtime_bytes: int
    kv_bytes: int
    free_bytes: int
    max_full_requests: float  # requests of max_model_len tokens that fit at once
    rows: tuple[tuple[str, str], ...]  # for people

    def table(self) -> str:
        wide = max(len(name) for name, _ in self.rows)
        return "\n".join(f"  {name:<{wide}}  {value}" for name, value in self.rows)


def plan_memory(
    model: ModelConfig,
    layout: KVLayout,
    free_bytes: int,
    *,
    weight_dtype: str,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int | None = None,
    kv_bytes: int | None = None,
    share: float = 0.9,
    quantization: str = "none",
    device: str = "cpu",
) -> MemoryPlan:
    """Split `free_bytes` into weights, working memory and KV blocks.

    max_model_len: None means the longest that model and memory allow. kv_bytes: None means a default share on the
    CPU and all that is left on a GPU, at most what `max_num_seqs` requests of full length could ever use. share: of
    free_bytes, what may be used in all. Raises MemoryPlanError (nothing fits, or not what was asked for) and
    ConfigError (longer than the model's positions).
    """
    limit = model.num_positions
    if max_model_len is not None and max_model_len > limit:
        raise ConfigError(f"{max_model_len} is more than the {limit} positions of this model", "--max-model-len")
    sizes = _Sizes(model, layout, weight_dtype, quantization, max_num_seqs, max_num_batched_tokens)
    usable = int(free_bytes * share)

    def kv_room(num_tokens: int) -> int:
        """Bytes that KV may take when requests are `num_tokens` long."""
        room = usable - sizes.weights - RUNTIME_BYTES - sizes.activations(num_tokens)
        room = int(room / (1 + sizes.gather_share))
        if kv_bytes is not None:
            return min(room, kv_bytes)
        if device == "cpu":
            return min(room, max(int(free_bytes * CPU_KV_SHARE), sizes.request(num_tokens)))
        return room

    def fits(num_tokens: int) -> bool:
        return sizes.request(num_tokens) <= kv_room(num_tokens)

    longest = _longest(fits, limit)
    wanted = max_model_len if max_model_len is not None else longest
    too_much_kv = kv_bytes is not None and longest > 0 and kv_bytes > kv_room(wanted or 1)
    if not wanted or wanted > longest or too_much_kv:
        raise MemoryPlanError(
            _shortage(sizes, wanted or min(limit, layout.block_size), longest, kv_bytes, usable, free_bytes)
        )

    budget = kv_room(wanted)
    if kv_bytes is None and device == "cpu":
        default = min(int(free_bytes * CPU_KV_SHARE), max(CPU_KV_BYTES, sizes.request(wanted)))
        budget = min(budget, max(default, sizes.request(wanted)))
    if kv_bytes is None:
        ever = sum(max_num_seqs * n * g.block_bytes for n, g in zip(sizes.blocks(wanted), layout.groups, strict=True))
        budget = min(budget, ever + sizes.null_bytes)
    num_blocks = _split(sizes, layout, budget, wanted)
    used = sum(n * group.block_bytes for n, group in zip(num_blocks, layout.groups, strict=True))
    full = min((n - 1) / need for n, need in zip(num_blocks, sizes.blocks(wanted), strict=True))
    activation = sizes.activations(wanted) + int(used * sizes.gather_share)
    return MemoryPlan(
        num_blocks=num_blocks,
        max_model_len=wanted,
        weights_bytes=sizes.weights,
        activation_bytes=activation,
        runtime_bytes=RUNTIME_BYTES,
        kv_bytes=used,
        free_bytes=free_bytes,
        max_full_requests=full,
        rows=_rows(model, layout, sizes, num_blocks, wanted, activation, used, free_bytes, full),
    )


def weight_bytes(model: ModelConfig, dtype: str, quantization: str = "none") -> int:
    """Resident weights. Quantized layers keep a float32 scale per row or per group of 128.

    A checkpoint that is quantized already has what it says, unless `quantization` is none: then all of it is `dtype`.
    """
    item = DTYPE_BYTES[dtype]
    if quantization == "none":
        return model.num_parameters * item
    head = model.vocab_size * model.hidden_size
    table = 0 if model.tied_embeddings else head  # of its own, and not quantized
    layers = model.num_parameters - head - table
    if model.quantization is None:
        return round(layers * LAYER_BYTES[quantization] + head * HEAD_BYTES[quantization]) + table * item
    stored = _head_item(model.quantization, item) * head + table * item
    for layer in range(model.num_layers):
        for projection in model.projections:
            schemes = {model.quantization.scheme_of(f"model.layers.{layer}.{name}") for name in projection.names}
            scheme = schemes.pop()
            native = scheme.native if scheme is not None and not schemes else None
            size = sum(projection.rows) * projection.columns
            stored += round(size * (item if native is None else LAYER_BYTES[native]))
            layers -= size
    return round(stored) + layers * item


def _head_item(quantization: CheckpointQuantization, item: int) -> float:
    """Bytes per parameter of the head."""
    scheme = quantization.scheme_of("lm_head")
    return item if scheme is None or scheme.native is None else LAYER_BYTES[scheme.native]


def packed_bytes(model: ModelConfig, quantization: str = "none") -> int:
    """About what native kernels pack: the weights but for a token table that is not the head's."""
    table = 0 if model.tied_embeddings else model.vocab_size * model.hidden_size * DTYPE_BYTES["bfloat16"]
    return weight_bytes(model, "bfloat16", quantization) - table


def request_blocks(group: KVGroup, num_tokens: int, max_num_batched_tokens: int) -> int:
    """Most blocks of a group that one request of `num_tokens` tokens holds at once.

    A window group keeps the window, the step being computed, and two blocks at the open ends.
    """
    blocks = -(-num_tokens // group.block_size)
    if group.window is None:
        return blocks
    return min(blocks, -(-(group.window + max_num_batched_tokens) // group.block_size) + 2)


class _Sizes:
    """The sizes that a plan is made of."""

    def __init__(
        self,
        model: ModelConfig,
        layout: KVLayout,
        weight_dtype: str,
        quantization: str,
        max_num_seqs: int,
        step_tokens: int,
    ) -> None:
        self.model = model
        self.layout = layout
        self.item = DTYPE_BYTES[weight_dtype]
        self.dtype = weight_dtype if quantization == "none" else quantization
        self.max_num_seqs = max_num_seqs
        self.step_tokens = step_tokens
        self.weights = weight_bytes(model, weight_dtype, quantization)
        self.null_bytes = sum(group.block_bytes for group in layout.groups)
        widened = max(self.item / DTYPE_BYTES[group.dtype] for group in layout.groups)
        copies = 1 + widened if widened > 1 else 1
        self.gather_share = GATHER_PADDING * copies / len(model.layer_windows)  # of the bytes of the KV cache

    def blocks(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(request_blocks(group, num_tokens, self.step_tokens) for group in self.layout.groups)

    def request(self, num_tokens: int) -> int:
        """KV bytes of one request, the null blocks included."""
        blocks = self.blocks(num_tokens)
        return sum((n + 1) * group.block_bytes for n, group in zip(blocks, self.layout.groups, strict=True))

    def activations(self, num_tokens: int) -> int:
        """What the largest step holds at once besides weights and KV, when requests are `num_tokens` long."""
        m, tokens, item = self.model, min(self.step_tokens, max(num_tokens, 1) * self.max_num_seqs), self.item
        residual = tokens * m.hidden_size * (3 * item + 4)  # stream, its norm, one result, and the norm in float32
        qkv = 2 * tokens * (m.num_heads + 2 * m.num_kv_heads) * m.head_dim * item  # before and after rotation
        group = m.num_heads // m.num_kv_heads
        chunk = min(tokens, num_tokens)
        mask = chunk * num_tokens * (1 + item * (1 + group))  # visible, additive, repeated for grouped queries
        mlp = 3 * tokens * m.intermediate_size * item
        rows = min(self.max_num_seqs, tokens)
        scores = 3 * rows * m.vocab_size * 4  # float32 scores, a filtered copy, log probabilities
        tables = self.max_num_seqs * num_tokens * 4 * 2  # token ids and block ids of every slot
        return residual + max(qkv + mask, mlp) + scores + tables


def _longest(fits: Callable[[int], bool], limit: int) -> int:
    """Largest length from 1 to `limit` that fits, 0 if none does; `fits` is true below it and false above."""
    if fits(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _split(sizes: _Sizes, layout: KVLayout, budget: int, max_model_len: int) -> tuple[int, ...]:
    """Blocks per group, the null block included: one longest request for certain, the rest for typical ones."""
    longest = sizes.blocks(max_model_len)
    typical = sizes.blocks(min(max_model_len, TYPICAL_TOKENS))
    rest = budget - sizes.request(max_model_len)
    one = sum(n * group.block_bytes for n, group in zip(typical, layout.groups, strict=True))
    return tuple(1 + n + math.floor(rest / one * more) for n, more in zip(longest, typical, strict=True))


def _shortage(sizes: _Sizes, wanted: int, longest: int, kv_bytes: int | None, usable: int, free: int) -> str:
    """One line: what is needed, what is there, what would fit."""
    fixed = sizes.weights + RUNTIME_BYTES
    request = sizes.request(wanted)
    kv = max(request, kv_bytes or 0)
    gather = int(kv * sizes.gather_share)
    needed = fixed + sizes.activations(wanted) + kv + gather
    if kv_bytes is not None and request > kv_bytes and needed - kv + kv_bytes <= usable:
        text = f"one request of {wanted} tokens needs {format_bytes(request)} of KV, given are {format_bytes(kv_bytes)}"
        if longest:
            return f"{text}; --max-model-len {_round_down(longest)} would fit"
        return f"{text}; --kv-cache-memory-bytes {_round_up(request)} would fit"
    text = (
        f"not enough memory: needs {format_bytes(needed)} (weights {format_bytes(sizes.weights)}, KV "
        f"{format_bytes(kv)}, work {format_bytes(needed - sizes.weights - kv)}), {format_bytes(usable)} usable of "
        f"{format_bytes(free)} free"
    )
    if longest >= wanted and kv_bytes is not None:
        most = usable - fixed - sizes.activations(wanted)
        most = int(most / (1 + sizes.gather_share))
        return f"{text}; --kv-cache-memory-bytes {most >> 20}M would fit"
    if longest:
        return f"{text}; --max-model-len {_round_down(longest)} would fit"
    if sizes.dtype == "float32":
        return f"{text}; --dtype bfloat16 halves the weights"
    return f"{text}; no length fits: free some memory or take a smaller model"


def _round_down(num_tokens: int) -> int:
    """To a number that people would type: a multiple of 1024, or of 16 when it is small."""
    step = 1024 if num_tokens >= 2048 else 16
    return max(num_tokens // step * step, 1)


def _round_up(num_bytes: int) -> str:
    return f"{-(-num_bytes // (1 << 20))}M"


def _rows(
    model: ModelConfig,
    layout: KVLayout,
    sizes: _Sizes,
    num_blocks: tuple[int, ...],
    max_model_len: int,
    activation: int,
    kv: int,
    free: int,
    full: float,
) -> tuple[tuple[str, str], ...]:
    rows = [
        ("weights", f"{format_bytes(sizes.weights)}   {model.num_parameters / 1e6:,.1f} M parameters in {sizes.dtype}"),
        ("work", f"{format_bytes(activation)}   a step of {sizes.step_tokens} tokens"),
        ("processes", f"{format_bytes(RUNTIME_BYTES)}   Python and torch"),
        ("KV cache", f"{format_bytes(kv)}   {format_bytes(layout.bytes_per_token)} per token in {_kv_dtypes(layout)}"),
    ]
    for group, blocks in zip(layout.groups, num_blocks, strict=True):
        kind = "full" if group.window is None else f"window of {group.window}"
        size = format_bytes(blocks * group.block_bytes)
        text = f"{blocks - 1} blocks of {group.block_size} tokens   {len(group.layers)} layers, {size}"
        rows.append((f"  {kind}", text))
    total = sizes.weights + activation + RUNTIME_BYTES + kv
    rows += [
        ("in all", f"{format_bytes(total)} of {format_bytes(free)} free"),
        ("longest request", f"{max_model_len} tokens   the model's positions: {model.num_positions}"),
        ("at once", f"{full:.1f} requests of that length, at most {sizes.max_num_seqs}"),
    ]
    return tuple(rows)


def _kv_dtypes(layout: KVLayout) -> str:
    return ", ".join(dict.fromkeys(group.dtype for group in layout.groups))
