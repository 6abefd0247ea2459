"""The official client against a real server with the real engine on the built-in model.

Texts of the model are never compared with anything written down here, only one way to them with another way.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import httpx
import openai
import pytest
from tests.e2e.dense_model import dense_logprobs
from tests.e2e.serving import MAX_MODEL_LEN, MODEL, RealServer, until

from penstock.core.request import child_seed

STORY = "Once upon a time, there was a little"
MESSAGES: list[Any] = [{"role": "user", "content": "Tell me a story about a dog."}]
LOOSE: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}  # everything may be drawn; the model's own default is 0.9
EOS = 2
LONG_STORY = " ".join(f"Day {day}: the little dog {day} went to the river and saw {day} fish." for day in range(12))


def text_of(completion: Any) -> str:
    return str(completion.choices[0].text)


def streamed(chunks: Any) -> tuple[list[str], dict[int, str], dict[int, str | None], Any]:
    """(pieces of choice 0, text by choice, finish reason by choice, usage) of a stream of either kind."""
    pieces: list[str] = []
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    usage = None
    for chunk in chunks:
        assert usage is None, "a chunk came after the usage"
        usage = chunk.usage
        assert (usage is None) == bool(chunk.choices)
        for choice in chunk.choices:
            piece = (choice.delta.content if hasattr(choice, "delta") else choice.text) or ""
            texts[choice.index] = texts.get(choice.index, "") + piece
            if choice.index == 0 and piece:
                pieces.append(piece)
            if choice.finish_reason is not None:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    return pieces, texts, reasons, usage


# ---- chat and completions, whole and streamed ----


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert card.id == MODEL and card.object == "model"
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_chat_whole_and_streamed_are_one_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "seed": 7, "max_tokens": 32}
    whole = client.chat.completions.create(**asked)
    [choice] = whole.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason in ("stop", "length")
    usage = whole.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 1 <= usage.completion_tokens <= 32 and (choice.finish_reason == "stop" or usage.completion_tokens == 32)

    pieces, texts, reasons, final = streamed(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert texts == {0: choice.message.content} and reasons == {0: choice.finish_reason}
    assert len(pieces) > 3
    assert (final.prompt_tokens, final.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)


def test_completion_whole_and_streamed_are_one_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": STORY, "seed": 8, "max_tokens": 24, **LOOSE}
    whole = client.completions.create(**asked)
    pieces, texts, reasons, usage = streamed(client.completions.create(**asked, stream=True))
    assert texts == {0: text_of(whole)} and reasons == {0: whole.choices[0].finish_reason}
    assert len(pieces) > 3 and usage is None


def test_a_system_message_parts_of_text_and_tools_reach_the_prompt(client: openai.OpenAI) -> None:
    def prompt_tokens(messages: list[Any], **more: Any) -> int:
        answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1, **more)
        assert answer.usage is not None
        return answer.usage.prompt_tokens

    plain = prompt_tokens(MESSAGES)
    assert prompt_tokens([{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]) == plain
    assert prompt_tokens([{"role": "system", "content": "You are kind."}, *MESSAGES]) > plain
    assert prompt_tokens([{"role": "developer", "content": "You are kind."}, *MESSAGES]) > plain
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    with_tool = prompt_tokens(MESSAGES, tools=[tool])
    assert with_tool > plain
    assert prompt_tokens(MESSAGES, tools=[tool], tool_choice="none") == plain
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "sun"}]
    assert prompt_tokens([*MESSAGES, *turns], tools=[tool]) > with_tool


# ---- seeds ----


def test_equal_seeds_give_equal_answers_also_under_load(server: RealServer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": STORY, "max_tokens": 24, "seed": 123, **LOOSE}
    with server.client() as client:
        alone = [text_of(client.completions.create(**asked)) for _ in range(2)]
        other = text_of(client.completions.create(**asked | {"seed": 124}))
    assert alone[0] == alone[1] != other

    async def beside(num_others: int) -> tuple[str, int]:
        """The same request while others run; the others' connections are closed in the middle of their answers."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0,
            http_client=httpx.AsyncClient(limits=limits, timeout=60),
        ) as many:  # fmt: skip
            rest = {"max_tokens": 200, "stream": True, "extra_body": {"ignore_eos": True}}
            streams = await asyncio.gather(
                *(
                    many.completions.create(**asked | rest | {"seed": i, "prompt": LONG_STORY[i : 60 + 7 * i]})
                    for i in range(num_others)
                )
            )
            [await anext(aiter(stream)) for stream in streams]
            text = text_of(await many.completions.create(**asked))
            running = (await asyncio.to_thread(server.snapshot))["totals"]["num_requests_running"]
            for stream in streams:
                await stream.close()
            return text, int(running)

    text, running = asyncio.run(beside(30))
    assert running == 30  # all of them ran beside it, from before to after
    assert text == alone[0]


