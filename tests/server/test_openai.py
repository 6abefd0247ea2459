"""Both completion endpoints over real sockets: the official client, exact shapes, streams, echo, log probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from tests.server.harness import RunningServer, assert_error
from tests.server.scripted_engine import token_at
from tests.server.tiny_model import MODEL, tiny_tokenizer

from penstock.core.request import SamplingParams, child_seed
from penstock.engine.messages import AddRequest, CancelRequest, Failed

TOKENIZER = tiny_tokenizer()
MESSAGES: list[Any] = [{"role": "user", "content": "Hello there"}]
RENDERED = "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
WITH_TOOL = "<|im_start|>user\nHello there<|im_end|>\n1 tools\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with RunningServer() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


def parrot(text: str, num_tokens: int) -> str:
    """What the scripted engine answers with temperature 0, special tokens left out."""
    ids = TOKENIZER.encode(text)
    return TOKENIZER.decode([ids[i % len(ids)] for i in range(num_tokens)])


def events(body: str) -> list[Any]:
    """The data of a stream's events; asserts the form."""
    assert body.endswith("data: [DONE]\n\n")
    blocks = body.removesuffix("data: [DONE]\n\n").split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") for block in blocks)
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


# ---- chat ----


def test_chat_answers_in_one_piece(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12)
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model, len(answer.choices)) == ("chat.completion", MODEL, 1)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", parrot(RENDERED, 12))
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    assert answer.usage is not None
    num_prompt = len(TOKENIZER.encode(RENDERED))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, 12)
    assert answer.usage.total_tokens == num_prompt + 12
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_chat_streams_what_it_would_have_answered(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    *body, last = chunks
    assert (body[0].choices[0].delta.role, body[0].choices[0].delta.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in body[1:])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in body if chunk.choices[0].finish_reason] == ["length"]
    assert body[-1].choices[0].finish_reason == "length"
    assert (last.choices, last.usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in body)


def test_stream_bytes_have_the_exact_shape(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 4, "stream": True}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    first, *middle, last = events(response.text)
    assert set(first) == {"id", "object", "created", "model", "choices"}, "no usage unless asked for"
    nothing = {"logprobs": None, "finish_reason": None}
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, **nothing}]
    for chunk in middle:
        assert set(chunk) == set(first)
        assert chunk["choices"] == [
            {"index": 0, "delta": {"content": chunk["choices"][0]["delta"]["content"]}, **nothing}
        ]
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    assert last["choices"] == [end]


def test_running_usage_counts_up(server: RunningServer) -> None:
    body = {
        "messages": MESSAGES, "max_tokens": 6, "stream": True, "seed": 2,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    chunks = events(server.http.post("/v1/chat/completions", json=body).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert all(chunk["usage"]["prompt_tokens"] == len(TOKENIZER.encode(RENDERED)) for chunk in chunks)


def test_several_samples_are_several_choices(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=4, seed=7, max_tokens=10)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice in answer.choices:
        asked = AddRequest("", [1], SamplingParams(), child_seed(7, choice.index), 0.0)
        assert choice.message.content == TOKENIZER.decode([token_at(asked, i) for i in range(10)])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 40
    streamed = ["", "", "", ""]
    for chunk in client.chat.completions.create(
        model=MODEL, messages=MESSAGES, n=4, seed=7, max_tokens=10, stream=True
    ):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [choice.message.content for choice in answer.choices]


def test_equal_seeds_give_equal_answers(client: openai.OpenAI) -> None:
    def ask(seed: int | None) -> str | None:
        answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, seed=seed, max_tokens=10)
        return answer.choices[0].message.content

    assert ask(3) == ask(3) != ask(4)
    assert ask(None) != ask(None)


def test_stop_strings_end_the_answer_and_the_engine_request(client: openai.OpenAI, server: RunningServer) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, temperature=0, max_tokens=500, stop=["the"], stream=False
    )
    assert answer.choices[0].message.content == "user\nHello "
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra == {"stop_reason": "the"}
    cancel = server.engine.heard[-1]
    assert cancel == CancelRequest(answer.id.removeprefix("chatcmpl-"), "stop", "the")
    server.until(lambda: not server.engine.requests)


