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

from penstock.core.plan import Logprobs, Row, StepPlan, StepResult
from penstock.nn.doors import AttentionBackend, Batch, Scores, Spans
from penstock.nn.words import StepWords
from penstock.runner.inputs import RequestTable, StepInputs
from penstock.runner.kv_store import KVStore
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
        store: KVStore,
        sampler: Sampler,
        table: RequestTable,
        counter: StepCounter | None = None,
        loads: Loads | None = None,
        load_patience_s: float = 10.0,
    ) -> None:
        self.model = model
        self.attention = attention
        self.store = store
        self.sampler = sampler
        self.table = table
        self.counter = counter
        self.loads = loads
        self.load_patience_s = load_patience_s
        # Entering this mode takes as long as all index arrays of a step: only torch's own modules need it.
        self._without_autograd = torch.inference_mode if isinstance(model, torch.nn.Module) else nullcontext
        self._wants_prompt_logprobs: dict[str, tuple[int, int]] = {}  # request id -> (how many, prompt_len)

    def run(self, plan: StepPlan) -> StepResult:
        """Apply `released` and `admitted`, compute the rows, sample where they end. Exactness: E1 in plain torch."""
        with self._without_autograd():
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepResult:
        begin = time.perf_counter()
        self._apply(plan)
        inputs = self.table.prepare(plan)
        spans = Spans(inputs.query_start, inputs.starts, inputs.tables)
        words = self._words(plan)
        attention = self.attention.prepare(spans, words)
        outputs = None if inputs.outputs is None else torch.from_numpy(inputs.outputs)
        batch = Batch(torch.from_numpy(inputs.token_ids), torch.from_numpy(inputs.positions), attention, outputs)
        hidden = self.model(batch)
        if self.counter is not None:
            self.counter.end()
        result = StepResult(plan.step, [])
        if self._wants_prompt_logprobs:
            self._prompt_logprobs(plan, inputs, hidden, result)
        self._sample(plan, inputs, hidden, result)
        self.table.num_computed[inputs.slots] += inputs.nums
        if words is not None:
            result.bad_loads = tuple(plan.awaits[i] for i in words.bad())
        result.seconds = time.perf_counter() - begin
        return result

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
            self._fail(plan.rows[rows[n]], "the model's states for the prompt are not numbers (NaN)", result)

    def _sample(self, plan: StepPlan, inputs: StepInputs, hidden: Tensor, result: StepResult) -> None:
        """Choose the next token of every row that reaches the end of its known tokens."""
        silent = [i for i, row in enumerate(plan.rows) if not row.samples]
        every = not silent
        sampling = range(len(plan.rows)) if every else [i for i, row in enumerate(plan.rows) if row.samples]
        if silent:
            self._fail_broken_chunks(plan, silent, inputs, hidden, result)
            if len(silent) == len(plan.rows):
                result.tokens = [[] for _ in plan.rows]
                return
        last = inputs.output_start[1:] - 1
        ends = inputs.starts + inputs.nums
        slots = inputs.slots
        if not every:
            last, ends, slots = last[sampling], ends[sampling], slots[sampling]
        if len(last) < hidden.shape[0]:
            hidden = hidden[torch.from_numpy(last)]
        out = self.sampler.sample(self.model.scores(hidden), slots, ends)
        self.table.tokens[slots, ends] = out.token_ids
        self.sampler.accept(slots, out.token_ids)
        tokens = out.token_ids.tolist()
        if every:
            result.tokens = [[token] for token in tokens]
            result.logprobs = {i: [found] for i, found in out.logprobs.items()}
        else:
            result.tokens = [[] for _ in plan.rows]
            for i, token in zip(sampling, tokens, strict=True):
                result.tokens[i] = [token]
            result.logprobs = {sampling[i]: [found] for i, found in out.logprobs.items()}
        for i, error in out.failed.items():
            self._fail(plan.rows[sampling[i]], error, result)
            result.tokens[sampling[i]] = []

    def _fail(self, row: Row, error: str, result: StepResult) -> None:
        """The row's scores are not numbers: its request fails; what it wrote is cleaned for the blocks' next owners."""
        result.failed[row.request_id] = error
        slot = self.table.slots[row.request_id]
        first = int(self.table.num_computed[slot]) // self.table.block_size  # earlier blocks may be shared
        for g in range(len(self.table.tables)):
            self.store.clean(g, self.table.blocks_of(g, slot)[first:].tolist())

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
                self._fail(row, "the model's scores for the prompt are not numbers (NaN)", result)
            result.prompt_logprobs[i] = [*found]
