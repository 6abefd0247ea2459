"""From token ids to text while they come: incremental detokenising, stop strings, and both together per sequence.

Knows a Tokenizer and SamplingParams; nothing of requests, engines or HTTP. One object per sequence, used by one thread.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.request import FINISH_STOP, SamplingParams
from penstock.engine.tokenizer import Tokenizer

_ONE_PER_BYTE = "penstock.one_per_byte"
codecs.register_error(_ONE_PER_BYTE, lambda e: ("\ufffd" * (e.end - e.start), e.end))  # type: ignore[attr-defined]


class Detokenizer(Protocol):
    """Ids in, text out; the pieces of `feed` and the last one of `finish` concatenate to the sequence's text."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete. Never part of a character: that waits for its other bytes."""
        ...

    def finish(self) -> str:
        """What still waits (U+FFFD for an unfinished character). Nothing may be fed after it."""
        ...


def detokenizer(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int] = (),
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> Detokenizer:
    """The fast detokenizer if the tokenizer's tokens are bytes, the general one otherwise."""
    if tokenizer.decoding == "other":
        return WindowDetokenizer(tokenizer, prompt_ids, skip_special_tokens, spaces_between_special_tokens)
    return ByteDetokenizer(tokenizer, prompt_ids, skip_special_tokens)


class ByteDetokenizer:
    """Detokenizer for tokens that stand for bytes whatever their neighbours: byte-level BPE and byte fallback.

    Exact: `decode(prompt + output)` of the library is the prompt's text (less a character that the prompt leaves
    unfinished, which the output may complete) followed by the pieces. One exception, byte fallback only: where the
    library turns every byte of a run of byte tokens into U+FFFD because the run holds one invalid byte, the valid
    characters of the run are kept, since they were sent before the invalid byte came.
    Cost per token: one dictionary look-up, 0.2-0.5 us (benchmarks/text_cost.py).
    """

    __slots__ = ("_errors", "_pending", "_pieces", "_strips")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._pieces = tokenizer.pieces(skip_special_tokens)
        self._errors = "replace" if tokenizer.decoding == "byte_level" else _ONE_PER_BYTE
        tail = b""  # at least the last 4 bytes of the prompt: no character is longer
        for token_id in reversed(prompt_ids):
            tail = self._pieces.bytes_of(token_id) + tail
            if len(tail) >= 4:
                break
        unfinished = tail[codecs.utf_8_decode(tail, "replace", False)[1] :]
        # Python also waits for the third byte of a surrogate (ED A0 to ED BF), which no byte can make a character.
        self._pending = b"" if len(unfinished) == 2 and b"\xed\xa0" <= unfinished <= b"\xed\xbf" else unfinished
        self._strips = tokenizer.strips_first_space and not tail  # only the very first space of the whole text goes

    def feed(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        if len(token_ids) == 1 and not self._pending and not self._strips:  # nearly always
            piece = pieces[token_ids[0]]
            if piece is not None:
                return piece
        texts = []
        for token_id in token_ids:
            piece = pieces[token_id]
            if piece is None or self._pending:
                data = self._pending + pieces.bytes_of(token_id)
                piece, num_used = codecs.utf_8_decode(data, self._errors, False)
                self._pending = data[num_used:]
            texts.append(piece)
        return self._stripped("".join(texts))

    def finish(self) -> str:
        text, _ = codecs.utf_8_decode(self._pending, self._errors, True)
        self._pending = b""
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text


class WindowDetokenizer:
    """Detokenizer for any decoder: decodes a short window of tokens and sends what is new at its end.

    The window holds the tokens of the last piece as context and those not sent yet; text that ends in U+FFFD waits for
    up to 4 more tokens. Exact for decoders that look at one neighbour (WordPiece, Metaspace). Two library calls per
    token. Source: the prefix and read offsets of Hugging Face's text-generation-inference.
    """

    __slots__ = ("_ids", "_num_context", "_sent", "_skip", "_spaces", "_tokenizer")

    _MAX_CONTEXT = 6  # tokens of the prompt
    _MAX_WAITING = 5  # tokens: an unfinished character has at most 3 bytes, and then comes its last one

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        context: list[int] = []
        for token_id in reversed(prompt_ids):
            if not self._is_silent(token_id):
                context.append(token_id)
            if len(context) == self._MAX_CONTEXT:
                break
        self._ids = context[::-1]
        self._num_context = len(context)
        self._sent = self._decode().rstrip("\ufffd")  # an unfinished character may still be completed

    def feed(self, token_ids: Sequence[int]) -> str:
        return "".join([self._next(token_id) for token_id in token_ids])

    def finish(self) -> str:
        return self._decode()[len(self._sent) :]

    def _next(self, token_id: int) -> str:
        if self._is_silent(token_id):
            return ""
        added = None if self._spaces else self._tokenizer.added_token(token_id)
        if added is not None:
            text = self.finish() + added
            self._ids, self._num_context, self._sent = [], 0, ""
            return text
        self._ids.append(token_id)
        text = self._decode()
        num_waiting = len(self._ids) - self._num_context
        if (text.endswith("\ufffd") or len(text) <= len(self._sent)) and num_waiting < self._MAX_WAITING:
            return ""
        piece = text[len(self._sent) :]
        self._ids = self._ids[self._num_context :]
        self._num_context = num_waiting
        self._sent = self._decode()
        return piece

    def _is_silent(self, token_id: int) -> bool:
        return (self._skip and self._tokenizer.is_special(token_id)) or self._tokenizer.id_to_token(token_id) is None

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=False)


