"""`config.json` to shapes: what a checkpoint is, and how its KV cache is laid out.

Knows the field names that Hugging Face writes (transformers 4 and 5). Does not know tensors, devices or weights:
a plan, a simulator and the block pool can read a model's shape without importing torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.config.quantization import CheckpointQuantization, UnsupportedQuantization, parse_quantization

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
# KV cache dtype -> dtype of the scale that each token and head has of its own, for keys and for values.
KV_SCALES = {"int8": "bfloat16"}
MAX_ROPE_FACTOR = 1e4  # far beyond any model's; positions stay countable


class ModelConfigError(ValueError):
    """The checkpoint's config.json is missing, malformed or describes a model that is not supported."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary scaling. `kind`: "linear", "llama3" or "yarn"; unused fields keep their defaults."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None  # on cos and sin (yarn); None: from `factor`
    truncate: bool = True  # yarn: the ramp's ends are rounded to whole dimensions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and constants of one decoder-only model. Sizes are in elements, positions in tokens."""

    architecture: str  # as in config.json: "Qwen3ForCausalLM"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    dtype: str  # of the checkpoint: "float32", "bfloat16", "float16"
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim on q and k before rope (Qwen3)
    hidden_act: str  # "silu"
    layer_windows: tuple[int | None, ...]  # per layer: sliding window in tokens, None = full attention
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: CheckpointQuantization | None = None  # of the weights as they are stored

    @property
    def num_positions(self) -> int:
        """Tokens that the rotary embedding was made for, with its scaling.

        linear and yarn stretch what config.json calls max_position_embeddings or its original; llama3 writes the
        stretched number there already. Source: vLLM's reading of the same fields.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.kind not in ("linear", "yarn"):
            return self.max_position
        original = scaling.original_max_position or self.max_position
        return max(self.max_position, int(original * scaling.factor))

    @property
    def num_parameters(self) -> int:
        """Weights that the checkpoint holds; a tied head counts once."""
        attn = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        biases = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.qkv_bias else 0
        biases += self.hidden_size if self.attention_out_bias else 0
        biases += 2 * self.intermediate_size + self.hidden_size if self.mlp_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        embed = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * (attn + mlp + norms + biases) + embed + self.hidden_size

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The matrices of one layer."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inter = self.hidden_size, self.intermediate_size
        return (
            Projection(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (q, kv, kv), hidden),
            Projection(("self_attn.o_proj",), (hidden,), q),
            Projection(("mlp.gate_proj", "mlp.up_proj"), (inter, inter), hidden),
            Projection(("mlp.down_proj",), (hidden,), inter, gated=True),
        )

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all projections of all layers, as checkpoints have them."""
        names = [name for projection in self.projections for name in projection.names]
        return tuple(f"model.layers.{layer}.{name}" for layer in range(self.num_layers) for name in names)