def test_four_samples_are_the_four_requests_of_their_seeds(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": STORY, "max_tokens": 16, "temperature": 1.2, "top_p": 1.0}
    four = client.completions.create(**asked, seed=99, n=4)
    assert [choice.index for choice in four.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in four.choices]
    assert len(set(texts)) == 4
    assert four.usage is not None and four.usage.completion_tokens > four.usage.prompt_tokens  # the prompt counts once
    alone = [text_of(client.completions.create(**asked, seed=child_seed(99, i))) for i in range(4)]
    assert texts == alone
    _, parts, reasons, _ = streamed(client.completions.create(**asked, seed=99, n=4, stream=True))
    assert [parts[i] for i in range(4)] == texts
    assert [reasons[i] for i in range(4)] == [choice.finish_reason for choice in four.choices]
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, n=3, seed=5, max_tokens=4)
    assert [choice.index for choice in chat.choices] == [0, 1, 2]


# ---- where an answer ends ----


def test_stop_strings_cut_the_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": STORY, "max_tokens": 24, "seed": 3}
    full = text_of(client.completions.create(**asked, extra_body={"ignore_eos": True}))
    assert len(full) > 12
    middle = len(full) // 2
    for stop in (full[middle : middle + 7], full[1]):
        cut = full.find(stop)
        for extra, end in (({}, cut), ({"include_stop_str_in_output": True}, cut + len(stop))):
            body = {"ignore_eos": True, **extra}
            stopped = client.completions.create(**asked, stop=["\0never\0", stop], extra_body=body)
            assert text_of(stopped) == full[:end]
            assert stopped.choices[0].finish_reason == "stop"
            assert stopped.choices[0].stop_reason == stop  # type: ignore[attr-defined]
        body = {"ignore_eos": True}
        _, texts, reasons, _ = streamed(client.completions.create(**asked, stop=stop, stream=True, extra_body=body))
        assert texts.get(0, "") == full[:cut] and reasons == {0: "stop"}
    untouched = client.completions.create(**asked, stop=["\0never\0"], extra_body={"ignore_eos": True})
    assert text_of(untouched) == full and untouched.choices[0].finish_reason == "length"


def test_stop_token_ids_min_tokens_and_ignore_eos(server: RealServer) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "seed": 4, "ignore_eos": True, "return_token_ids": True}
    choice = server.complete(STORY, **asked)["choices"][0]
    ids = choice["token_ids"]
    assert len(ids) == 12 and choice["finish_reason"] == "length"
    wanted = ids[6]
    first = ids.index(wanted)
    stopped = server.complete(STORY, **asked, stop_token_ids=[wanted])
    assert stopped["choices"][0]["token_ids"] == ids[: first + 1]
    assert stopped["choices"][0]["finish_reason"] == "stop" and stopped["choices"][0]["stop_reason"] == wanted

    at_once: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "logit_bias": {str(EOS): 100}}
    ended = server.complete(STORY, **at_once, return_token_ids=True)["choices"][0]
    assert ended["token_ids"] == [EOS] and ended["text"] == "" and ended["finish_reason"] == "stop"
    later = server.complete(STORY, **at_once, min_tokens=5, return_token_ids=True)["choices"][0]
    assert later["token_ids"].index(EOS) == 5 and len(later["token_ids"]) == 6
    never = server.complete(STORY, **at_once, ignore_eos=True)
    assert never["usage"]["completion_tokens"] == 12 and never["choices"][0]["finish_reason"] == "length"


