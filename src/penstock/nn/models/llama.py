"""The dense decoder: Llama 2/3.x, Mistral, Qwen2, Qwen3.

One file, because they differ only in flags that `ModelConfig` holds. Knows no request, no cache layout and no file.
"""

from __future__ import annotations

from torch import Tensor, nn

from penstock.config.model import ModelConfig
from penstock.nn.doors import Batch, Buffer, Recorder, Scores
from penstock.nn.kernels.sampling import DenseScores
from penstock.nn.layers.attention import SelfAttention
from penstock.nn.layers.embed import Embedding
from penstock.nn.layers.linear import Linear
from penstock.nn.layers.mlp import GatedMlp
from penstock.nn.layers.norm import RMSNorm
from penstock.nn.layers.rotary import Rotary
from penstock.nn.weights.routes import Route


class DecoderLayer(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)). x [T, hidden]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = SelfAttention(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMlp(config)

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), batch, cos, sin)
        return x + self.mlp(self.mlp_norm(x))

    def record(self, to: Recorder, x: Buffer, rotary: tuple[Tensor, Tensor]) -> None:
        self.attention.record(to, self.attention_norm.record(to, x), x, rotary)
        self.mlp.record(to, self.mlp_norm.record(to, x), x)


class LlamaModel(nn.Module):
    """`forward(batch)` gives hidden states [N, hidden] of its outputs after the last norm; `logits` their scores."""

    def __init__(self, config: ModelConfig, num_positions: int | None = None) -> None:
        """`num_positions`: as many as will be computed; rotary tables are made for no more. None: all the model has."""
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, n) for n in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embed.weight
        num_positions = min(num_positions or config.num_positions, config.num_positions)
        self.rotary = Rotary(config.head_dim, num_positions, config.rope_theta, config.rope_scaling)

    def forward(self, batch: Batch) -> Tensor:
        x = self.embed(batch.token_ids)
        cos, sin = self.rotary.gather(batch.positions, x.dtype)
        for layer in self.layers:
            x = layer(x, batch, cos, sin)
        if batch.outputs is not None:
            x = x[batch.outputs]
        return self.norm(x)

    def record(self, to: Recorder) -> Buffer:
        """What `forward` does, as operations; the buffer of hidden states."""
        x = to.embed(self.embed.weight)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.record(to, x, (self.rotary.cos, self.rotary.sin))
        return self.norm.record(to, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, hidden] to float32 [N, vocab_size]."""
        return self.head(hidden).float()

    def scores(self, hidden: Tensor) -> Scores:
        return DenseScores(self.logits(hidden))

    def scores_after(self, batch: Batch) -> Scores:
        return self.scores(self(batch))


def routes(config: ModelConfig) -> list[Route]:
    """Where each tensor of a Hugging Face checkpoint goes in `LlamaModel`; fused parameters take row ranges."""
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inter = config.intermediate_size
    found = [
        Route("model.embed_tokens.weight", "embed.weight"),
        Route("model.norm.weight", "norm.weight"),
    ]
    found.append(Route("lm_head.weight", "head.weight", kind="tied" if config.tied_embeddings else "fill"))
    for n in range(config.num_layers):
        src, dst = f"model.layers.{n}.", f"layers.{n}."
        found += [
            Route(src + "input_layernorm.weight", dst + "attention_norm.weight"),
            Route(src + "post_attention_layernorm.weight", dst + "mlp_norm.weight"),
        ]
        if config.qk_norm:
            found += [
                Route(src + "self_attn.q_norm.weight", dst + "attention.q_norm.weight"),
                Route(src + "self_attn.k_norm.weight", dst + "attention.k_norm.weight"),
            ]
        for kind in ("weight", "bias"):
            if kind == "weight" or config.qkv_bias:
                found += [
                    Route(f"{src}self_attn.q_proj.{kind}", f"{dst}attention.qkv.{kind}", (0, q)),
                    Route(f"{src}self_attn.k_proj.{kind}", f"{dst}attention.qkv.{kind}", (q, q + kv)),
                    Route(f"{src}self_attn.v_proj.{kind}", f"{dst}attention.qkv.{kind}", (q + kv, q + 2 * kv)),
                ]
            if kind == "weight" or config.attention_out_bias:
                found.append(Route(f"{src}self_attn.o_proj.{kind}", f"{dst}attention.out.{kind}"))
            if kind == "weight" or config.mlp_bias:
                found += [
                    Route(f"{src}mlp.gate_proj.{kind}", f"{dst}mlp.gate_up.{kind}", (0, inter)),
                    Route(f"{src}mlp.up_proj.{kind}", f"{dst}mlp.gate_up.{kind}", (inter, 2 * inter)),
                    Route(f"{src}mlp.down_proj.{kind}", f"{dst}mlp.down.{kind}"),
                ]
    return found