@dataclass(frozen=True, slots=True)
class Projection:
    """Modules of a layer that are computed as one matrix: rows of each, one below the other, and their columns.

    `gated`: its inputs are products of two others.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    gated: bool = False


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose KV has one shape and one lifetime; they share block tables and a block pool.

    kind "full": every position is kept. kind "window": only the last `window` positions are ever read, so earlier
    blocks can be given back while the request runs.

    packing: the order of elements in the place of one head, which its scales follow: [block_size], one per token.
    "plain": [block_size, head_dim]. "paired", what native kernels read, 32 tokens a block: keys as
    [2][head_dim / 2][16 tokens][2], values as [head_dim / 16][16 token pairs][16][2].

    parts: what a head keeps, one behind the other in a block. Keys and values; of latent attention ("k",) alone, one
    head of latent and rotary dimensions from which both are computed.
    """

    index: int
    kind: str
    layers: tuple[int, ...]
    window: int | None
    block_size: int  # tokens
    num_kv_heads: int
    head_dim: int
    dtype: str
    packing: str = "plain"
    parts: tuple[str, ...] = ("k", "v")

    @property
    def data_bytes(self) -> int:
        """Bytes of the elements of one head, keys or values, in one block."""
        return self.block_size * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def scale_dtype(self) -> str | None:
        """Of the scales that follow a head's elements: element = stored number * scale. None: there are none."""
        return KV_SCALES.get(self.dtype)

    @property
    def head_bytes(self) -> int:
        """Bytes of one head, keys or values, in one block: its elements, then its scales."""
        scale_bytes = 0 if self.scale_dtype is None else DTYPE_BYTES[self.scale_dtype]
        return self.data_bytes + self.block_size * scale_bytes

    @property
    def layer_bytes(self) -> int:
        """Bytes of one block in one layer: K then V, each head-major, head after head."""
        return len(self.parts) * self.num_kv_heads * self.head_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of the group."""
        return self.layer_bytes * len(self.layers)

    def extent(self, layer: int, part: str, head_start: int, head_end: int) -> tuple[int, int]:
        """(offset, length) in bytes of heads [head_start, head_end) of `part` ("k" or "v") of `layer` in a block,
        their scales included.

        The block is seen page-first: its layers one behind the other, in the order of `layers`. Devices keep the
        pool layer-first; there the offset within one layer's block is `extent(...) % layer_bytes`.
        """
        part_start = self.parts.index(part) * self.num_kv_heads * self.head_bytes
        base = self.layers.index(layer) * self.layer_bytes + part_start
        return base + head_start * self.head_bytes, (head_end - head_start) * self.head_bytes

    def scale_extent(self, layer: int, part: str, head: int) -> tuple[int, int]:
        """(offset, length) in bytes of the scales of one head, inside its extent; length 0 where there are none."""
        offset, length = self.extent(layer, part, head, head + 1)
        return offset + self.data_bytes, length - self.data_bytes


@dataclass(frozen=True, slots=True)
class KVLayout:
    """All KV groups of a model.

    `format` names the byte layout: who reads another one must refuse these blocks. It enters the root of every block
    hash.
    """

    groups: tuple[KVGroup, ...]

    @property
    def block_size(self) -> int:
        """Tokens in a block: the same in every group, so that one hash chain serves all of them."""
        return self.groups[0].block_size

    @property
    def format(self) -> str:
        return "/".join(
            f"{g.kind}{g.window or ''}:{len(g.layers)}x{g.num_kv_heads}x{g.block_size}x{g.head_dim}"
            f":{g.dtype}{f'*{g.scale_dtype}' if g.scale_dtype else ''}:hm:{g.packing}"
            f"{'' if g.parts == ('k', 'v') else ':' + '+'.join(g.parts)}"
            for g in self.groups
        )

    @property
    def bytes_per_token(self) -> float:
        """KV bytes that one more token costs while no window has been passed."""
        return sum(g.block_bytes for g in self.groups) / self.block_size


def kv_layout(model: ModelConfig, block_size: int, dtype: str) -> KVLayout:
    """Group the layers by window, packed plainly. `dtype` is the KV cache's; `block_size` in tokens."""
    windows = sorted(set(model.layer_windows), key=lambda w: (w is not None, w or 0))
    return KVLayout(
        tuple(
            KVGroup(
                index=i,
                kind="full" if window is None else "window",
                layers=tuple(n for n, w in enumerate(model.layer_windows) if w == window),
                window=window,
                block_size=block_size,
                num_kv_heads=model.num_kv_heads,
                head_dim=model.head_dim,
                dtype=dtype,
            )
            for i, window in enumerate(windows)
        )
    )


# Architecture -> what its config.json leaves unsaid. The module that computes it is named in nn.models.
SUPPORTED = {
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "MistralForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
}


def load_model_config(directory: str | Path) -> ModelConfig:
    """Read `directory/config.json` (and generation_config.json for its end tokens). Raises ModelConfigError."""
    directory = Path(directory)
    raw = _read_json(directory / "config.json", required=True)
    generation = _read_json(directory / "generation_config.json", required=False)
    return parse_model_config(raw, generation)


