"""A pretended rank whose tokens are hashes of the KV contents it reads through its block tables.

A block that is wrong, stale, not filled or given to two requests changes a hash and so a token. What a request must get
is computed by `HashModel` from token ids alone, without blocks. Knows plans and results; knows no scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from penstock.config.model import KVGroup, KVLayout
from penstock.core.plan import Admitted, Logprobs, Row, StepPlan, StepResult
from penstock.core.request import Request

VOCAB_SIZE = 4096
EOS_IDS = frozenset(range(100))  # one token in forty ends a request


def fake_layout(windows: Sequence[int | None], block_size: int) -> KVLayout:
    """A layout with one KV group of one layer per entry: a window in tokens, or None for full attention."""
    return KVLayout(
        tuple(
            KVGroup(i, "full" if window is None else "window", (i,), window, block_size, 1, 8, "float32")
            for i, window in enumerate(windows)
        )
    )


class Run:
    """One sequence computed alone, extended as far as somebody asks."""

    def __init__(self, windows: Sequence[int | None], prompt: Sequence[int], seed: int) -> None:
        self.token_ids = list(prompt)
        self.contexts: list[int] = []  # per computed position
        self._windows, self._seed = windows, seed
        self._kv: list[list[int]] = [[] for _ in windows]

    def token(self, position: int) -> int:
        """The token at a position, of the prompt or after it."""
        while position >= len(self.token_ids):
            self._compute()
        return self.token_ids[position]

    def context(self, position: int) -> int:
        """What the logits at a position depend on."""
        while position >= len(self.contexts):
            self._compute()
        return self.contexts[position]

    def _compute(self) -> None:
        position = len(self.contexts)
        seen = [
            tuple(kv if window is None else kv[max(0, position - window + 1) :])
            for kv, window in zip(self._kv, self._windows, strict=True)
        ]
        contents, context = compute_position(self.token_ids[position], position, seen)
        for kv, content in zip(self._kv, contents, strict=True):
            kv.append(content)
        self.contexts.append(context)
        if position + 1 == len(self.token_ids):
            self.token_ids.append(sample(self._seed, position, context))


def compute_position(token: int, position: int, seen: Sequence[tuple[int, ...]]) -> tuple[list[int], int]:
    """What a position writes into each group's slot, and the context its logits see.

    `seen`: per group, the contents of the visible positions before it.
    """
    before = hash(tuple(seen))
    contents = [hash((group, token, position, before)) for group in range(len(seen))]
    return contents, hash((before, *contents))


def sample(seed: int, position: int, context: int) -> int:
    """The token that follows `position`."""
    return hash((seed, position, context)) % VOCAB_SIZE


def logprob_of(token: int, context: int) -> Logprobs:
    """A value that is right only if the context is."""
    return Logprobs([token], [-(hash((token, context)) % 4096) / 256], 1)


class HashModel:
    """Answers of requests computed alone. Keeps its runs: siblings and repeated prompts are computed once."""

    def __init__(self, layout: KVLayout) -> None:
        self.windows = tuple(group.window for group in layout.groups)
        self._runs: dict[tuple[tuple[int, ...], int], Run] = {}

    def run(self, prompt: tuple[int, ...], seed: int) -> Run:
        """The run of a prompt with a seed."""
        found = self._runs.get((prompt, seed))
        if found is None:
            found = self._runs[prompt, seed] = Run(self.windows, prompt, seed)
        return found

    def solo_tokens(self, request: Request) -> list[int]:
        """The output of `request` running alone to its own end, purely from token ids."""
        run = self.run(tuple(request.token_ids[: request.prompt_len]), request.seed)
        out: list[int] = []
        for position in range(request.prompt_len, request.max_total):
            out.append(run.token(position))
            if out[-1] in request.stop_ids and len(out) > request.params.min_tokens:
                break
        return out

    def solo_prompt_logprobs(self, request: Request) -> list[Logprobs]:
        """For the prompt positions 1 .. prompt_len - 1."""
        run = self.run(tuple(request.token_ids[: request.prompt_len]), request.seed)
        return [logprob_of(run.token(p + 1), run.context(p)) for p in range(request.prompt_len - 1)]


@dataclass(slots=True)
class _Sequence:
    """What the rank keeps of a request, from `admitted` to `released`."""

    admitted: Admitted
    token_ids: list[int]
    tables: list[list[int]]
    num_computed: int = -1  # -1: its first row says
    failed: bool = False


@dataclass(slots=True)
class _Lent:
    """Blocks that a submitted plan's row may touch, for the check that nobody else is given them meanwhile."""

    owner: object
    reads: set[tuple[int, int]]
    writes: set[tuple[int, int]]


