"""Every form of config.json that transformers writes is understood; all else is refused with the field's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.config.model import (
    SUPPORTED,
    KVLayout,
    ModelConfigError,
    RopeScaling,
    kv_layout,
    load_model_config,
    parse_model_config,
)

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def parse(**changes: Any) -> Any:
    """PLAIN with changes; a value of ... removes the field."""
    return parse_model_config({name: value for name, value in (PLAIN | changes).items() if value is not ...})


def test_plain() -> None:
    config = parse(rms_norm_eps=1e-5, torch_dtype="float16", bos_token_id=1, eos_token_id=2, rope_theta=500000)
    assert (config.hidden_size, config.intermediate_size, config.num_layers, config.vocab_size) == (64, 96, 4, 100)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.max_position) == (8, 2, 8, 512)
    assert (config.norm_eps, config.rope_theta, config.rope_scaling, config.dtype) == (1e-5, 500000.0, None, "float16")
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.layer_windows == (None,) * 4
    assert not (config.tied_embeddings or config.qkv_bias or config.attention_out_bias or config.mlp_bias)


def test_absent_fields() -> None:
    """No KV heads: as many as heads; no dtype: bfloat16; no end token: none."""
    config = parse(num_key_value_heads=...)
    assert (config.num_kv_heads, config.head_dim, config.dtype) == (8, 8, "bfloat16")
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    assert parse(head_dim=20).head_dim == 20
    assert parse(head_dim=None, num_key_value_heads=None).num_kv_heads == 8


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "float32"}, "float16"),
    ],
)
def test_dtype_of_transformers_4_and_5(fields: dict[str, str], expected: str) -> None:
    assert parse(**fields).dtype == expected


def test_biases() -> None:
    """Llama: attention_bias means q, k, v and out. Qwen2: always q, k, v, never out. Qwen3: as Llama, with q/k norm."""
    llama, qwen2, qwen3 = (
        parse(architectures=[f"{n}ForCausalLM"], attention_bias=True) for n in ("Llama", "Qwen2", "Qwen3")
    )
    assert (llama.qkv_bias, llama.attention_out_bias, llama.qk_norm) == (True, True, False)
    assert (qwen2.qkv_bias, qwen2.attention_out_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.attention_out_bias, qwen3.qk_norm) == (True, True, True)
    assert parse(architectures=["Qwen2ForCausalLM"]).qkv_bias
    assert parse(mlp_bias=True).mlp_bias


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}, "rope_scaling": {"type": "x"}},
    ],
)
def test_rope_of_transformers_4_and_5(fields: dict[str, Any]) -> None:
    """Theta beside the scaling or inside it, `type` or `rope_type`."""
    config = parse(**fields)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 256)


def test_rope_kinds() -> None:
    assert parse(rope_parameters={"rope_type": "default", "rope_theta": 7.5}).rope_scaling is None
    assert parse(rope_parameters={"rope_type": "default", "rope_theta": 7.5}).rope_theta == 7.5
    assert parse(rope_scaling=None).rope_theta == 10000.0
    assert parse(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == RopeScaling(
        "linear", 2.0, original_max_position=512
    )
    yarn = parse(rope_scaling={"type": "yarn", "original_max_position_embeddings": 128}).rope_scaling
    assert yarn == RopeScaling("yarn", 4.0, original_max_position=128), "factor from the two lengths"
    assert (
        parse(rope_scaling={"type": "yarn", "factor": 2.0, "attention_factor": 1.5}).rope_scaling.attention_factor
        == 1.5
    )
    assert not parse(rope_scaling={"type": "yarn", "factor": 2.0, "truncate": False}).rope_scaling.truncate


def test_windows() -> None:
    """Mistral: every layer. Qwen: layers from max_window_layers up, if asked for, or as layer_types says."""
    mistral, qwen = {"architectures": ["MistralForCausalLM"]}, {"architectures": ["Qwen3ForCausalLM"]}
    on = {**qwen, "use_sliding_window": True, "sliding_window": 32}
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert parse(**mistral, sliding_window=32).layer_windows == (32,) * 4
    assert parse(**mistral, sliding_window=None).layer_windows == (None,) * 4
    assert parse(**mistral).layer_windows == (4096,) * 4
    assert parse(**qwen, sliding_window=32, max_window_layers=1).layer_windows == (None,) * 4
    assert parse(**on, max_window_layers=1).layer_windows == (None, 32, 32, 32)
    assert parse(**on, max_window_layers=4).layer_windows == (None,) * 4
    assert parse(**on).layer_windows == (None,) * 4, "the default is layer 28"
    assert parse(**on, max_window_layers=0, layer_types=kinds).layer_windows == (None, 32, None, 32)
    assert parse(**{**on, "sliding_window": None}).layer_windows == (None,) * 4
    assert parse(sliding_window=32).layer_windows == (None,) * 4, "Llama has none"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"architectures": ...}, "architecture None is not supported; supported: LlamaForCausalLM, Mistral"),
        ({"architectures": []}, "architecture None is not supported"),
        ({"architectures": "LlamaForCausalLM"}, "architecture None is not supported"),
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported: .*Qwen3ForCausalLM"),
        ({"architectures": [{}]}, "is not supported; supported"),
        ({"vocab_size": ...}, "vocab_size must be a positive integer, found None"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, found '64'"),
        ({"hidden_size": 65}, r"hidden_size \(65\) is not a multiple of num_attention_heads \(8\)"),
        ({"hidden_size": 10**400}, "hidden_size must be a positive integer"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number"),
        ({"hidden_size": True}, "hidden_size must be a positive integer, found True"),
        ({"intermediate_size": 0}, "intermediate_size must be a positive integer"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(8\) is not a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"max_position_embeddings": 2.5}, "max_position_embeddings must be a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a positive number, found 'small'"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("inf")}, "rope_theta must be a positive number"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported; supported: float32, bfloat16, float16"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantized checkpoints \(gptq\) are not supported"),
        ({"quantization_config": "awq"}, "quantization_config must be an object, found 'awq'"),
        ({"rope_scaling": [1]}, "rope_parameters must be an object or null"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "'dynamic' is not supported; .* linear, llama3, yarn"),
        ({"rope_scaling": {"type": ["yarn"]}}, "is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' needs a factor"),
        ({"rope_scaling": {"type": "linear", "factor": 1e299}}, r"factor of 1e\+299 is not in"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a positive number, found '2'"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": -5}},
            "original_max_position",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ between layers are not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor other than 1"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id, a list of them or null"),
        ({"eos_token_id": [1, -2]}, "eos_token_id must be a token id"),
        ({"bos_token_id": 1.5}, "bos_token_id must be a token id"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window must be a positive integer"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types must be a list of 4 entries, found 1 entries",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["mamba"] * 4},
            "layer type 'mamba' is not supported",
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": "1"},
            "max_window_layers must be an integer",
        ),
    ],
)
def test_bad_fields(changes: dict[str, Any], text: str) -> None:
    """Each is a ModelConfigError of one line that names the field and what was found."""
    with pytest.raises(ModelConfigError, match=text) as error:
        parse(**changes)
    assert "\n" not in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 5000) | st.floats() | st.sampled_from(["yarn", "silu", "x", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "factor", "rope_theta", "mscale", "mscale_all_dim"]), inner, max_size=4
        )
    ),
    max_leaves=6,
)
NAMES = [*PLAIN, "rope_scaling", "rope_parameters", "rope_theta", "eos_token_id", "quantization_config", "layer_types"]
NAMES += [
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "dtype",
    "hidden_act",
    "head_dim",
    "rms_norm_eps",
]


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(sorted(SUPPORTED)), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_values_are_understood_or_refused(architecture: str, changes: dict[str, Any]) -> None:
    """Whatever JSON stands in the fields: a config that has a KV layout, or a ModelConfigError."""
    try:
        config = parse(**{"architectures": [architecture], **changes})
    except ModelConfigError:
        return
    layers = [layer for group in kv_layout(config, 32, "float32").groups for layer in group.layers]
    assert sorted(layers) == list(range(config.num_layers))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "kind", [transformers.LlamaConfig, transformers.MistralConfig, transformers.Qwen2Config, transformers.Qwen3Config]
)
def test_what_transformers_saves_is_what_it_means(kind: Any, tied: bool, tmp_path: Path) -> None:
    """save_pretrained leaves out what it calls a default: the two readings of the file agree all the same."""
    theirs = kind(
        hidden_size=64, num_attention_heads=32, num_hidden_layers=3, tie_word_embeddings=tied, dtype="float16"
    )
    theirs.architectures = [kind.__name__.removesuffix("Config") + "ForCausalLM"]
    theirs.save_pretrained(tmp_path)
    ours = load_model_config(tmp_path)
    assert (ours.vocab_size, ours.intermediate_size) == (theirs.vocab_size, theirs.intermediate_size)
    assert (ours.num_kv_heads, ours.max_position) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    assert (ours.tied_embeddings, ours.norm_eps, ours.dtype) == (tied, theirs.rms_norm_eps, "float16")
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 2)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.layer_windows == ((4096,) * 3 if kind is transformers.MistralConfig else (None,) * 3)


def test_files(tmp_path: Path) -> None:
    """generation_config.json gives the end tokens when it names some; absent and malformed files are named."""
    with pytest.raises(ModelConfigError, match=r"config.json does not exist: is this a Hugging Face model directory\?"):
        load_model_config(tmp_path)
    path = tmp_path / "config.json"
    for text, message in (
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[]", "must hold a JSON object"),
    ):
        path.write_bytes(text)
        with pytest.raises(ModelConfigError, match=message) as error:
            load_model_config(tmp_path)
        assert str(path) in str(error.value)
    path.write_text(json.dumps(PLAIN | {"eos_token_id": 2}))
    assert load_model_config(tmp_path).eos_token_ids == (2,)
    for value, expected in (([7, 8], (7, 8)), (9, (9,)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
        assert load_model_config(tmp_path).eos_token_ids == expected
    (tmp_path / "generation_config.json").write_text("nope")
    with pytest.raises(ModelConfigError, match="generation_config.json is not valid JSON"):
        load_model_config(tmp_path)


def test_kv_layout_groups_layers_by_window() -> None:
    """Full layers first; sizes in bytes follow heads, block, head_dim and dtype; the format tells layouts apart."""
    fields = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 9}
    config = parse(**fields, max_window_layers=3)
    layout = kv_layout(config, 16, "bfloat16")
    assert [(g.index, g.kind, g.window, g.layers) for g in layout.groups] == [
        (0, "full", None, (0, 1, 2)),
        (1, "window", 9, (3,)),
    ]
    group = layout.groups[0]
    assert group.layer_bytes == 2 * 2 * 16 * 8 * 2
    assert group.block_bytes == 3 * group.layer_bytes
    assert layout.block_size == 16
    assert layout.bytes_per_token == 4 * group.layer_bytes / 16
    formats = {
        kv_layout(parse(**fields, max_window_layers=n), 16, d).format for n in (2, 3) for d in ("float32", "bfloat16")
    }
    assert len(formats) == 4
    packed = KVLayout(tuple(replace(group, packing="paired") for group in layout.groups))
    eight_bits = kv_layout(config, 16, "int8")
    assert len({layout.format, packed.format, eight_bits.format}) == 3
    assert layout.format.split("/")[0] == "full:3x2x16x8:bfloat16:hm:plain"
    assert eight_bits.format.split("/")[0] == "full:3x2x16x8:int8*bfloat16:hm:plain"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_extents_tile_a_block(dtype: str) -> None:
    """Layers, K before V, heads in order: the extents of single heads cover the block without gap or overlap. A head's
    scales end its extent."""
    group = kv_layout(parse(), 16, dtype).groups[0]
    position = 0
    for layer in group.layers:
        for part in ("k", "v"):
            assert group.extent(layer, part, 0, 2) == (position, group.layer_bytes // 2)
            for head in range(2):
                offset, length = group.extent(layer, part, head, head + 1)
                assert offset == position
                position += length
                scales, scale_bytes = group.scale_extent(layer, part, head)
                assert (scales - offset, scale_bytes) == ((16 * 8, 16 * 2) if dtype == "int8" else (length, 0))
                assert scales + scale_bytes == position
    assert position == group.block_bytes
