"""llama2.c checkpoints (legacy `.bin`) and tokenizers to a Hugging Face directory, as `penstock convert llama2c` does.

Knows two file formats and what Llama's config.json says; imports no torch and no model. Weights stay float32 and are
copied bit for bit; rows of wq and wk change places, because llama2.c rotates neighbouring rows (2i, 2i+1) and Hugging
Face rows (i, i + head_dim/2). Source: github.com/karpathy/llama2.c, export.py (`legacy_export`), run.c, tokenizer.py.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from penstock.nn.weights.errors import CheckpointError

Floats = NDArray[np.float32]
BOS, EOS = 1, 2
SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as sentencepiece has them
FIRST_BYTE, FIRST_PIECE = 3, 259  # ids 3..258 are the raw bytes <0x00> .. <0xFF>
SPACE = "\u2581"  # sentencepiece's visible space; llama2.c stores a plain one
ROPE_THETA, NORM_EPS = 10000.0, 1e-5  # constants of run.c
MAX_SIZE = 1 << 24  # of any header field: beyond it the file is something else
_NEWER_MAGIC = 0x616B3432  # "ak42": versions 1 and 2 of llama2.c's export


class MalformedLlama2c(CheckpointError):
    """The model or tokenizer file is not a legacy llama2.c file, or the two do not belong together."""


@dataclass(frozen=True, slots=True)
class Llama2cShape:
    """The header of a model file: seven int32, sizes in elements."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    max_position: int
    tied: bool  # a negative vocabulary size in the file says that the head is stored apart

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written."""

    directory: Path
    num_parameters: int
    vocab_size: int
    bytes: int


def convert_llama2c(model_path: str | Path, tokenizer_path: str | Path, out_dir: str | Path) -> Conversion:
    """Write config.json, model.safetensors, tokenizer.json and their companions to `out_dir`.

    `out_dir` must be absent or empty; it appears complete or not at all. Raises MalformedLlama2c for files that are not
    what they should be, CheckpointError for paths that cannot be used.
    """
    model_path, tokenizer_path, out_dir = Path(model_path), Path(tokenizer_path), Path(out_dir).resolve()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CheckpointError(f"{out_dir} exists and is not an empty directory")
    try:
        shape = read_shape(model_path)
        tokenizer = build_tokenizer(tokenizer_path, shape.vocab_size)
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=out_dir.parent, prefix=f".{out_dir.name}."))
        try:
            num_parameters = _write_weights(model_path, shape, partial / "model.safetensors")
            tokenizer.save(str(partial / "tokenizer.json"))
            for name, content in _json_files(shape).items():
                (partial / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            num_bytes = sum(path.stat().st_size for path in partial.iterdir())
            partial.chmod(0o755)
            os.replace(partial, out_dir)  # an empty directory may be replaced
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None
    return Conversion(out_dir, num_parameters, shape.vocab_size, num_bytes)


def read_shape(path: Path) -> Llama2cShape:
    """The header of a model file, checked against the size of the file."""
    with open(path, "rb") as file:
        raw = file.read(28)
        num_bytes = os.fstat(file.fileno()).st_size
    if len(raw) < 28:
        raise MalformedLlama2c(f"{path}: {num_bytes} bytes, too short for a llama2.c header")
    if struct.unpack("<I", raw[:4])[0] == _NEWER_MAGIC:
        raise MalformedLlama2c(f"{path}: llama2.c export version 1 or 2; convert the legacy form (version 0)")
    dim, hidden, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", raw)
    shape = Llama2cShape(dim, hidden, layers, heads, kv_heads, abs(vocab), seq_len, tied=vocab > 0)
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), seq_len)
    if not all(0 < size <= MAX_SIZE for size in sizes) or dim % heads or heads % kv_heads or shape.head_dim % 2:
        raise MalformedLlama2c(f"{path}: not a llama2.c model: its header says {', '.join(map(str, sizes))}")
    expected = 28 + 4 * sum(int(np.prod(size)) for _, size in _sections(shape))
    if num_bytes != expected:
        verb = "truncated" if num_bytes < expected else "too long"
        raise MalformedLlama2c(f"{path}: {verb}: {num_bytes} bytes, its header promises {expected}")
    return shape


def _sections(shape: Llama2cShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The arrays of a model file in their order; matrices are [out, in]."""
    dim, hidden, layers, head_dim = shape.hidden_size, shape.intermediate_size, shape.num_layers, shape.head_dim
    yield "embed", (shape.vocab_size, dim)
    yield "attention_norm", (layers, dim)
    yield "wq", (layers, dim, dim)
    yield "wk", (layers, shape.num_kv_heads * head_dim, dim)
    yield "wv", (layers, shape.num_kv_heads * head_dim, dim)
    yield "wo", (layers, dim, dim)
    yield "mlp_norm", (layers, dim)
    yield "w1", (layers, hidden, dim)
    yield "w2", (layers, dim, hidden)
    yield "w3", (layers, hidden, dim)
    yield "norm", (dim,)
    yield "rope", (2, shape.max_position, head_dim // 2)  # cosines and sines, computed anew everywhere today
    if not shape.tied:
        yield "head", (shape.vocab_size, dim)


def split_halves(weight: Floats, num_heads: int) -> Floats:
    """Rows of each head from (0, 1, 2, 3, ...) to (0, 2, ..., 1, 3, ...): rope pairs i with i + head_dim/2 after it."""
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(paired.transpose(0, 2, 1, 3).reshape(rows, columns))


def _write_weights(path: Path, shape: Llama2cShape, out_path: Path) -> int:
    """Stream the weights into one safetensors file, a tensor at a time. Returns the number of parameters."""
    stored: dict[str, Floats] = {}
    offset = 28
    for name, size in _sections(shape):
        stored[name] = np.memmap(path, "<f4", "r", offset, size)
        offset += stored[name].nbytes
    places: list[tuple[str, Floats, int]] = [("model.embed_tokens.weight", stored["embed"], 0)]
    for n in range(shape.num_layers):
        prefix = f"model.layers.{n}."
        places += [
            (prefix + "input_layernorm.weight", stored["attention_norm"][n], 0),
            (prefix + "self_attn.q_proj.weight", stored["wq"][n], shape.num_heads),
            (prefix + "self_attn.k_proj.weight", stored["wk"][n], shape.num_kv_heads),
            (prefix + "self_attn.v_proj.weight", stored["wv"][n], 0),
            (prefix + "self_attn.o_proj.weight", stored["wo"][n], 0),
            (prefix + "post_attention_layernorm.weight", stored["mlp_norm"][n], 0),
            (prefix + "mlp.gate_proj.weight", stored["w1"][n], 0),
            (prefix + "mlp.down_proj.weight", stored["w2"][n], 0),
            (prefix + "mlp.up_proj.weight", stored["w3"][n], 0),
        ]
    places.append(("model.norm.weight", stored["norm"], 0))
    if not shape.tied:
        places.append(("lm_head.weight", stored["head"], 0))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight, _ in places:
        start, end = end, end + weight.nbytes
        header[name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the first tensor to 8 bytes
    with open(out_path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, weight, num_rotated in places:
            if not np.isfinite(weight).all():
                raise MalformedLlama2c(f"{path}: {name} holds values that are not finite")
            file.write(split_halves(weight, num_rotated).data if num_rotated else weight.data)
    return sum(weight.size for _, weight, _ in places)


def read_pieces(path: Path, vocab_size: int) -> tuple[list[str], list[float]]:
    """Text and score of every token. The file: int32 longest, then per token float32 score, int32 length, bytes."""
    raw = path.read_bytes()
    if len(raw) < 4:
        raise MalformedLlama2c(f"{path}: {len(raw)} bytes, too short for a llama2.c tokenizer")
    position, texts, scores = 4, [], []
    for token in range(vocab_size):
        if position + 8 > len(raw):
            raise MalformedLlama2c(f"{path}: ends after {token} tokens, the model has {vocab_size}")
        score, length = struct.unpack_from("<fi", raw, position)
        position += 8
        if not np.isfinite(score) or not 0 <= length <= len(raw) - position:
            raise MalformedLlama2c(f"{path}: token {token} has score {score} and length {length}")
        try:
            texts.append(raw[position : position + length].decode("utf-8"))
        except UnicodeDecodeError:
            raise MalformedLlama2c(f"{path}: token {token} is not UTF-8") from None
        scores.append(score)
        position += length
    if position != len(raw):
        raise MalformedLlama2c(f"{path}: {len(raw) - position} bytes after token {vocab_size}, the model's last")
    for byte in range(256):
        token = FIRST_BYTE + byte
        if token >= vocab_size or texts[token] != f"<0x{byte:02X}>":
            raise MalformedLlama2c(f"{path}: token {token} is not the byte <0x{byte:02X}>: not a llama2.c tokenizer")
    return texts, scores


def build_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """A BPE tokenizer that encodes as llama2.c does: a space in front, best score first, unknown characters as bytes.

    sentencepiece merges the neighbours whose union is the piece with the best score, leftmost first; BPE merges by
    rank. So every way to cut a piece in two pieces becomes a merge, ranked by the score of the whole. Equal texts with
    equal ids were checked against run.c's algorithm on random texts (tests).
    """
    texts, scores = read_pieces(path, vocab_size)
    pieces = [*SPECIAL, *texts[FIRST_BYTE:FIRST_PIECE], *(text.replace(" ", SPACE) for text in texts[FIRST_PIECE:])]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    if len(vocab) != vocab_size or "" in vocab:
        seen = next((token for token, piece in enumerate(pieces) if vocab[piece] != token), vocab.get("", 0))
        raise MalformedLlama2c(f"{path}: token {seen} is empty or occurs twice")
    ranked = []
    for token in range(FIRST_PIECE, vocab_size):
        piece = pieces[token]
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut], -1), vocab.get(piece[cut:], -1)
            if left >= FIRST_PIECE and right >= FIRST_PIECE:
                ranked.append((-scores[token], token, left, right))
    merges = [(pieces[left], pieces[right]) for _, _, left, right in sorted(ranked)]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=SPECIAL[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL])
    return tokenizer


def _json_files(shape: Llama2cShape) -> dict[str, dict[str, Any]]:
    """The small files that transformers and penstock read beside weights and tokenizer."""
    return {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": BOS,
            "dtype": "float32",
            "eos_token_id": EOS,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": shape.intermediate_size,
            "max_position_embeddings": shape.max_position,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": shape.num_heads,
            "num_hidden_layers": shape.num_layers,
            "num_key_value_heads": shape.num_kv_heads,
            "rms_norm_eps": NORM_EPS,
            "rope_scaling": None,
            "rope_theta": ROPE_THETA,
            "tie_word_embeddings": shape.tied,
            "torch_dtype": "float32",
            "use_cache": True,
            "vocab_size": shape.vocab_size,
        },
        # llama2.c trains on texts that each begin with <s>, so a text ends where the next one would begin.
        "generation_config.json": {"bos_token_id": BOS, "eos_token_id": [EOS, BOS]},
        "tokenizer_config.json": {
            "bos_token": SPECIAL[1],
            "clean_up_tokenization_spaces": False,
            "eos_token": SPECIAL[2],
            "model_max_length": shape.max_position,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": SPECIAL[0],
        },
        "special_tokens_map.json": {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2], "unk_token": SPECIAL[0]},
    }
