"""A checkpoint's tokenizer: directory -> text to ids, ids to text, special tokens, chat template texts.

Built on the `tokenizers` library. Knows nothing of requests, models or template rendering (server/chat.py does that).
What `transformers` reads from the same files is what is read here; tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer

from penstock.core.request import ParamsError

# Qwen2's pre-tokenizer: how text is cut into words before BPE (as published in Qwen2's tokenizer.json).
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerError(ValueError):
    """A tokenizer cannot be loaded, or was given what it cannot encode or decode. The text is for people."""


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte for byte-level BPE: printable Latin-1 stands for itself, the other 68 bytes follow U+0100.

    Source: GPT-2 (Radford et al. 2019), `bytes_to_unicode` in its encoder.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()


class Pieces(dict[int, "str | None"]):
    """Token id -> its text if its bytes are whole UTF-8 characters, None if not. Fills itself, one entry per token."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens

    def __missing__(self, token_id: int) -> str | None:
        text: str | None
        try:
            text = self.bytes_of(token_id).decode("utf-8")
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token adds to the output: none for a special token that is skipped."""
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)


class Tokenizer:
    """Text <-> token ids of one checkpoint. Read-only after loading and safe to share between threads.

    vocab_size: one above the largest id that has a token (a model's embedding may have more rows).
    bos_id; eos_ids: ids that end a sequence, the tokenizer's own first, then those of generation_config.json.
    special_tokens: what templates see as variables, `bos_token` -> "<s>" and so on.
    chat_templates: name -> Jinja text; "default" unless the checkpoint names them.
    decoding: "byte_level" (GPT-2, Llama 3, Qwen), "byte_fallback" (SentencePiece BPE: Llama 2, Mistral, Phi-3) or
        "other" (what else the library knows). For the first two a token's bytes do not depend on its neighbours.
    strips_first_space: decoding drops one space at the very beginning of the text (SentencePiece).
    """

    def __init__(
        self,
        library: LibraryTokenizer,
        *,
        special_tokens: dict[str, Any] | None = None,
        eos_ids: Sequence[int] = (),
        chat_templates: dict[str, str] | None = None,
        add_bos_token: bool | None = None,
    ) -> None:
        """`add_bos_token`: None leaves it to the library's post-processor; `library` is taken over."""
        library.no_truncation()
        library.no_padding()
        self._library = library
        self.special_tokens = special_tokens or {}
        self.chat_templates = chat_templates or {}
        self.bos_id = self.special_id("bos_token")
        own_eos = self.special_id("eos_token")
        self.eos_ids = tuple(dict.fromkeys([*([own_eos] if own_eos is not None else []), *eos_ids]))
        added = library.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max(library.get_vocab_size(with_added_tokens=False), max(added, default=-1) + 1)
        self.decoding, self.strips_first_space = _decoding_of(library)
        self._token_bytes: dict[int, bytes] = {}
        self._pieces = {skip: Pieces(self, skip) for skip in (False, True)}

        library_adds_bos = self.bos_id is not None and self._ids("", True)[:1] == [self.bos_id]
        wants_bos = library_adds_bos if add_bos_token is None else add_bos_token
        self._adds_bos = wants_bos and not library_adds_bos and self.bos_id is not None
        self._drops_bos = library_adds_bos and not wants_bos

    # ---- text to ids ----

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        # The batch call gives up the GIL and keeps no offsets; `encode` holds the GIL throughout (71 ms for 180,000
        # characters against gaps of 1 ms) and is 20 % slower on texts above 300 characters.
        return self._library.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; special tokens written in the text become their ids, as in transformers and vLLM.

        With `add_special_tokens` also what the checkpoint puts around a text (usually BOS). Other threads run
        meanwhile (no GIL). Raises TokenizerError if the text is no valid Unicode (lone surrogates).
        """
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise TokenizerError("the text is not valid Unicode (it holds a lone surrogate)") from error
        batch: list[list[int]] = [encoding.ids for encoding in encodings]
        if add_special_tokens and self._adds_bos:
            return [[self.bos_id, *ids] for ids in batch]  # type: ignore[list-item]  # _adds_bos says it is there
        if add_special_tokens and self._drops_bos:
            return [ids[1:] for ids in batch]
        return batch

    def encode_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences that `bad_words` forbids: each word at the beginning of a text, and after a space.

        vLLM leaves the second one out where it has another number of tokens; in a small vocabulary most words have,
        and they would go on appearing. Raises ParamsError for a word without tokens.
        """
        sequences: list[tuple[int, ...]] = []
        both = [form for word in words for form in (word.lstrip(), " " + word.lstrip())]
        ids = iter(self.encode_batch(both, add_special_tokens=False))
        for word, bare, spaced in zip(words, ids, ids, strict=True):
            if not bare or not word.strip():
                raise ParamsError("bad_words", f"bad_words must not hold an empty word, got {word!r}")
            sequences.append(tuple(bare))
            if spaced[-len(bare) :] != bare:  # else forbidding the first forbids it too
                sequences.append(tuple(spaced))
        return tuple(sequences)

    # ---- ids to text ----

    def decode(
        self, token_ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True
    ) -> str:
        """Text of `token_ids`; ids without a token give nothing, bytes that are no UTF-8 give U+FFFD.

        `spaces_between_special_tokens` matters only for decoders that put spaces between tokens ("other"): False
        writes added tokens as they are and decodes each run between them on its own.
        Raises TokenizerError for ids that are no 32-bit unsigned numbers.
        """
        try:
            if spaces_between_special_tokens or self.decoding != "other":
                return self._library.decode(token_ids, skip_special_tokens=skip_special_tokens)
            texts: list[str] = []
            run: list[int] = []
            for token_id in token_ids:
                if skip_special_tokens and token_id in self._special_ids:
                    continue
                if token_id in self._added:
                    texts += [self._library.decode(run, skip_special_tokens=False), self._added[token_id]]
                    run = []
                else:
                    run.append(token_id)
            return "".join([*texts, self._library.decode(run, skip_special_tokens=False)])
        except (OverflowError, TypeError) as error:
            raise TokenizerError(f"token ids must be integers from 0 to {self.vocab_size - 1}") from error

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it ("Ġthe", "▁the", "<0x0A>"); None for an id without one."""
        try:
            return self._library.id_to_token(token_id)
        except OverflowError:
            return None

    def token_to_id(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """Exactly the bytes that the token stands for, perhaps part of a character; b"" for an id without a token.

        For "other" decoders the UTF-8 form of the token as the vocabulary writes it, "▁" read as a space.
        """
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self.id_to_token(token_id)
            known = b"" if token is None else self._bytes_of_token(token)
            self._token_bytes[token_id] = known
        return known

    def _bytes_of_token(self, token: str) -> bytes:
        if self.decoding == "byte_level":
            # The library's decoder treats added tokens the same way: through the alphabet if every character is in it.
            try:
                return bytes([_BYTE_OF_CHAR[char] for char in token])
            except KeyError:
                return token.encode("utf-8")
        if self.decoding == "byte_fallback" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.replace("▁", " ").encode("utf-8")

    def token_text(self, token_id: int) -> str:
        """The token alone as text, its leading space kept; bytes that are no whole character give U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def pieces(self, skip_special_tokens: bool) -> Pieces:
        """The shared table that incremental detokenising reads; meaningless for "other" decoders."""
        return self._pieces[skip_special_tokens]

    # ---- special tokens ----

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` drops it."""
        return token_id in self._special_ids

    def added_token(self, token_id: int) -> str | None:
        """Content of an added token (special or not), None for a token of the base vocabulary."""
        return self._added.get(token_id)

    def special_id(self, name: str) -> int | None:
        """Id of `bos_token`, `eos_token`, ...; None if the checkpoint has none."""
        content = self.special_tokens.get(name)
        return self._library.token_to_id(content) if isinstance(content, str) else None


def _decoding_of(library: LibraryTokenizer) -> tuple[str, bool]:
    """(decoding, strips_first_space) of the library's decoder, see Tokenizer."""
    if library.decoder is None:
        return "other", False
    top = json.loads(library.decoder.__getstate__())
    steps = top["decoders"] if top["type"] == "Sequence" else [top]
    names = [step["type"] for step in steps]
    if names == ["ByteLevel"]:
        return "byte_level", False
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and names[3:] in ([], ["Strip"]):
        strip = steps[3] if len(steps) == 4 else {"content": " ", "start": 0, "stop": 0}
        is_space_mark = steps[0]["pattern"] == {"String": "▁"} and steps[0]["content"] == " "
        if is_space_mark and strip["content"] == " " and strip["start"] in (0, 1) and strip["stop"] == 0:
            return "byte_fallback", strip["start"] == 1
    return "other", False


# ---- loading ----


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face checkpoint directory.

    Reads tokenizer.json, or vocab.json + merges.txt (GPT-2 and Qwen2 forms); tokenizer_config.json,
    special_tokens_map.json, added_tokens.json, chat_template.jinja, additional_chat_templates/*.jinja,
    generation_config.json and config.json where they exist. Raises TokenizerError with the file and the reason.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise TokenizerError(f"tokenizer directory {directory} does not exist")
    config = _read_json(directory / "tokenizer_config.json")
    model_config = _read_json(directory / "config.json")
    library = _load_library(directory, config, model_config)
    _add_tokens(library, directory, config)

    special_tokens = _special_tokens(directory, config)
    if not (directory / "tokenizer.json").is_file() and library.token_to_id("<|endoftext|>") is not None:
        special_tokens.setdefault("eos_token", "<|endoftext|>")  # the default of both vocab.json + merges.txt classes
    named = [special_tokens[name] for name in _SPECIAL_NAMES if name in special_tokens]
    known = {token.content for token in library.get_added_tokens_decoder().values()}
    library.add_special_tokens(
        [AddedToken(t, normalized=False) for t in named if t not in known and library.token_to_id(t) is not None]
    )

    add_bos_token = config.get("add_bos_token")
    return Tokenizer(
        library,
        special_tokens=special_tokens,
        eos_ids=_eos_ids(directory, model_config),
        chat_templates=_chat_templates(directory, config),
        add_bos_token=add_bos_token if isinstance(add_bos_token, bool) else None,
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} if there is no such file. Raises TokenizerError if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _load_library(directory: Path, config: dict[str, Any], model_config: dict[str, Any]) -> LibraryTokenizer:
    path = directory / "tokenizer.json"
    vocab, merges = directory / "vocab.json", directory / "merges.txt"
    try:
        if path.is_file():
            return LibraryTokenizer.from_file(str(path))
        if vocab.is_file() and merges.is_file():
            path = vocab
            library = LibraryTokenizer(models.BPE.from_file(str(vocab), str(merges)))
        else:
            found = " (tokenizer.model alone is not enough)" if (directory / "tokenizer.model").is_file() else ""
            raise TokenizerError(f"{directory} has neither tokenizer.json nor vocab.json + merges.txt{found}")
    except TokenizerError:
        raise
    except Exception as error:  # the library raises plain Exception for every kind of broken file
        raise TokenizerError(f"{path} cannot be read: {error}") from error

    form = str(config.get("tokenizer_class") or model_config.get("model_type") or "GPT2Tokenizer").lower()
    add_prefix_space = bool(config.get("add_prefix_space", False))
    if form.startswith("qwen"):
        library.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        by_byte = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([words, by_byte])
    elif form.startswith("gpt2"):
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    else:
        raise TokenizerError(f"{directory} has no tokenizer.json, which {form} needs (only Qwen2 and GPT-2 do without)")
    library.decoder = decoders.ByteLevel()
    return library


def _added_token(value: Any, special: bool) -> AddedToken | None:
    """An AddedToken from its JSON form, a string or an object; None for anything else."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=special)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {name: bool(value.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "normalized")}
        return AddedToken(value["content"], special=bool(value.get("special", special)), **flags)
    return None


def _add_tokens(library: LibraryTokenizer, directory: Path, config: dict[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json or added_tokens.json know, in order of their ids."""
    wanted: dict[int, AddedToken] = {}
    for content, token_id in _read_json(directory / "added_tokens.json").items():
        if isinstance(token_id, int):
            wanted[token_id] = AddedToken(content, normalized=False)
    listed = config.get("added_tokens_decoder")
    for token_id, value in (listed if isinstance(listed, dict) else {}).items():
        token = _added_token(value, special=False)
        if token is not None and token_id.isdecimal():
            wanted[int(token_id)] = token
    present = {token.content for token in library.get_added_tokens_decoder().values()}
    for token_id, token in sorted(wanted.items()):
        if token.content in present:
            continue
        library.add_tokens([token])
        given = library.token_to_id(token.content)
        if given != token_id:
            raise TokenizerError(
                f"{directory}: added token {token.content!r} should have id {token_id}, but the vocabulary makes it "
                f"{given}: tokenizer_config.json does not belong to this vocabulary"
            )


def _special_tokens(directory: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Name -> content of bos_token, eos_token, ...; tokenizer_config.json goes before special_tokens_map.json."""
    special_tokens: dict[str, Any] = {}
    for source in (config, _read_json(directory / "special_tokens_map.json")):
        for name in _SPECIAL_NAMES:
            token = _added_token(source.get(name), special=True)
            if token is not None:
                special_tokens.setdefault(name, token.content)
        listed = source.get("additional_special_tokens")
        contents = [_added_token(value, special=True) for value in (listed if isinstance(listed, list) else [])]
        if contents:
            special_tokens.setdefault("additional_special_tokens", [token.content for token in contents if token])
    return special_tokens


def _eos_ids(directory: Path, model_config: dict[str, Any]) -> list[int]:
    """`eos_token_id` of generation_config.json, or of config.json when there is no such file."""
    has_own = (directory / "generation_config.json").is_file()
    source = _read_json(directory / "generation_config.json") if has_own else model_config
    value = source.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if isinstance(token_id, int) and not isinstance(token_id, bool)]


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Name -> template text. Files go before tokenizer_config.json, whose value is a text or a list of named ones."""
    templates: dict[str, str] = {}
    value = config.get("chat_template")
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        for entry in value:
            try:
                templates[str(entry["name"])] = str(entry["template"])
            except (KeyError, TypeError) as error:
                path = directory / "tokenizer_config.json"
                raise TokenizerError(f"{path}: chat_template must be a text or a list of name and template") from error
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").is_file():
        files["default"] = directory / "chat_template.jinja"
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} cannot be read: {error}") from error
    return templates