@dataclass(slots=True)
class _Outside:
    """What is known of a request when a plan is submitted: tables so far, tokens that came back, drafts in flight."""

    tables: list[list[int]]
    num_known: int
    num_draft: int = 0
    mark: object = field(default_factory=object)


class FakeExecutor:
    """Runs plans against its own KV memory. Asserts what a rank may assume of plans.

    `lazy`: compute when collected, as a queue does, instead of when submitted. `guess_percent`: how many of its
    drafts are right. `failing`: ids whose next row fails. `arriving`: gates that the next result reports.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: Sequence[int],
        model: HashModel,
        *,
        depth: int = 1,
        feeds_back: bool = True,
        lazy: bool = True,
        guess_percent: int = 60,
        max_tokens: int = 1 << 30,
        max_rows: int = 1 << 30,
    ) -> None:
        self.depth, self.feeds_back, self.lazy, self.guess_percent = depth, feeds_back, lazy, guess_percent
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self.model, self.windows, self.block_size = model, model.windows, layout.block_size
        self.failing: set[str] = set()
        self.arriving: list[str] = []
        self.load: Callable[[int], bool] = lambda id_: True  # waits for a load under way; whether it came
        self.num_tokens = 0  # computed so far
        self.kv = [[[~(slot + 1)] * self.block_size for slot in range(n)] for n in num_blocks]
        self._sequences: dict[str, _Sequence] = {}
        self._outside: dict[str, _Outside] = {}
        self._plans: deque[tuple[StepPlan, StepResult | None, list[_Lent]]] = deque()
        self._last_step = -1

    @property
    def request_ids(self) -> set[str]:
        """Requests that the rank holds state of, as of the last submitted plan."""
        return set(self._outside)

    def submit(self, plan: StepPlan) -> None:
        assert len(self._plans) < self.depth, "more plans submitted than the executor is deep"
        assert plan.step > self._last_step
        self._last_step = plan.step
        assert plan.rows
        assert len(plan.rows) <= self.max_rows
        assert sum(row.num_tokens for row in plan.rows) <= self.max_tokens
        assert len({row.request_id for row in plan.rows}) == len(plan.rows), "a request twice in one plan"
        lent = self._lend(plan)
        self._plans.append((plan, None if self.lazy else self._compute(plan), lent))

    def collect(self) -> StepResult:
        plan, result, lent = self._plans.popleft()
        if result is None:
            result = self._compute(plan)
        for row, entry, tokens in zip(plan.rows, lent, result.tokens, strict=True):
            outside = self._outside.get(row.request_id)
            if outside is not None and outside.mark is entry.owner and row.request_id not in result.failed:
                outside.num_known += len(tokens)
                outside.num_draft -= row.num_draft
        return result

    # ---- what may be submitted ----

    def _lend(self, plan: StepPlan) -> list[_Lent]:
        """Follow the tables; no row may write what another row of this plan or of one in flight may touch."""
        for request_id in plan.released:
            del self._outside[request_id]
        for admitted in plan.admitted:
            assert admitted.request_id not in self._outside
            tables: list[list[int]] = [[] for _ in self.windows]
            self._outside[admitted.request_id] = _Outside(tables, len(admitted.token_ids))
        lent: list[_Lent] = []
        size = self.block_size
        in_flight = [entry for _, _, entries in self._plans for entry in entries]
        for row in plan.rows:
            outside = self._outside[row.request_id]
            start = row.start - outside.num_draft  # where it really starts, at the earliest
            outside.num_draft += row.num_draft
            if not self.feeds_back:
                assert row.start + row.num_tokens - row.num_draft <= outside.num_known, "needs a token in flight"
            assert 0 <= row.num_draft < row.num_tokens
            end = -(-(row.start + row.num_tokens) // size)
            entry = _Lent(outside.mark, set(), set())
            for g, (table, new, window) in enumerate(zip(outside.tables, row.new_block_ids, self.windows, strict=True)):
                table.extend(new)
                assert len(table) >= end, "the row has no blocks for its tokens"
                first = 0 if window is None else max(0, start - window + 1) // size
                entry.reads.update((g, b) for b in table[first:end])
                entry.writes.update((g, b) for b in table[start // size : end])
                assert 0 not in table[first:end], "the null block is visible"
            for other in (*in_flight, *lent):
                if other.owner is not entry.owner:
                    assert entry.writes.isdisjoint(other.reads | other.writes), "a block in use is written by another"
                    assert entry.reads.isdisjoint(other.writes), "a block is read while another may write it"
            lent.append(entry)
        return lent

    # ---- the rank ----

    def _compute(self, plan: StepPlan) -> StepResult:
        for request_id in plan.released:
            del self._sequences[request_id]
        for admitted in plan.admitted:
            assert admitted.request_id not in self._sequences
            self._sequences[admitted.request_id] = _Sequence(
                admitted, list(admitted.token_ids), [[] for _ in self.windows]
            )
        bad_loads = tuple(id_ for id_ in plan.awaits if not self.load(id_))
        result = StepResult(plan.step, [], arrived=tuple(self.arriving), seconds=0.001, bad_loads=bad_loads)
        self.arriving.clear()
        for i, row in enumerate(plan.rows):
            self.num_tokens += row.num_tokens
            sequence = self._sequences[row.request_id]
            if row.request_id in self.failing:
                self.failing.discard(row.request_id)
                sequence.failed = True
            if sequence.failed:
                result.failed[row.request_id] = "the pretended rank failed"
                result.tokens.append([])
                continue
            result.tokens.append(self._compute_row(i, row, sequence, result))
        return result

    def _compute_row(self, i: int, row: Row, sequence: _Sequence, result: StepResult) -> list[int]:
        admitted = sequence.admitted
        for table, new in zip(sequence.tables, row.new_block_ids, strict=True):
            table.extend(new)
        if sequence.num_computed < 0:
            sequence.num_computed = row.start
        start, num_known = sequence.num_computed, row.num_tokens - row.num_draft
        assert start <= row.start, "the plan's start is no upper bound"
        assert start + num_known <= len(sequence.token_ids), "a row over tokens that do not exist"
        assert row.samples == (start + num_known == len(sequence.token_ids))
        assert row.samples or not row.num_draft
        inputs = sequence.token_ids[start : start + num_known] + self._guess(sequence, row.num_draft)
        contexts = [self._compute_token(sequence, token, start + n) for n, token in enumerate(inputs)]

        if admitted.params.prompt_logprobs is not None and row.num_logits == row.num_tokens:
            end = min(start + row.num_tokens, admitted.prompt_len - 1)
            if start < end:
                result.prompt_logprobs[i] = [
                    logprob_of(sequence.token_ids[p + 1], contexts[p - start]) for p in range(start, end)
                ]
        if not row.samples:
            sequence.num_computed += row.num_tokens
            return []
        assert row.num_logits >= 1 + row.num_draft
        emitted: list[int] = []
        for n in range(num_known - 1, row.num_tokens):
            emitted.append(sample(admitted.seed, start + n, contexts[n]))
            if n + 1 < row.num_tokens and inputs[n + 1] != emitted[-1]:
                break
        sequence.num_computed = start + num_known + len(emitted) - 1
        sequence.token_ids += emitted
        if admitted.params.logprobs is not None:
            result.logprobs[i] = [logprob_of(t, contexts[num_known - 1 + n]) for n, t in enumerate(emitted)]
        return emitted

    def _compute_token(self, sequence: _Sequence, token: int, position: int) -> int:
        """Read what is visible through the block tables, write the position's slots; the context of its logits."""
        block, slot = divmod(position, self.block_size)
        seen = []
        for kv, table, window in zip(self.kv, sequence.tables, self.windows, strict=True):
            first = 0 if window is None else max(0, position - window + 1)
            contents: list[int] = []
            for id_ in table[first // self.block_size : block + 1]:
                contents += kv[id_]
            skip = first % self.block_size
            seen.append(tuple(contents[skip : skip + position - first]))
        contents, context = compute_position(token, position, seen)
        for kv, table, content in zip(self.kv, sequence.tables, contents, strict=True):
            kv[table[block]][slot] = content
        return context

    def _guess(self, sequence: _Sequence, num_draft: int) -> list[int]:
        """Drafts after the known tokens. It peeks at the answer, so that a chosen part of them is right."""
        if not num_draft:
            return []
        admitted, known = sequence.admitted, len(sequence.token_ids)
        run = self.model.run(admitted.token_ids[: admitted.prompt_len], admitted.seed)
        guesses = []
        for position in range(known, known + num_draft):
            right = hash((admitted.seed, position, 77)) % 100 < self.guess_percent
            guesses.append(run.token(position) if right else (run.token(position) + 1) % VOCAB_SIZE)
        return guesses