def test_chat_log_probabilities(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "seed": 5,
        "max_tokens": 7,
        "logprobs": True,
        "top_logprobs": 2,
    }
    answer = client.chat.completions.create(**asked)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 7
    data = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content
    for entry in logprobs.content:
        assert [top.logprob for top in entry.top_logprobs] == [-0.25, -0.5]
        assert entry.token == bytes(entry.bytes or []).decode("utf-8", "replace")
        assert entry.top_logprobs[0].token == entry.token
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == logprobs.content
    plain = client.chat.completions.create(**{**asked, "top_logprobs": None})
    assert plain.choices[0].logprobs is not None
    assert [entry.top_logprobs for entry in plain.choices[0].logprobs.content or []] == [[]] * 7


def test_vllms_extras_of_chat(server: RunningServer) -> None:
    body = {
        "messages": MESSAGES, "temperature": 0, "max_tokens": 3, "return_token_ids": True, "prompt_logprobs": 1,
        "logprobs": True, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    answer = server.http.post("/v1/chat/completions", json=body).json()
    ids = TOKENIZER.encode(RENDERED)
    assert answer["prompt_token_ids"] == ids
    assert answer["choices"][0]["token_ids"] == ids[:3]
    assert [entry["token"] for entry in answer["choices"][0]["logprobs"]["content"]] == [
        f"token_id:{i}" for i in ids[:3]
    ]
    assert len(answer["prompt_logprobs"]) == len(ids)
    assert answer["prompt_logprobs"][0] is None
    second = answer["prompt_logprobs"][1]
    assert next(iter(second)) == str(ids[1])
    assert second[str(ids[1])] == {"logprob": -0.25, "rank": 1, "decoded_token": TOKENIZER.token_text(ids[1])}
    chunks = events(server.http.post("/v1/chat/completions", json={**body, "stream": True}).text)
    assert chunks[0]["prompt_token_ids"] == ids
    assert chunks[0]["prompt_logprobs"] == answer["prompt_logprobs"]
    streamed = [token_id for chunk in chunks for token_id in chunk["choices"][0].get("token_ids", [])]
    assert streamed == ids[:3]


@pytest.mark.parametrize(
    ("fields", "rendered"),
    [
        ({"add_generation_prompt": False}, "<|im_start|>user\nHello there<|im_end|>\n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, WITH_TOOL),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, RENDERED),
        ({"chat_template": "{{ messages[0].content }}!{{ x }}", "chat_template_kwargs": {"x": 5}}, "Hello there!5"),
        ({"reasoning_effort": "low", "chat_template": "{{ reasoning_effort }}"}, "low"),
        ({"documents": [{"title": "t"}], "chat_template": "{{ documents[0].title }}"}, "t"),
        (
            {
                "messages": [*MESSAGES, {"role": "assistant", "content": "Well"}],
                "add_generation_prompt": False,
                "continue_final_message": True,
            },
            "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\nWell",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello there"}]}]}, RENDERED),
    ],
)  # fmt: skip
def test_the_template_sees_what_the_request_says(server: RunningServer, fields: dict[str, Any], rendered: str) -> None:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 1, **fields}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    added = [message for message in server.engine.heard if isinstance(message, AddRequest)][-1]
    assert TOKENIZER.decode(added.token_ids, skip_special_tokens=False) == rendered


def test_echo_repeats_a_message_that_is_continued(server: RunningServer) -> None:
    body = {
        "messages": [*MESSAGES, {"role": "assistant", "content": "Well"}], "add_generation_prompt": False,
        "continue_final_message": True, "echo": True, "temperature": 0, "max_tokens": 2,
    }  # fmt: skip
    answer = server.http.post("/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"].startswith("Well")
    chunks = events(server.http.post("/v1/chat/completions", json={**body, "stream": True}).text)
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == answer["choices"][0]["message"]["content"]


def test_the_models_own_sampling_defaults_apply() -> None:
    with RunningServer(default_sampling={"temperature": 0.0, "max_new_tokens": 3}) as server:
        answer = server.http.post("/v1/chat/completions", json={"messages": MESSAGES}).json()
        assert answer["choices"][0]["message"]["content"] == parrot(RENDERED, 3)
        body = {"messages": MESSAGES, "temperature": 1, "seed": 1, "max_tokens": 4}
        assert server.http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 4


# ---- completions ----


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("Once upon", ["Once upon"]),
        (["Once upon", "a time"], ["Once upon", "a time"]),
        (TOKENIZER.encode("Once upon"), ["Once upon"]),
        ([TOKENIZER.encode("Once upon"), TOKENIZER.encode("a time")], ["Once upon", "a time"]),
    ],
)
@pytest.mark.parametrize("echo", [False, True])
def test_completions_take_four_kinds_of_prompts(
    client: openai.OpenAI, prompt: Any, texts: list[str], echo: bool
) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 6, "n": 2, "echo": echo,
    }  # fmt: skip
    answer = client.completions.create(**asked)
    wanted = [(text if echo else "") + parrot(text, 6) for text in texts for _ in range(2)]
    assert answer.id.startswith("cmpl-")
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == list(range(2 * len(texts)))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(TOKENIZER.encode(text)) for text in texts)
    assert answer.usage.completion_tokens == 12 * len(texts)
    streamed = [""] * len(wanted)
    finished = 0
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            finished += choice.finish_reason == "length"
        if not chunk.choices:
            assert chunk.usage == answer.usage
    assert streamed == wanted
    assert finished == len(wanted)


