"""One rank's work: a plan to tensors, tensors to tokens. A pure function of the plans it has seen.

Knows nothing of queues, of other requests' reasons or of time; it is told what to compute.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from penstock.core.plan import Logprobs, StepPlan, StepResult
from penstock.nn.doors import AttentionBackend, Batch, Scores, Spans
from penstock.nn.words import StepWords
from penstock.runner.inputs import NO_IDS, RequestTable, StepInputs
from penstock.runner.sampler import Sampler
from penstock.transfer.counter import StepCounter

LOGITS_PIECE = 256  # prompt positions whose scores are held at once for prompt_logprobs


class Model(Protocol):
    """What a model family offers: hidden states [N, hidden] of a batch's outputs, and their scores."""

    def __call__(self, batch: Batch) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [N, vocab_size]"""
        ...

    def scores(self, hidden: Tensor) -> Scores:
        """The same, to choose from."""
        ...

    def scores_after(self, batch: Batch) -> Scores:
        """Scores of what follows each output of a batch. The layers may run only when somebody chooses from them."""
        ...


class Loads(Protocol):
    """KV that somebody else brings into the pools while steps run."""

    def words(self, ids: Sequence[int]) -> np.ndarray:
        """Addresses, int64 [N], of a word for each load: how many layers are in place, negative when it has failed.

        They hold until the step that awaits them has ended, also of loads that have ended already.
        """
        ...


class Runner:
    """Owns the rank's requests, KV pools and sampler. `run` must be called with plans in order, from one thread.

    `counter`: told of each layer whose KV a step has written. `loads`: what plans may await, `load_patience_s` long in
    each step, in all.
    """

    def __init__(
        self,
        model: Model,
        attention: AttentionBackend,
        sampler: Sampler,
        table: RequestTable,
        counter: StepCounter | None = None,
        loads: Loads | None = None,
        load_patience_s: float = 10.0,
    ) -> None:
        self.model = model
        self.attention = attention
        self.sampler = sampler
        self.table = table
        self.counter = counter
        self.loads = loads
        self.load_patience_s = load_patience_s
        # Entering this mode takes as long as all index arrays of a step: only torch's own modules need it.
        self._without_autograd = torch.inference_mode if isinstance(model, torch.nn.Module) else nullcontext
        self._wants_prompt_logprobs: dict[str, tuple[int, int]] = {}  # request id -> (how many, prompt_len)
        self._inputs: StepInputs | None = None  # of the last step
        self._tensors: tuple[Tensor, Tensor, Tensor | None]  # its token ids, positions and outputs, in the same memory

    def run(self, plan: StepPlan) -> StepResult:
        """Apply `released` and `admitted`, compute the rows, sample where they end. Exactness: E1 in plain torch."""
        with self._without_autograd():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        self._apply(plan)
        inputs = self.table.prepare(plan)
        words = self._words(plan)
        batch = self._batch(inputs, words)
        result = StepResult(plan.step, [])
        silent = [i for i, row in enumerate(plan.rows) if not row.samples]
        if silent or self._wants_prompt_logprobs:
            self._sample_some(plan, inputs, self.model(batch), silent, result)
        else:  # nobody looks at the states themselves
            self._sample(plan, inputs, self.model.scores_after(batch), range(len(plan.rows)), result)
        if self.counter is not None:
            self.counter.end()
        if words is not None:
            result.bad_loads = tuple(plan.awaits[i] for i in words.bad())
        result.seconds = time.perf_counter() - begin
        return result

    def _batch(self, inputs: StepInputs, words: StepWords | None) -> Batch:
        """What the model reads, in the memory of `inputs`."""
        if inputs is not self._inputs:  # else this step goes on where the last one ended
            self._inputs = inputs
            outputs = None if inputs.outputs is None else torch.from_numpy(inputs.outputs)
            self._tensors = torch.from_numpy(inputs.token_ids), torch.from_numpy(inputs.positions), outputs
        attention = self.attention.prepare(Spans(inputs.query_start, inputs.starts, inputs.tables), words)
        token_ids, positions, outputs = self._tensors
        return Batch(token_ids, positions, attention, outputs)

    def _words(self, plan: StepPlan) -> StepWords | None:
        """What this step tells and awaits; None: nothing. The counter stands at the step's base afterwards."""
        if self.counter is not None:
            self.counter.begin(plan.step)
        elif not plan.awaits:
            return None
        addresses = None
        if plan.awaits:
            assert self.loads is not None, "a plan awaits loads, and nobody loads"
            addresses = self.loads.words(plan.awaits)
        done = 0 if self.counter is None else self.counter.address
        return StepWords(done, addresses, self.load_patience_s)

    def _apply(self, plan: StepPlan) -> None:
        for request_id in plan.released:
            self.sampler.release(self.table.release(request_id))
            self._wants_prompt_logprobs.pop(request_id, None)
        if plan.admitted:
            starts = {row.request_id: row.start for row in plan.rows}
            for admitted in plan.admitted:
                slot = self.table.admit(admitted.request_id, admitted.token_ids, starts[admitted.request_id])
                self.sampler.admit(slot, admitted)
                if admitted.params.prompt_logprobs is not None:
                    wanted = (admitted.params.prompt_logprobs, admitted.prompt_len)
                    self._wants_prompt_logprobs[admitted.request_id] = wanted

    def _fail_broken_chunks(
        self, plan: StepPlan, rows: list[int], inputs: StepInputs, hidden: Tensor, result: StepResult
    ) -> None:
        """`rows` that do not sample are looked at too: a NaN must not be published with the prompt's first blocks."""
        last = torch.from_numpy(inputs.output_start[1:][rows] - 1)
        for n in hidden[last].isnan().any(-1).nonzero().flatten().tolist():
            result.failed[plan.rows[rows[n]].request_id] = "the model's states for the prompt are not numbers (NaN)"

    def _sample_some(
        self, plan: StepPlan, inputs: StepInputs, hidden: Tensor, silent: list[int], result: StepResult
    ) -> None:
        """What is asked of a prompt's states, then the next tokens of all rows but the `silent` ones."""
        if self._wants_prompt_logprobs:
            self._prompt_logprobs(plan, inputs, hidden, result)
        if silent:
            self._fail_broken_chunks(plan, silent, inputs, hidden, result)
        sampling = [i for i, row in enumerate(plan.rows) if row.samples]
        if sampling:
            scores = self.model.scores(hidden[torch.from_numpy(inputs.output_start[1:][sampling] - 1)])
            self._sample(plan, inputs, scores, sampling, result)
        else:
            result.tokens = [[] for _ in plan.rows]
            self.table.advance(inputs, sampling, NO_IDS)

    def _sample(
        self, plan: StepPlan, inputs: StepInputs, scores: Scores, sampling: Sequence[int], result: StepResult
    ) -> None:
        """Choose the next token of the rows `sampling`, all that reach the end of their known tokens."""
        every = len(sampling) == len(plan.rows)
        slots, ends = (inputs.slots, inputs.ends) if every else (inputs.slots[sampling], inputs.ends[sampling])
        out = self.sampler.sample(scores, slots, ends)
        for i, error in out.failed.items():
            result.failed[plan.rows[sampling[i]].request_id] = error
        self.sampler.accept(slots, out.token_ids)
        self.table.advance(inputs, sampling, out.token_ids)
        if every:
            result.tokens = [[token] for token in out.tokens]
        else:
            result.tokens = [[] for _ in plan.rows]
            for i, token in zip(sampling, out.tokens, strict=True):
                result.tokens[i] = [token]
        for i in out.failed:
            result.tokens[sampling[i]] = []
        if out.logprobs:
            result.logprobs = {sampling[i]: [found] for i, found in out.logprobs.items()}

    def _prompt_logprobs(self, plan: StepPlan, inputs: StepInputs, hidden: Tensor, result: StepResult) -> None:
        """Log probabilities of the prompt tokens that follow the positions of rows that asked for them."""
        for i, row in enumerate(plan.rows):
            wanted = self._wants_prompt_logprobs.get(row.request_id)
            if wanted is None or row.num_logits < row.num_tokens:
                continue
            num, prompt_len = wanted
            start, begin = int(inputs.starts[i]), int(inputs.output_start[i])
            count = min(row.num_tokens, prompt_len - 1 - start)
            if count <= 0:
                continue
            following = self.table.tokens[inputs.slots[i], start + 1 : start + 1 + count].astype(np.int64)
            found: list[Logprobs] = []
            for at in range(0, count, LOGITS_PIECE):
                piece = hidden[begin + at : begin + min(at + LOGITS_PIECE, count)]
                found += self.sampler.prompt_logprobs(self.model.logits(piece), following[at : at + len(piece)], num)
            if any(math.isnan(entry.logprobs[0]) for entry in found):
                result.failed[row.request_id] = "the model's scores for the prompt are not numbers (NaN)"
            result.prompt_logprobs[i] = [*found]
