"""Offline use: `LLM(model=...).generate(prompts, params)` and `.chat(messages, params)`, as in vLLM.

The engine runs in this process; prompts go through the very front end and scheduler that the server uses. No HTTP.
torch is imported when the first LLM is made; its number of threads is as the caller left it except while one computes.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.build.start import Stages, begin, import_builder, no_collections
from penstock.config.complete import complete
from penstock.config.hardware import probe
from penstock.config.load import model_directory, resolve
from penstock.core.plan import Logprobs
from penstock.core.request import SamplingParams
from penstock.engine.client import FrontEnd, LiveRequest, Output
from penstock.engine.garbage import rare_collections
from penstock.engine.loop import MOVING_WAIT_S, turn
from penstock.engine.messages import RequestRecord, ResetPrefixCache
from penstock.engine.tokenizer import load_tokenizer
from penstock.engine.wire import local_pair
from penstock.server.chat import ChatRenderer, Conversation, chosen_templates

Prompt = str | Sequence[int] | Mapping[str, Any]  # text, token ids, {"prompt": ...} or {"prompt_token_ids": ...}


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability at one position; `rank` is 1-based, `decoded_token` its text alone."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class RequestOutput:
    """What a prompt gave. `outputs` has `n` samples; `metrics` says where the time of the first went."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = False
    num_cached_tokens: int = 0
    metrics: RequestRecord | None = None


