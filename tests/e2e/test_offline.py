"""`LLM(...)` in this process on the built-in model: what `generate` and `chat` give, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.e2e.dense_model import dense_logprobs
from tests.e2e.serving import ASSETS, RealServer

from penstock import LLM, SamplingParams

STORY = "Once upon a time, there was a little"
MESSAGES = [{"role": "user", "content": "Hello!"}]
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(ASSETS, dtype="float32", kv_cache_memory_bytes="32M") as loaded:
        yield loaded
        assert loaded._built.engine.scheduler.requests == {}
        pools = loaded._built.engine.scheduler.pools
        assert all(block.num_refs == 0 for pool in pools for block in pool.blocks[1:])


def texts(llm: LLM, prompts: Any, params: Any, **more: Any) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False, **more)]


def test_it_says_what_the_server_says(llm: LLM, server: RealServer) -> None:
    sampled = SamplingParams(temperature=1.0, max_tokens=8, seed=5)
    online = [server.complete(STORY, temperature=0, top_p=1, max_tokens=8)]
    online += [server.complete(STORY, temperature=1, top_p=1, max_tokens=8, seed=5)]
    assert texts(llm, [STORY, STORY], [GREEDY, sampled]) == [body["choices"][0]["text"] for body in online]
    chat = server.post("/v1/chat/completions", {"messages": MESSAGES, "temperature": 0, "top_p": 1, "max_tokens": 8})
    [output] = llm.chat(MESSAGES, GREEDY, use_tqdm=False)
    assert output.outputs[0].text == chat.json()["choices"][0]["message"]["content"]
    assert len(output.prompt_token_ids) == chat.json()["usage"]["prompt_tokens"]
    several = llm.chat([MESSAGES, MESSAGES], GREEDY, use_tqdm=False)
    assert [each.outputs[0].text for each in several] == [output.outputs[0].text] * 2


def test_prompts_of_every_form_are_one_prompt(llm: LLM) -> None:
    ids = llm.tokenizer.encode(STORY)
    forms: list[Any] = [STORY, ids, {"prompt": STORY}, {"prompt_token_ids": ids}]
    assert len({texts(llm, form, GREEDY)[0] for form in forms}) == 1
    assert len(set(texts(llm, forms, GREEDY))) == 1
    assert len(set(texts(llm, (form for form in forms), GREEDY))) == 1
    assert llm.generate([], GREEDY) == []


def test_outputs_carry_what_vllms_carry(llm: LLM) -> None:
    llm.reset_prefix_cache()
    params = SamplingParams(n=3, seed=2, max_tokens=6, logprobs=2, prompt_logprobs=0, ignore_eos=True)
    [output] = llm.generate(STORY * 8, params, use_tqdm=False)
    ids = output.prompt_token_ids
    assert output.finished and output.prompt == STORY * 8 and output.num_cached_tokens == 0
    assert [sample.index for sample in output.outputs] == [0, 1, 2]
    for sample in output.outputs:
        expected = dense_logprobs(ids + sample.token_ids)[len(ids) - 1 :]
        own = [float(expected[i, token_id]) for i, token_id in enumerate(sample.token_ids)]
        assert sample.logprobs is not None
        found = [position[token] for position, token in zip(sample.logprobs, sample.token_ids, strict=True)]
        assert [entry.logprob for entry in found] == pytest.approx(own, abs=1e-3)
        assert all(entry.rank >= 1 and entry.decoded_token for entry in found)
        assert sample.cumulative_logprob == pytest.approx(sum(own), abs=1e-2)
        assert (sample.finish_reason, len(sample.token_ids)) == ("length", 6)
        assert llm.tokenizer.decode(sample.token_ids, skip_special_tokens=True) == sample.text
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(ids)
    assert output.metrics is not None and output.metrics.finish_reason == "length"
    [again] = llm.generate(STORY * 8, GREEDY, use_tqdm=False)
    assert again.num_cached_tokens == (len(ids) - 1) // 32 * 32 > 0


def test_priorities_and_stop_strings(llm: LLM) -> None:
    prompts = [f"{STORY} {name}" for name in ("dog", "cat", "boat")]
    assert texts(llm, prompts, GREEDY, priority=[2, 0, 1]) == texts(llm, prompts, GREEDY)
    [full] = texts(llm, STORY, GREEDY)
    middle = full[3:5]
    assert texts(llm, STORY, SamplingParams(temperature=0, max_tokens=8, stop=middle)) == [full[: full.find(middle)]]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda llm: llm.generate(None), TypeError, "None"),
        (lambda llm: llm.generate([STORY, None]), TypeError, "None"),
        (lambda llm: llm.generate({"promt": STORY}), TypeError, "promt"),
        (lambda llm: llm.generate([[1, "a"]]), TypeError, "'a'"),
        (lambda llm: llm.generate(STORY, {"max_tokens": 3}), TypeError, "SamplingParams"),
        (lambda llm: llm.generate(STORY, [GREEDY, GREEDY]), ValueError, "1 prompts but 2"),
        (lambda llm: llm.generate([STORY, STORY], GREEDY, priority=[1]), ValueError, "2 prompts but 1"),
        (lambda llm: llm.generate(""), ValueError, "empty"),
        (lambda llm: llm.generate([1, 99_999]), ValueError, "99999"),
        (lambda llm: llm.generate([STORY, [7] * 3000], GREEDY), ValueError, "3000"),
        (lambda llm: llm.chat([]), ValueError, "at least one"),
        (lambda llm: llm.chat("Hello"), ValueError, "object"),
        (lambda llm: SamplingParams(temperature="hot"), ValueError, "temperature must be a number"),  # type: ignore[arg-type]
        (lambda llm: SamplingParams(max_tokens=1.5), ValueError, "max_tokens must be a whole number"),  # type: ignore[arg-type]
        (lambda llm: SamplingParams(temperature=None), ValueError, "temperature must be a number"),  # type: ignore[arg-type]
        (lambda llm: LLM(max_model_length=16), ValueError, "did you mean --max-model-len"),
        (lambda llm: LLM("/nowhere"), ValueError, "/nowhere does not exist"),
    ],
)
def test_what_cannot_be_is_said_and_the_next_call_works(
    llm: LLM, call: Callable[[LLM], Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(llm)
    assert len(texts(llm, STORY, SamplingParams(max_tokens=1))) == 1


def test_a_chat_template_of_ones_own(llm: LLM, tmp_path: Any) -> None:
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with LLM(chat_template=str(template), dtype="float32", kv_cache_memory_bytes="16M") as own:
        [output] = own.chat([{"role": "user", "content": STORY}], GREEDY, use_tqdm=False)
    assert output.prompt == STORY
    assert output.outputs[0].text == texts(llm, STORY, GREEDY)[0]
