"""Parts of OpenAI's and vLLM's JSON: log probabilities and counts. Pure functions of what is given.

Knows the text of tokens. Does not know HTTP, streams, engines or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.plan import Logprobs
from penstock.engine.client import LiveRequest
from penstock.engine.tokenizer import Tokenizer

Json = dict[str, Any]

LOWEST = -9999.0  # JSON has no minus infinity


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written in log probabilities: their text, or "token_id:7" if the request wants that."""

    tokenizer: Tokenizer
    as_ids: bool = False

    def name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self.as_ids else self.tokenizer.token_text(token_id)

    def entry(self, token_id: int, logprob: float) -> Json:
        """Chat's form; `bytes` are the token's own, also where they are part of a character."""
        return {
            "token": self.name(token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": list(self.tokenizer.token_bytes(token_id)),
        }


def chat_logprobs(names: TokenNames, positions: Sequence[Logprobs], num_top: int) -> Json:
    """`choices[].logprobs` of a chat answer; with the `num_top` best tokens per position."""
    content = []
    for position in positions:
        pairs = list(zip(position.token_ids, position.logprobs, strict=True))
        own = names.entry(*pairs[0])
        own["top_logprobs"] = [names.entry(*pair) for pair in pairs[1 : 1 + num_top]]
        content.append(own)
    return {"content": content, "refusal": None}


def completion_logprobs(
    names: TokenNames, positions: Sequence[Logprobs | None], token_ids: Sequence[int], num_top: int, offset: int
) -> tuple[Json, int]:
    """`choices[].logprobs` of a completion, and the text offset behind it. The first prompt token has no logprob."""
    shape: Json = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token_id, position in zip(token_ids, positions, strict=True):
        name = names.name(token_id)
        shape["text_offset"].append(offset)
        shape["tokens"].append(name)
        offset += len(name)
        if position is None:
            shape["token_logprobs"].append(None)
            shape["top_logprobs"].append(None)
            continue
        shape["token_logprobs"].append(max(position.logprobs[0], LOWEST))
        top: dict[str, float] = {}
        for other, logprob in zip(position.token_ids[1 : 1 + num_top], position.logprobs[1 : 1 + num_top], strict=True):
            top.setdefault(names.name(other), max(logprob, LOWEST))
        top.setdefault(name, max(position.logprobs[0], LOWEST))
        shape["top_logprobs"].append(top)
    return shape, offset


def prompt_logprobs(names: TokenNames, positions: Sequence[Logprobs | None]) -> list[Json | None]:
    """vLLM's form: per prompt token null or {token id: {logprob, rank, decoded_token}}, its own token first."""
    shape: list[Json | None] = []
    for position in positions:
        if position is None:
            shape.append(None)
            continue
        entry: Json = {}
        ranks = [position.rank, *range(1, len(position.token_ids))]
        for token_id, logprob, rank in zip(position.token_ids, position.logprobs, ranks, strict=True):
            decoded = names.tokenizer.token_text(token_id)
            entry.setdefault(str(token_id), {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": decoded})
        shape.append(entry)
    return shape


def usage(requests: Sequence[LiveRequest], num_hidden: int = 0) -> Json:
    """Counts over all prompts of a call. `num_hidden` sampled tokens are not shown (echo with max_tokens 0)."""
    num_prompt = sum(len(request.token_ids) for request in requests)
    num_generated = sum(request.num_generated for request in requests) - num_hidden
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": sum(request.num_cached for request in requests)},
    }