class LLM:
    """A model and an engine in this process. Keyword arguments are the settings of `penstock serve`, same names.

    Not safe for several threads. Raises ConfigError, CheckpointError, TokenizerError with one clear line each.
    """

    def __init__(self, model: str | os.PathLike[str] = "penstock-tiny", **settings: Any) -> None:
        stages = Stages(time.monotonic())
        resolved = complete(resolve({"model": os.fspath(model), **settings}), probe())
        arena = begin(resolved)
        self.config = resolved.config
        self.model_config = resolved.model
        assert self.config.model.tokenizer is not None
        self.tokenizer = load_tokenizer(model_directory(self.config.model.tokenizer))
        stages.done("configuration and tokenizer")
        with no_collections():
            builder = import_builder()
            stages.done("import torch")
            self._built = builder.build_engine(resolved, lambda stage, done, total: None, stages, arena)
        self.start_timeline = stages.rows  # (stage, seconds) of making this, in order
        front_wire, self._engine_wire = local_pair()
        self._front_wire = front_wire
        seeds = itertools.count(self.config.model.seed) if "seed" in settings else None
        self._front = FrontEnd(
            front_wire.send,
            self.tokenizer,
            resolved.model.vocab_size,
            seeds=None if seeds is None else lambda: next(seeds),
        )
        self._front.handle(self._built.ready, time.monotonic())
        self._ids = itertools.count()
        stages.done("front end")
        self._renderer: ChatRenderer | None = None

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, batched by the engine; results in the order of the prompts.

        One SamplingParams serves all prompts, or one each. Raises RequestError or ParamsError for a prompt that
        cannot run (nothing of this call goes on then).
        """
        several = _prompt_list(prompts)
        params = _params_list(sampling_params, len(several))
        if priority is not None and len(priority) != len(several):
            raise ValueError(f"{len(several)} prompts but {len(priority)} priorities")
        outputs: dict[str, RequestOutput] = {}
        lives: dict[str, LiveRequest] = {}
        try:
            for i, (prompt, own) in enumerate(zip(several, params, strict=True)):
                text, ids = self._encode(prompt)
                request_id = str(next(self._ids))
                live = self._front.submit(
                    request_id, ids, own, time.monotonic(), priority=priority[i] if priority else 0
                )
                lives[request_id] = live
                samples = [CompletionOutput(n) for n in range(own.n)]
                outputs[request_id] = RequestOutput(request_id, text, live.token_ids, samples)
            with rare_collections():
                self._run(outputs, lives, use_tqdm)
        except BaseException:
            for request_id in outputs:
                self._front.cancel(request_id, time.monotonic())
            self._settle()
            raise
        return list(outputs.values())

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or several. `template`: fields of Conversation, as tools or add_generation_prompt."""
        conversations: Sequence[Any] = messages if messages and not isinstance(messages[0], Mapping) else [messages]
        if self._renderer is None:
            templates = chosen_templates(self.tokenizer.chat_templates, self.config.model.chat_template)
            self._renderer = ChatRenderer(templates, self.tokenizer.special_tokens)
            self._renderer.check()
        prompts: list[Prompt] = []
        for conversation in conversations:
            text = self._renderer.render_sync(Conversation(messages=list(conversation), **template))
            prompts.append({"prompt": text, "prompt_token_ids": self.tokenizer.encode(text, add_special_tokens=False)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def reset_prefix_cache(self) -> None:
        """Forget all cached blocks."""
        self._front.send(ResetPrefixCache())
        self._settle()

    def close(self) -> None:
        """End worker processes and the engine's thread."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._built.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self.tokenizer.encode(prompt)
        text: str | None = None
        ids: Any = prompt
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if ids is None and isinstance(text, str):
                return text, self.tokenizer.encode(text)
        if not isinstance(ids, Sequence) or not all(isinstance(token_id, int) for token_id in ids):
            raise TypeError(f"a prompt is a text, token ids, or a dict with prompt or prompt_token_ids, not {prompt!r}")
        return text, list(ids)

    def _run(self, outputs: dict[str, RequestOutput], lives: dict[str, LiveRequest], show: bool) -> None:
        """Step until every request of `outputs` has ended."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TextColumn("{task.fields[rate]}"), disable=not show, transient=False) as bar:
            task = bar.add_task("Processed prompts", total=len(outputs), rate="")
            begin, num_left, num_tokens = time.monotonic(), len(outputs), 0
            while num_left:
                for out in self._turn():
                    request = outputs.get(out.request_id)
                    if request is None:
                        continue
                    if out.error is not None:
                        raise out.error
                    num_tokens += len(out.token_ids)
                    self._collect(request, out)
                    if out.is_last:
                        num_left -= 1
                        request.finished = True
                        live = lives[out.request_id]
                        request.num_cached_tokens = live.num_cached
                        request.metrics = self._front.records.get(live.sample_id(0))
                        rate = f"{num_tokens / max(time.monotonic() - begin, 1e-9):,.0f} output tok/s"
                        bar.update(task, advance=1, rate=rate)

    def _collect(self, request: RequestOutput, out: Output) -> None:
        sample = request.outputs[out.index]
        sample.text += out.text
        sample.token_ids += out.token_ids
        if out.logprobs is not None:
            sample.logprobs = (sample.logprobs or []) + [self._logprobs(position) for position in out.logprobs]
            sample.cumulative_logprob = (sample.cumulative_logprob or 0.0) + sum(p.logprobs[0] for p in out.logprobs)
        if out.prompt_logprobs is not None:
            found = [None if position is None else self._logprobs(position) for position in out.prompt_logprobs]
            request.prompt_logprobs = found
        sample.finish_reason, sample.stop_reason = out.finish_reason, out.stop_reason

    def _logprobs(self, position: Logprobs) -> dict[int, Logprob]:
        """vLLM's form: token id -> Logprob, the token that is there first, then the best ones."""
        ranks = [position.rank, *range(1, len(position.token_ids))]
        found: dict[int, Logprob] = {}
        for token_id, logprob, rank in zip(position.token_ids, position.logprobs, ranks, strict=True):
            if token_id not in found:
                found[token_id] = Logprob(logprob, rank, self.tokenizer.token_text(token_id))
        return found

    def _turn(self) -> Iterable[Output]:
        is_busy = turn(self._built.engine, self._built.executor, self._engine_wire, time.monotonic)
        if not is_busy and self._built.engine.has_moves:
            time.sleep(MOVING_WAIT_S)  # KV is on its way, by threads that need a processor
        now = time.monotonic()
        return [out for message in self._front_wire.receive() for out in self._front.handle(message, now)]

    def _settle(self) -> None:
        """Let the engine take in what was sent, and end steps in flight."""
        for _ in self._turn():
            pass
        while self._built.engine.scheduler.num_submitted:
            for _ in self._turn():
                pass


def _prompt_list(prompts: Any) -> list[Prompt]:
    """One prompt or several: text, token ids and mappings are one each."""
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable):
        return [prompts]
    several = list(prompts)
    return [several] if several and all(isinstance(p, int) for p in several) else several


def _params_list(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if isinstance(params, Mapping):
        raise TypeError("sampling params are SamplingParams(...), one or a list, not a dict")
    if len(params) != count:
        raise ValueError(f"{count} prompts but {len(params)} sampling params")
    return list(params)
