from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.training.conftest import made_up_stories
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from penstock.training.tokenizer import CONTROL_TOKENS, MARK_TOKENS, ChatRenderer, train_tokenizer, write_tokenizer

TINY: Tokenizer = train_tokenizer(made_up_stories(), 384)

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "look_up", "description": "Finds <é> & more.", "parameters": {"type": "object"}},
}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"what": "é <x>", "n": [1, None, True]}}}
CALL_TEXT = {"type": "function", "function": {"name": "look_up", "arguments": '{"what": 1}'}}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi\n"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "?"}],
    [
        {"role": "user", "content": "Find it"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL_TEXT]},
        {"role": "tool", "content": "one"},
        {"role": "tool", "content": "two"},
        {"role": "assistant", "content": "Found.", "tool_calls": [CALL]},
        {"role": "tool", "content": "three"},
        {"role": "assistant", "content": "Done."},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]}],
]


def test_vocabulary_has_the_size_and_the_reserved_tokens_come_first() -> None:
    assert TINY.get_vocab_size() == 384
    assert [TINY.id_to_token(n) for n in range(15)] == [*CONTROL_TOKENS, *MARK_TOKENS]


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        train_tokenizer(["too little"], 8192)


@given(st.text())
def test_every_string_survives(text: str) -> None:
    assert TINY.decode(TINY.encode(text).ids, skip_special_tokens=False) == text


def test_marks_stay_visible_where_control_tokens_are_skipped() -> None:
    ids = TINY.encode("<tool_call>{}</tool_call><think>a</think><|im_end|><|endoftext|>").ids
    assert len(ids) == 9
    assert TINY.decode(ids, skip_special_tokens=True) == "<tool_call>{}</tool_call><think>a</think>"


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_template_renders_as_in_transformers(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tmp_path: Path
) -> None:
    write_tokenizer(TINY, tmp_path, 256)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = ChatRenderer()
    assert ours.render(messages, tools) == theirs.apply_chat_template(messages, tools=tools, tokenize=False)
    text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    assert ours.prompt(messages, tools) == text == ours.render(messages, tools) + "<|im_start|>assistant\n"
    assert theirs.encode(text) == TINY.encode(text).ids
    assert theirs.eos_token == "<|im_end|>"


def test_rendered_form() -> None:
    assert ChatRenderer().prompt([{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )
    rendered = ChatRenderer().render(CONVERSATIONS[3], [TOOL])
    assert '\n<tool_call>\n{"name": "look_up", "arguments": {"what": 1}}\n</tool_call><|im_end|>' in rendered
    assert "<tool_response>\none\n</tool_response>\n<tool_response>\ntwo\n</tool_response><|im_end|>" in rendered
    assert rendered.startswith("<|im_start|>system\n# Tools")