def test_completion_log_probabilities_with_echo(client: openai.OpenAI) -> None:
    text = "Once upon a time"
    ids = TOKENIZER.encode(text)
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": text, "temperature": 0, "max_tokens": 3, "echo": True, "logprobs": 2,
    }  # fmt: skip
    answer = client.completions.create(**asked)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    all_ids = [*ids, *ids[:3]]
    assert logprobs.tokens == [TOKENIZER.token_text(token_id) for token_id in all_ids]
    assert logprobs.token_logprobs == [None, *[-0.25] * (len(all_ids) - 1)]
    assert logprobs.text_offset is not None
    for offset, token in zip(logprobs.text_offset, logprobs.tokens or [], strict=True):
        assert answer.choices[0].text[offset:].startswith(token)
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0] is None
    assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
    pieces: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": []}
    for chunk in client.completions.create(**asked, stream=True):
        if chunk.choices[0].logprobs is not None:
            for name, got in pieces.items():
                got += getattr(chunk.choices[0].logprobs, name)
    assert pieces == {name: getattr(logprobs, name) for name in pieces}


def test_a_prompt_can_be_scored_without_output(server: RunningServer) -> None:
    """What evaluation harnesses send: echo, logprobs, max_tokens 0."""
    body = {"prompt": "Once upon", "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    answer = server.http.post("/v1/completions", json=body).json()
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("Once upon", "length")
    assert choice["logprobs"]["tokens"] == [TOKENIZER.token_text(i) for i in TOKENIZER.encode("Once upon")]
    assert answer["usage"]["completion_tokens"] == 0
    chunks = events(server.http.post("/v1/completions", json={**body, "stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Once upon"


def test_vllms_extras_of_completions(server: RunningServer) -> None:
    ids = TOKENIZER.encode("Once upon")
    body = {"prompt": "Once upon", "max_tokens": 2, "temperature": 0, "return_token_ids": True, "prompt_logprobs": 0}
    answer = server.http.post("/v1/completions", json=body).json()
    choice = answer["choices"][0]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, ids[:2])
    assert [list(entry or {}) for entry in choice["prompt_logprobs"]] == [[], *[[str(i)] for i in ids[1:]]]
    chunks = events(server.http.post("/v1/completions", json={**body, "stream": True}).text)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == ids
    assert chunks[0]["choices"][0]["prompt_logprobs"] == choice["prompt_logprobs"]
    assert [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])] == ids[:2]


def test_parameters_reach_the_engine(server: RunningServer) -> None:
    body = {
        "prompt": "Once", "max_tokens": 1, "priority": -3, "cache_salt": "pepper", "seed": 2**63, "top_k": 5,
        "min_p": 0.1, "stop_token_ids": [7], "logit_bias": {"5": -2}, "allowed_token_ids": [5, 6],
        "bad_words": ["upon"], "repetition_penalty": 1.5, "ignore_eos": True, "vllm_xargs": {"a": 1},
        "request_id": "mine",
    }  # fmt: skip
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["id"] == "cmpl-mine"
    added = [message for message in server.engine.heard if isinstance(message, AddRequest)][-1]
    assert (added.request_id, added.priority, added.salt, added.seed) == ("mine", -3, "pepper", 2**63)
    params = added.params
    assert (params.min_p, params.top_k, params.stop_token_ids, params.logit_bias) == (0.1, 5, (7,), {5: -2.0})
    assert (params.allowed_token_ids, params.ignore_eos, params.extra_args) == ((5, 6), True, {"a": 1})
    assert params.bad_words_ids == TOKENIZER.encode_bad_words(["upon"])
    assert added.end_ids == TOKENIZER.eos_ids


# ---- explain, ids, warnings ----


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stop", [None, "e"])
def test_a_request_may_ask_where_its_time_went(server: RunningServer, path: str, stop: str | None) -> None:
    """Also when a stop string ended it, and the engine's record comes after the last token."""
    body: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "explain": True, "stop": stop}
    body |= {"prompt": "Once upon"} if path == "/v1/completions" else {"messages": MESSAGES}
    answer = server.http.post(path, json=body, headers={"x-request-id": f"why-{path[4:8]}-{stop}"})
    told = answer.json()["explain"]
    assert told["request_id"] == answer.headers["x-request-id"]
    assert told["finish_reason"] == ("length" if stop is None else "stop")
    assert [span["kind"] for span in told["spans"]] == ["queue", "decode"]
    assert told["prefix"]["miss"] == {"reason": "first_seen", "at_token": 3, "detail": "nobody has sent this before"}
    assert server.http.get(f"/explain/{told['request_id']}").json()["spans"] == told["spans"]
    chunks = events(server.http.post(path, json={**body, "stream": True}).text)
    assert [set(chunk["explain"]) for chunk in chunks if "explain" in chunk] == [set(told)]
    assert "explain" in chunks[-1]
    assert chunks[-1]["choices"][0]["finish_reason"] == told["finish_reason"]