@dataclass(frozen=True, slots=True)
class StopMatch:
    """Where a sequence ended: at `stop`, complete with the `num_tokens`-th token of the output.

    `num_text_tokens`: how many of those tokens have a share in the returned text (less than `num_tokens` when the
    stop string is left out and took whole tokens). Later tokens do not belong to the sequence.
    """

    stop: str
    num_tokens: int
    num_text_tokens: int


class StopMatcher:
    """Finds stop strings in a text that comes in pieces, also across their borders.

    The rule, the same for every way to cut the text into pieces: reading character by character, the first stop string
    to be complete wins; of two that end at the same character, the first in the list (vLLM's order). A stop string
    counts only if the token that completes it is not among the first `min_tokens` ones. What is returned is a prefix
    of the final text at every moment: the longest end that could begin a stop string is held back.
    """

    __slots__ = ("_firsts", "_held", "_include", "_min_tokens", "_starts", "_stops", "match", "num_tokens")

    def __init__(self, stop: Sequence[str], include_stop_str_in_output: bool = False, min_tokens: int = 0) -> None:
        self._stops = tuple(stop)
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._firsts = re.compile("[" + re.escape("".join({s[0] for s in stop})) + "]") if stop else None
        self._held = ""
        self._starts: list[int] = []  # of the tokens since the held text began: where their text starts in it
        self.num_tokens = 0
        self.match: StopMatch | None = None

    def feed(self, text: str) -> str:
        """Add the text of one token (perhaps ""); returns what may go out. After a match returns ""."""
        if self.match is not None:
            return ""
        self.num_tokens += 1
        if self._firsts is None:
            return text
        if text and not self._held and self._firsts.search(text) is None:
            self._starts.clear()
            return text  # the usual case: nothing begins a stop string
        self._starts.append(len(self._held))
        return self._advance(text)

    def finish(self, text: str = "") -> str:
        """Add text that belongs to the last token (a flushed character); returns all that was held back."""
        if self.match is not None:
            return ""
        if self._firsts is None:
            return text
        out = self._advance(text)
        if self.match is None:
            out, self._held = out + self._held, ""
        return out

    def _advance(self, text: str) -> str:
        assert self._firsts is not None
        buffer = self._held + text
        if self.num_tokens > self._min_tokens:
            num_searched = len(self._held)
            found, end = None, len(buffer) + 1
            for stop in self._stops:
                start = buffer.find(stop, max(0, num_searched - len(stop) + 1), end - 1)
                if start >= 0:
                    found, end = stop, start + len(stop)
            if found is not None:
                cut = end if self._include else end - len(found)
                num_after = sum(start >= cut for start in self._starts)
                self.match = StopMatch(found, self.num_tokens, self.num_tokens - num_after)
                self._held = ""
                return buffer[:cut]
        keep = self._held_from(buffer)
        self._held = buffer[keep:]
        self._starts = [start - keep for start in self._starts if start >= keep]
        return buffer[:keep]

    def _held_from(self, buffer: str) -> int:
        """Start of the longest end of `buffer` that is a proper prefix of a stop string."""
        assert self._firsts is not None
        for hit in self._firsts.finditer(buffer):
            start = hit.start()
            length = len(buffer) - start
            if any(length < len(stop) and buffer.endswith(stop[:length]) for stop in self._stops):
                return start
        return len(buffer)


class OutputText:
    """The text of one sequence: detokeniser, stop strings and `SamplingParams` together.

    `feed` every batch of tokens but the last, `close` with the last. Both return what may be sent now; the strings
    returned concatenate to `text`, whatever the batches. When `match` is set the sequence is over: tell the engine
    (if it does not know yet) and send nothing more. With `detokenize=False` every text is "".
    """

    __slots__ = ("_detokenizer", "_include", "_matcher", "_texts")

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        self._detokenizer: Detokenizer | None = None
        if params.detokenize:
            self._detokenizer = detokenizer(
                tokenizer, prompt_ids, params.skip_special_tokens, params.spaces_between_special_tokens
            )
        self._include = params.include_stop_str_in_output
        self._matcher = StopMatcher(params.stop, self._include, params.min_tokens) if params.stop else None
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return "".join(self._texts)

    @property
    def match(self) -> StopMatch | None:
        """The stop string that ended the sequence, if one did."""
        return self._matcher.match if self._matcher is not None else None

    def feed(self, token_ids: Sequence[int]) -> str:
        """New tokens in, text that may go out now."""
        if self._detokenizer is None:
            return ""
        if self._matcher is None:
            out = self._detokenizer.feed(token_ids)
        else:  # token by token, so that the match knows which token completed it
            out = "".join([self._matcher.feed(self._detokenizer.feed((token_id,))) for token_id in token_ids])
        if out:
            self._texts.append(out)
        return out

    def close(self, token_ids: Sequence[int], finish_reason: str) -> str:
        """The last tokens (perhaps none) in, the rest of the text out.

        `finish_reason` "stop" says that the last token is a stop token (EOS or one of stop_token_ids): it gives no
        text unless include_stop_str_in_output asks for it.
        """
        if self._detokenizer is None:
            return ""
        if finish_reason == FINISH_STOP and not self._include:
            token_ids = token_ids[:-1]
        out = self.feed(token_ids)
        rest = self._detokenizer.finish()
        if self._matcher is not None:
            rest = self._matcher.finish(rest)
        if rest:
            self._texts.append(rest)
        return out + rest