def test_without_max_tokens_an_answer_may_fill_the_model(server: RealServer) -> None:
    ids = (server.token_ids(LONG_STORY) * 9)[: MAX_MODEL_LEN - 10]
    text = server.post("/detokenize", {"tokens": ids}).json()["prompt"]
    message = {"messages": [{"role": "user", "content": text}], "ignore_eos": True}
    num_prompt = server.post("/tokenize", {"messages": message["messages"]}).json()["count"]
    if num_prompt >= MAX_MODEL_LEN:  # the template's own tokens count too
        message["truncate_prompt_tokens"] = num_prompt = MAX_MODEL_LEN - 10
    answer = server.post("/v1/chat/completions", message).json()
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == MAX_MODEL_LEN - num_prompt
    assert answer["choices"][0]["finish_reason"] == "length"

    lowered = server.post("/v1/completions", {"prompt": ids, "max_tokens": 4000, "ignore_eos": True})
    assert lowered.json()["usage"]["completion_tokens"] == 10
    assert "max_tokens lowered to 10" in lowered.headers["x-penstock-warning"]
    default = server.complete(STORY, ignore_eos=True)
    assert default["usage"]["completion_tokens"] == 16  # OpenAI's default for completions


# ---- log probabilities ----


def test_chat_log_probabilities_are_the_models(server: RealServer, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, seed=11, logprobs=True, top_logprobs=5, **LOOSE,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    choice = answer.choices[0]
    prompt_ids, ids = answer.prompt_token_ids, choice.token_ids  # type: ignore[attr-defined]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    content = choice.logprobs.content
    assert len(content) == len(ids) == answer.usage.completion_tokens  # type: ignore[union-attr]
    expected = dense_logprobs(prompt_ids + ids)[len(prompt_ids) - 1 :]
    for own, token_id, row in zip(content, ids, expected, strict=False):
        assert own.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
        tops = [top.logprob for top in own.top_logprobs]
        assert tops == pytest.approx(row.topk(5).values.tolist(), abs=1e-3)
        assert tops == sorted(tops, reverse=True)
        assert own.bytes is not None
    shown = b"".join(bytes(own.bytes or ()) for own, i in zip(content, ids, strict=True) if i != EOS)
    assert shown.decode(errors="replace") == choice.message.content


def test_completion_log_probabilities_echo_and_prompt_logprobs_agree(client: openai.OpenAI, server: RealServer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": STORY, "max_tokens": 8, "seed": 12, "logprobs": 3}
    own = {"return_token_ids": True, "prompt_logprobs": 2, "ignore_eos": True}
    plain = client.completions.create(**asked, extra_body=own)
    echoed = client.completions.create(**asked, echo=True, extra_body=own)
    prompt_ids, ids = plain.choices[0].prompt_token_ids, plain.choices[0].token_ids  # type: ignore[attr-defined]
    assert prompt_ids == server.token_ids(STORY)
    expected = dense_logprobs(prompt_ids + ids)
    assert text_of(echoed) == STORY + text_of(plain)

    logprobs, with_prompt = plain.choices[0].logprobs, echoed.choices[0].logprobs
    assert logprobs is not None and with_prompt is not None
    rows = expected[len(prompt_ids) - 1 :]
    given = [float(rows[i, token_id]) for i, token_id in enumerate(ids)]
    assert logprobs.token_logprobs == pytest.approx(given, abs=1e-3)
    for top, row in zip(logprobs.top_logprobs or (), rows, strict=False):
        best = sorted(top.values(), reverse=True)[:3]
        assert best == pytest.approx(row.topk(3).values.tolist()[: len(best)], abs=1e-3)
    pieces = with_prompt.tokens or []
    assert pieces[len(prompt_ids) :] == logprobs.tokens and "".join(pieces[: len(prompt_ids)]) == STORY
    assert with_prompt.token_logprobs is not None and with_prompt.token_logprobs[0] is None
    all_ids = prompt_ids + ids
    in_prompt = [float(expected[i - 1, all_ids[i]]) for i in range(1, len(all_ids))]
    assert with_prompt.token_logprobs[1:] == pytest.approx(in_prompt, abs=1e-3)
    assert with_prompt.text_offset == [len("".join(pieces[:i])) for i in range(len(pieces))]

    told = plain.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert len(told) == len(prompt_ids) and told[0] is None
    for i, entry in enumerate(told[1:], 1):
        assert next(iter(entry)) == str(prompt_ids[i]) and 2 <= len(entry) <= 3
        for key, item in entry.items():
            assert item["logprob"] == pytest.approx(float(expected[i - 1, int(key)]), abs=1e-3)
            rank = int((expected[i - 1] > expected[i - 1, int(key)]).sum()) + 1
            assert item["rank"] == rank


def test_a_text_can_be_scored_without_output(server: RealServer) -> None:
    answer = server.complete(STORY, max_tokens=0, echo=True, logprobs=0)
    assert answer["choices"][0]["text"] == STORY
    assert answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"][0]["logprobs"]["token_logprobs"]) == answer["usage"]["prompt_tokens"]


# ---- prompts ----


def test_prompts_as_text_as_ids_and_in_batches(server: RealServer) -> None:
    asked: dict[str, Any] = {"max_tokens": 6, "seed": 21, **LOOSE}
    other = "The big red ball"
    ids = server.token_ids(STORY)
    one, two = (server.complete(prompt, **asked)["choices"][0]["text"] for prompt in (STORY, other))
    assert server.complete(ids, **asked)["choices"][0]["text"] == one
    batch = server.complete([STORY, other], **asked, n=2)
    assert [choice["index"] for choice in batch["choices"]] == [0, 1, 2, 3]
    assert [batch["choices"][0]["text"], batch["choices"][2]["text"]] == [one, two]
    assert batch["usage"]["prompt_tokens"] == len(ids) + len(server.token_ids(other))
    mixed = server.complete([ids, server.token_ids(other)], **asked)
    assert [choice["text"] for choice in mixed["choices"]] == [one, two]


def test_cached_tokens_are_counted_and_change_nothing(server: RealServer) -> None:
    asked: dict[str, Any] = {"max_tokens": 8, "seed": 31, **LOOSE}
    prompt = "A story of the cache. " + LONG_STORY

    def ask(**more: Any) -> tuple[str, int]:
        body = server.complete(prompt, **asked, **more)
        return body["choices"][0]["text"], body["usage"]["prompt_tokens_details"]["cached_tokens"]

    first, num_first = ask()
    second, num_second = ask()
    num_prompt = len(server.token_ids(prompt))
    assert num_prompt > 100
    assert (num_first, num_second) == (0, (num_prompt - 1) // 32 * 32)
    assert first == second
    assert ask(cache_salt="mine") == (first, 0)  # another salt never sees these blocks
    assert ask(cache_salt="mine") == (first, num_second)


# ---- which tokens may come ----


def test_bias_allowed_ids_and_bad_words(server: RealServer) -> None:
    greedy: dict[str, Any] = {"max_tokens": 10, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    dog, cat = server.token_ids(" dog")[0], server.token_ids(" cat")[0]

    def ids(**more: Any) -> list[int]:
        found: list[int] = server.complete(STORY, **greedy, **more)["choices"][0]["token_ids"]
        return found

    assert ids(logit_bias={str(dog): 100}) == [dog] * 10
    assert set(ids(allowed_token_ids=[dog, cat])) <= {dog, cat}
    sampled = server.complete(STORY, **greedy | {"temperature": 2, "seed": 1}, allowed_token_ids=[dog, cat])
    assert set(sampled["choices"][0]["token_ids"]) == {dog, cat}
    plain = ids()
    word = server.post("/detokenize", {"tokens": plain[:1]}).json()["prompt"]
    changed = ids(bad_words=[word])
    assert plain[0] not in changed
    assert changed != plain


def test_penalties_push_repetitions_away(server: RealServer) -> None:
    dog, cat = server.token_ids(" dog")[0], server.token_ids(" cat")[0]
    greedy: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    only_two = greedy | {"allowed_token_ids": [dog, cat], "logit_bias": {str(dog): 20}}
    assert server.complete(STORY, **only_two)["choices"][0]["token_ids"] == [dog] * 40
    # 2 a time: dog is 20 ahead at most some thirty times
    assert cat in server.complete(STORY, **only_two, frequency_penalty=2)["choices"][0]["token_ids"]
    plain = server.complete(STORY, **greedy)["choices"][0]["token_ids"]
    for penalty in ({"repetition_penalty": 2.0}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        pushed = server.complete(STORY, **greedy, **penalty)["choices"][0]["token_ids"]
        assert len(set(pushed)) >= len(set(plain))
    assert len(set(server.complete(STORY, **greedy, repetition_penalty=5.0)["choices"][0]["token_ids"])) > 30


# ---- extras ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_ask_where_its_time_went(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": f"Explain this, {stream}. {LONG_STORY}", "max_tokens": 4}
    answer: Any = client.completions.create(**asked, stream=stream, extra_body={"explain": True, "ignore_eos": True})
    told = [c.explain for c in answer if getattr(c, "explain", None)] if stream else [answer.explain]
    assert len(told) == 1
    [explained] = told
    assert explained["generation_tokens"] == 4 and explained["finish_reason"] == "length"
    assert {"queue", "prefill", "decode"} <= {span["kind"] for span in explained["spans"]}
    for span in explained["spans"]:
        assert 0 <= span["start_s"] <= span["end_s"] < 60
    runs = explained["prefix"]["runs"]
    assert runs[0]["start"] == 0 and runs[-1]["end"] == explained["prompt_tokens"]
    assert explained["prefix"]["miss"]["reason"] in ("first_seen", "diverged")


def test_unknown_fields_are_named_and_known_ones_of_clients_taken(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=MESSAGES, max_tokens=1, user="u", metadata={"a": "b"}, store=False,
        extra_body={"frobnicate": 1},
    )  # fmt: skip
    assert raw.headers["x-penstock-warning"] == "ignored fields: frobnicate"
    assert raw.parse().choices


def test_errors_are_the_clients_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as picture:
        parts: Any = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": parts}])
    assert "image" in picture.value.message


def test_a_closed_stream_frees_its_blocks(client: openai.OpenAI, server: RealServer) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": STORY, "max_tokens": 450, "extra_body": {"ignore_eos": True}}
    stream = client.completions.create(**asked, stream=True)
    next(iter(stream))
    assert until(server.held_blocks, what="a block in use") > 0
    stream.close()
    server.until_idle(10)
    # And one that waits for a whole answer: only the closed socket tells.
    body = b'{"prompt": "Once", "n": 16, "max_tokens": 450, "ignore_eos": true}'
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        until(lambda: server.http.get("/load").json()["server_load"] == 1, what="a request in flight")
    until(lambda: server.http.get("/load").json()["server_load"] == 0, 10, "the end of the request")
    server.until_idle(10)
