"""A request's prompt as its router sees it: token ids where it can tokenise, else the text in pieces of four bytes.

The second is a guess that serves the same purpose: prompts that begin alike give numbers that begin alike, about as
many as there are tokens. Knows request bodies; whether they are right is the engine's to say, so nothing here fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from penstock.engine.tokenizer import TokenizerError
from penstock.server.chat import ChatError, Conversation
from penstock.server.state import Served

BYTES_PER_PIECE = 4  # of text, which is about a token of English
MAX_CHARS = 4_000_000  # of a text that is tokenised; a longer one is cut into pieces
LONG_CHARS = 4096  # texts above it are tokenised in a thread
_encode = msgspec.json.Encoder().encode


class Prompts:
    """`served`: the engines' model, None: there are only texts."""

    def __init__(self, served: Served | None) -> None:
        self._served = served

    async def token_ids(self, body: Mapping[str, Any]) -> list[int]:
        """What stands for the prompt. Of several prompts the first."""
        prompt = body.get("prompt")
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            prompt = prompt[0]
        if isinstance(prompt, list) and all(type(item) is int and 0 <= item < 2**32 for item in prompt):
            return prompt
        if self._served is not None:
            try:
                if isinstance(prompt, str):
                    return await self._tokenised(prompt, body.get("add_special_tokens") is not False)
                if isinstance(body.get("messages"), list):
                    text = await self._served.chat.render(conversation(body))
                    return await self._tokenised(text, bool(body.get("add_special_tokens")))
            except (ChatError, TokenizerError, TypeError, ValueError):
                pass  # its engine will say what is wrong
        return pieces(prompt if isinstance(prompt, str) else _text_of(body))

    async def _tokenised(self, text: str, adds: bool) -> list[int]:
        assert self._served is not None
        if len(text) > MAX_CHARS:
            return pieces(text)
        tokenizer = self._served.tokenizer
        if len(text) <= LONG_CHARS:
            return tokenizer.encode(text, adds)
        return await asyncio.to_thread(tokenizer.encode, text, adds)

    def close(self) -> None:
        """End the template workers."""
        if self._served is not None:
            self._served.chat.close()


def conversation(body: Mapping[str, Any]) -> Conversation:
    """As the chat endpoint makes it of a checked request."""
    options = dict(body.get("chat_template_kwargs") or {})
    if body.get("reasoning_effort") is not None:
        options.setdefault("reasoning_effort", body["reasoning_effort"])
    return Conversation(
        body["messages"],
        tools=None if body.get("tool_choice") == "none" else body.get("tools"),
        documents=body.get("documents"),
        add_generation_prompt=body.get("add_generation_prompt", True),
        continue_final_message=body.get("continue_final_message", False),
        chat_template=body.get("chat_template"),
        chat_template_kwargs=options,
    )


def pieces(text: str) -> list[int]:
    """Four bytes each, as numbers."""
    data = text.encode("utf-8", "replace")
    found: list[int] = np.frombuffer(data + bytes(-len(data) % BYTES_PER_PIECE), "<u4").tolist()
    return found


def _text_of(body: Mapping[str, Any]) -> str:
    """A chat as a text that grows at its end as the conversation does."""
    messages = body.get("messages")
    parts = [_encode(body.get("tools"))] if body.get("tools") else []
    parts += [_encode(message) for message in messages] if isinstance(messages, list) else [_encode(messages)]
    return b"\n".join(parts).decode("utf-8", "replace")