def parse_model_config(raw: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """Check and translate one config.json. Raises ModelConfigError naming the field that is wrong."""
    names = raw.get("architectures") or []
    architecture = names[0] if isinstance(names, list) and names else None
    if not isinstance(architecture, str) or architecture not in SUPPORTED:
        raise ModelConfigError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(SUPPORTED))}"
        )
    defaults = SUPPORTED[architecture]
    hidden = _positive(raw, "hidden_size")
    num_heads = _positive(raw, "num_attention_heads")
    num_layers = _positive(raw, "num_hidden_layers")
    num_kv_heads = _positive(raw, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelConfigError(
            f"num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})"
        )
    if raw.get("head_dim") is None and hidden % num_heads:
        raise ModelConfigError(f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({num_heads})")
    act = raw.get("hidden_act", "silu")
    if act != "silu":
        raise ModelConfigError(f"hidden_act {act!r} is not supported; supported: silu")
    try:
        quantization = parse_quantization(raw["quantization_config"]) if raw.get("quantization_config") else None
    except UnsupportedQuantization as error:
        raise ModelConfigError(str(error)) from None
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ModelConfigError(f"dtype {dtype!r} is not supported; supported: float32, bfloat16, float16")
    theta, scaling = _rope(raw)
    head_dim = _positive(raw, "head_dim", hidden // num_heads)
    if head_dim % 2:
        raise ModelConfigError(f"config.json: head_dim must be even for rotary embedding, found {head_dim}")
    bos, eos = _token_ids(raw, "bos_token_id"), _token_ids(raw, "eos_token_id")
    if generation and generation.get("eos_token_id") is not None:
        eos = _token_ids(generation, "eos_token_id")
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=architecture,
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_positive(raw, "intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position=_positive(raw, "max_position_embeddings", 2048),
        norm_eps=_number(raw, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=dtype,
        qkv_bias=defaults["qkv_bias"] or bias,
        attention_out_bias=bias and not defaults["qkv_bias"],
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=defaults["qk_norm"],
        hidden_act=act,
        layer_windows=_windows(architecture, raw, num_layers),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=eos,
        quantization=quantization,
    )


def _read_json(path: Path, required: bool) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ModelConfigError(f"{path} does not exist: is this a Hugging Face model directory?") from None
        return {}
    except (ValueError, RecursionError) as error:
        raise ModelConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelConfigError(f"{path} must hold a JSON object")
    return data


def _positive(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise ModelConfigError(f"config.json: {name} must be a positive integer, found {value!r}")
    return value


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ModelConfigError(f"config.json: {name} must be a positive number, found {value!r}")
    return float(value)


def _token_ids(raw: dict[str, Any], name: str) -> tuple[int, ...]:
    """One id, a list of ids, or null for none."""
    value = raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ModelConfigError(f"{name} must be a token id, a list of them or null, found {value!r}")
    return tuple(ids)


def _rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """transformers 5 writes `rope_parameters`; 4 writes `rope_theta` and `rope_scaling`."""
    params = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(params, dict):
        raise ModelConfigError(f"config.json: rope_parameters must be an object or null, found {params!r}")
    if any(isinstance(value, dict) for value in params.values()):
        raise ModelConfigError("config.json: rope_parameters that differ between layers are not supported")
    merged = {**raw, **{name: value for name, value in params.items() if value is not None}}
    if _number(merged, "partial_rotary_factor", 1.0) != 1.0:
        raise ModelConfigError("config.json: partial_rotary_factor other than 1 is not supported")
    theta = _number(merged, "rope_theta", 10000.0)
    kind = params.get("rope_type", params.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3", "yarn"):
        raise ModelConfigError(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3, yarn")
    longest = _positive(raw, "max_position_embeddings", 2048)
    original = _positive(params, "original_max_position_embeddings", longest)
    if kind != "yarn" and params.get("factor") is None:
        raise ModelConfigError(f"config.json: rope scaling {kind!r} needs a factor")
    factor = _number(params, "factor", longest / original)
    if not 0 < factor <= MAX_ROPE_FACTOR:
        raise ModelConfigError(f"config.json: a rope scaling factor of {factor:g} is not in (0, {MAX_ROPE_FACTOR:g}]")
    attention_factor = None
    if params.get("attention_factor") is not None:
        attention_factor = _number(params, "attention_factor", 1.0)
    elif kind == "yarn" and params.get("mscale") and params.get("mscale_all_dim"):
        mscales = _number(params, "mscale", 1.0), _number(params, "mscale_all_dim", 1.0)
        over, under = (0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0 for mscale in mscales)
        attention_factor = over / under
    return theta, RopeScaling(
        kind=kind,
        factor=factor,
        low_freq_factor=_number(params, "low_freq_factor", 1.0),
        high_freq_factor=_number(params, "high_freq_factor", 4.0),
        original_max_position=original,
        beta_fast=_number(params, "beta_fast", 32.0),
        beta_slow=_number(params, "beta_slow", 1.0),
        attention_factor=attention_factor,
        truncate=bool(params.get("truncate", True)),
    )


def _windows(architecture: str, raw: dict[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Per-layer sliding windows. Mistral: all layers. Qwen: `use_sliding_window` from `max_window_layers` up.

    Absent fields (older files) mean what transformers makes of them: a window of 4096, from layer 28 up in Qwen. A null
    window means none.
    """
    family = architecture.removesuffix("ForCausalLM")
    windowed = family == "Mistral" or (family.startswith("Qwen") and raw.get("use_sliding_window", False))
    if not windowed or raw.get("sliding_window", 4096) is None:
        return (None,) * num_layers
    window = _positive(raw, "sliding_window", 4096)
    if family == "Mistral":
        return (window,) * num_layers
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise ModelConfigError(f"config.json: max_window_layers must be an integer of at least 0, found {first!r}")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        found = f"{len(types)} entries" if isinstance(types, list) else repr(types)
        raise ModelConfigError(f"config.json: layer_types must be a list of {num_layers} entries, found {found}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelConfigError(
                f"layer type {kind!r} is not supported; supported: full_attention, sliding_attention"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