def test_ids_in_flight_get_a_suffix(server: RunningServer) -> None:
    body = {"prompt": "Once", "max_tokens": 100, "ignore_eos": True, "n": 2}

    def ask(_: int) -> str:
        return str(
            server.http.post("/v1/completions", json=body, headers={"x-request-id": "same"}).headers["x-request-id"]
        )

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(ask, range(4))) == ["same", "same-1", "same-2", "same-3"]
    assert ask(0) == "same"


def test_a_senseless_request_id_is_replaced(server: RunningServer) -> None:
    for sent in ("a b", "x" * 500, "<script>"):
        got = server.http.get("/version", headers={"x-request-id": sent}).headers["x-request-id"]
        assert got != sent
        assert len(got) == 32
    body = {"prompt": "Once", "max_tokens": 1, "request_id": "a b"}
    assert_error(server.http.post("/v1/completions", json=body), 400, param="request_id")


def test_warnings_are_a_header(server: RunningServer) -> None:
    body = {"prompt": "Once", "max_tokens": 5000, "temperature": 0, "stop": ["O"], "wizardry": 1}
    warning = server.http.post("/v1/completions", json=body).headers["x-penstock-warning"]
    assert warning.startswith("ignored fields: wizardry; max_tokens lowered to 10")
    body["stream"] = True
    assert server.http.post("/v1/completions", json=body).headers["x-penstock-warning"] == warning
    quiet = server.http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 1})
    assert "x-penstock-warning" not in quiet.headers


# ---- failures ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_engine_refuses_has_its_status(server: RunningServer, stream: bool) -> None:
    """Nothing was sent yet, so a stream fails with a status, too."""
    server.engine.fail_next = (400, "the prompt is too strange")
    body = {"prompt": "Once", "stream": stream, "max_tokens": 3}
    assert "too strange" in assert_error(server.http.post("/v1/completions", json=body), 400)
    assert server.http.post("/v1/completions", json=body).status_code == 200


def test_a_stream_that_fails_in_the_middle_says_so(server: RunningServer) -> None:
    server.engine.holds = False
    body = {"prompt": "Once", "stream": True, "max_tokens": 900, "ignore_eos": True, "request_id": "doomed"}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        next(lines)
        server.on_loop(
            lambda: server.state._deliver(server.state.front.handle(Failed("doomed", 500, "the step broke"), 0.0))
        )
        rest = [line for line in lines if line]
    error = json.loads(rest[-2].removeprefix("data: "))["error"]
    assert error == {"message": "the step broke", "type": "server_error", "param": None, "code": "engine_error"}
    assert rest[-1] == "data: [DONE]"
    server.until(lambda: not server.engine.requests)


def test_one_bad_prompt_of_several_stops_the_call(server: RunningServer) -> None:
    response = server.http.post("/v1/completions", json={"prompt": ["fine", "", "fine"], "max_tokens": 500})
    assert "prompt[1]" in assert_error(response, 400, param="prompt")
    server.until(lambda: not server.engine.requests)
    assert server.http.get("/load").json() == {"server_load": 0}
