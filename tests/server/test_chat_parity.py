from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.shared.checkpoints import qwen_directory, template_references, templates

from penstock.engine.tokenizer import load_tokenizer
from penstock.server.chat import ChatRenderer, Conversation, TemplateError

USER = {"role": "user", "content": "Hello"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather in "a place" <now>, l\'été',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "город"},
                    "days": {"type": "integer", "description": "n"},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call12345",
            "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "北京", "days": 2}},
        }
    ],
}
RESULT = {"role": "tool", "name": "get_weather", "tool_call_id": "call12345", "content": '{"sky": "clear <b>"}'}
SYSTEM = {"role": "system", "content": "You are  terse.\n"}
ASKS = {"role": "user", "content": " What's the weather in 北京? <|im_end|> {{ x }} "}
SAYS = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is\nclear. "}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, ASKS],
    "turns": [ASKS, SAYS, USER, SAYS, ASKS],
    "system and turns": [SYSTEM, USER, SAYS, ASKS],
    "ends with assistant": [USER, SAYS],
    "reasoning": [USER, {"role": "assistant", "content": "Clear.", "reasoning_content": "Look up."}, ASKS],
    "tool round": [SYSTEM, ASKS, CALL, RESULT],
    "tool round and answer": [ASKS, CALL, RESULT, SAYS, USER],
}
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
FIXED = {"date_string": "26 Jul 2024"}  # else Llama 3's templates write today's date


@pytest.mark.shared
def test_same_as_transformers(shared_dir: Path) -> None:
    """Every shared template on every conversation, with and without tools: byte for byte, or both refuse alike."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    found = templates(shared_dir)
    assert len([name for name in found if name.startswith("chat_templates/")]) == 12
    num_equal: dict[str, int] = {}
    for name, template in found.items():
        ours = ChatRenderer({"default": template}, SPECIALS)
        try:
            for label, messages in CONVERSATIONS.items():
                for tools in (None, TOOLS):
                    for add_generation_prompt in (True, False):
                        fields: dict[str, Any] = {"tools": tools, "add_generation_prompt": add_generation_prompt}
                        conversation = Conversation(messages, **fields, chat_template_kwargs=FIXED)
                        try:
                            (expected,), _ = render_jinja_template(
                                [messages], chat_template=template, **fields, **SPECIALS, **FIXED
                            )
                        except (jinja2.TemplateError, TypeError) as error:
                            with pytest.raises(TemplateError, match=re.escape(str(error))):
                                ours.render_sync(conversation)
                            continue
                        assert ours.render_sync(conversation) == expected, (name, label)
                        num_equal[name] = num_equal.get(name, 0) + 1
        finally:
            ours.close()
    assert {name: num_equal.get(name, 0) for name in found if num_equal.get(name, 0) < 8} == {}


@pytest.mark.shared
def test_continued_as_in_transformers(shared_dir: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [USER, {"role": "assistant", "content": "Once upon a time, "}]
    for name, template in templates(shared_dir).items():
        ours = ChatRenderer({"default": template}, SPECIALS)
        fields: dict[str, Any] = {"tools": TOOLS, "continue_final_message": True}  # Command R needs tools
        try:
            (expected,), _ = render_jinja_template([messages], chat_template=template, **fields, **SPECIALS, **FIXED)
            conversation = Conversation(messages, add_generation_prompt=False, chat_template_kwargs=FIXED, **fields)
            assert ours.render_sync(conversation) == expected, name
        finally:
            ours.close()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3-30b-a3b", "qwen3-coder"])
def test_ids_as_in_transformers(shared_dir: Path, tmp_path: Path, name: str) -> None:
    """Directory -> template -> ids: the whole way equals apply_chat_template."""
    from transformers import AutoTokenizer

    directory = qwen_directory(shared_dir, name, tmp_path)
    tokenizer, theirs = load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)
    ours = ChatRenderer(tokenizer.chat_templates, tokenizer.special_tokens)
    try:
        for messages in CONVERSATIONS.values():
            for tools in (None, TOOLS):
                expected = theirs.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
                )
                text = ours.render_sync(Conversation(messages, tools=tools))
                assert tokenizer.encode(text, add_special_tokens=False) == expected
    finally:
        ours.close()


# ---- token-id references of the Qwen family ----

STANDARD = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "My name is Qwen2."},
    {"role": "user", "content": "How old are you?"},
    {"role": "assistant", "content": "11 years old."},
]


def _read_back(text: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """(messages, tools) of a text in Qwen3's format: the inverse of its template."""
    messages: list[dict[str, Any]] = []
    tools = None
    for role, content in re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, re.DOTALL):
        if role == "system" and "\n\n# Tools\n\n" in content:
            content, _, described = content.partition("\n\n# Tools\n\n")
            inside = described.partition("<tools>\n")[2].partition("\n</tools>")[0]
            tools = [json.loads(line) for line in inside.split("\n")]
        message: dict[str, Any] = {"role": role, "content": content}
        if role == "user" and content.startswith("<tool_response>\n"):
            results = re.findall(r"<tool_response>\n(.*?)\n</tool_response>", content, re.DOTALL)
            messages += [{"role": "tool", "content": result} for result in results]
            continue
        if role == "assistant":
            if content.startswith("<think>\n"):
                reasoning, _, content = content.removeprefix("<think>\n").partition("\n</think>\n\n")
                message |= {"content": content, "reasoning_content": reasoning}
            calls = re.findall(r"\n?<tool_call>\n(.*?)\n</tool_call>", content, re.DOTALL)
            if calls:
                message["content"] = re.split(r"\n?<tool_call>", content)[0]
                message["tool_calls"] = [{"type": "function", "function": _call_read_back(call)} for call in calls]
        messages.append(message)
    return messages, tools


