"""Vocabularies inside .gguf files, as `tokenizers` tokenizers: a reader of the metadata, and pre-tokenizers by name.

Sources: the GGUF specification (version 3, ggml-org/ggml docs/gguf.md); the regular expressions of llama.cpp's
src/llama-vocab.cpp, which names them by `tokenizer.ggml.pre`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, BinaryIO

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # tokenizer.ggml.token_type

# Code points, written as numbers because some of the characters do not survive Unicode normalisation.
_CASED_LETTERS = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 3A3-3F5
3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15
1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC
1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D
212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D A680-A69B
A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB
10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""
_PUNCTUATION = "21-2F 3A-7E FF01-FF0F FF1A-FF5E 2018-201F 3000-3002"
_CJK = "4E00-9FA5 800-4E00 AC00-D7FF"


def _any_of(ranges: str) -> str:
    """A character class from hexadecimal code points and ranges."""
    ends = [[f"\\x{{{end}}}" for end in item.split("-")] for item in ranges.split()]
    return "[" + "".join("-".join(pair) for pair in ends) + "]"


_WORDS = {  # tokenizer.ggml.pre -> what the text is cut by, in turn
    "deepseek-llm": [
        r"[\r\n]",
        rf"\s?{_any_of(_CASED_LETTERS)}+",
        rf"\s?{_any_of(_PUNCTUATION)}+",
        r"\s+$",
        rf"{_any_of(_CJK)}+",
        r"\p{N}",
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", rf"{_any_of(_CJK)}+", r"\p{N}"],
}


def read_metadata(path: Path) -> dict[str, Any]:
    """Key -> value of a GGUF file's metadata; tensors are not looked at."""
    with path.open("rb") as file:
        magic, version, _num_tensors, num_entries = struct.unpack("<4sIQQ", file.read(24))
        assert magic == b"GGUF"
        assert version in (2, 3)
        return {_string(file): _value(file, _scalar(file, "<I")) for _ in range(num_entries)}


def _scalar(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_scalar(file, "<Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind == _ARRAY:
        of, length = _scalar(file, "<I"), _scalar(file, "<Q")
        if of in _SCALARS:
            form = f"<{length}{_SCALARS[of][1:]}"
            return list(struct.unpack(form, file.read(struct.calcsize(form))))
        return [_value(file, of) for _ in range(length)]
    return _scalar(file, _SCALARS[kind])


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a vocabulary file: byte-level BPE ("gpt2") or SentencePiece-style BPE ("llama")."""
    metadata = read_metadata(path)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if metadata["tokenizer.ggml.model"] == "gpt2":
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocab, merges))
        splits = [pre_tokenizers.Split(Regex(w), "isolated") for w in _WORDS.get(metadata["tokenizer.ggml.pre"], [])]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer = _sentencepiece(tokens, metadata["tokenizer.ggml.scores"], vocab)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind != _USER_DEFINED)])
    return tokenizer


def _sentencepiece(tokens: list[str], scores: list[float], vocab: dict[str, int]) -> Tokenizer:
    """SentencePiece merges the pair whose union has the best score: as BPE merges, all splits of each piece by rank."""
    order = sorted((i for i in range(len(tokens)) if len(tokens[i]) > 1), key=lambda i: (-scores[i], i))
    merges = []
    for i in order:
        token = tokens[i]
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=tokens[0], fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
