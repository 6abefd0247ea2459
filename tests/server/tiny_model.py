"""A model to serve without weights: a small tokenizer with a chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.shared.tiny_tokenizers import byte_level

from penstock.engine.tokenizer import Tokenizer
from penstock.server.chat import ChatRenderer
from penstock.server.state import Served

MODEL = "tiny"
VOCAB_SIZE = 400
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools\n{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE of about 400 tokens, made here; id 0 is <|endoftext|>."""
    special_tokens = {"eos_token": "<|endoftext|>"}
    return Tokenizer(byte_level(), special_tokens=special_tokens, chat_templates={"default": TEMPLATE})


def tiny_served(**changes: Any) -> Served:
    """A model to serve, with its template worker."""
    tokenizer = tiny_tokenizer()
    chat = ChatRenderer(tokenizer.chat_templates, tokenizer.special_tokens, trust_request_chat_template=True)
    return replace(Served((MODEL, "alias"), "/models/tiny", tokenizer, chat, VOCAB_SIZE), **changes)