def _call_read_back(text: str) -> dict[str, Any]:
    """A tool call in Qwen3's JSON or in Qwen3-Coder's tags."""
    if not text.startswith("<function="):
        call: dict[str, Any] = json.loads(text)
        return call
    parameters = re.findall(r"<parameter=(.*?)>\n(.*?)\n</parameter>", text, re.DOTALL)
    return {"name": text.partition("=")[2].partition(">")[0], "arguments": dict(parameters)}


@pytest.mark.shared
def test_qwen_references(shared_dir: Path, tmp_path: Path) -> None:
    """The family's reference ids come out of messages, template and tokenizer.

    Not reproduced: `qwen3.5_*` (another vocabulary), and the references of DeepSeek-V3, Kimi, Ling and gpt-oss, whose
    vocabularies are not in the shared data. They are not Qwen's, so they cannot be read back either.
    """
    qwen3 = load_tokenizer(qwen_directory(shared_dir, "qwen3-30b-a3b", tmp_path / "qwen3"))
    coder = load_tokenizer(qwen_directory(shared_dir, "qwen3-coder", tmp_path / "qwen3-coder"))
    qwen25 = load_tokenizer(qwen_directory(shared_dir, "qwen2.5", tmp_path / "qwen2.5"))
    references = template_references(shared_dir)

    def ids(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
        renderer = ChatRenderer(tokenizer.chat_templates, tokenizer.special_tokens)
        try:
            text = renderer.render_sync(Conversation(messages, tools=tools, add_generation_prompt=False))
            return tokenizer.encode(text, add_special_tokens=False)
        finally:
            renderer.close()

    assert ids(qwen25, STANDARD) == references["qwen_standard"]
    for name in ("qwen3-instruct_standard", "qwen3-thinking_standard", "qwen3-next-thinking_standard"):
        assert ids(qwen3, STANDARD) == references[name]
    tested = []
    for name, expected in references.items():
        if name.startswith(("qwen3-", "qwen_", "repo-wiki")) and name != "qwen_standard":
            messages, tools = _read_back(qwen3.decode(expected, skip_special_tokens=False))
            assert ids(coder if name == "repo-wiki_standard" else qwen3, messages, tools) == expected, name
            tested.append(name)
    assert len(tested) == 11
