"""A whole server on a pretended rank: real front end, wire, engine and scheduler; only the model is a script.

The rank answers every prompt with one of a few stories, a token per step, and takes about as long as a small model on
a CPU. `story_server` runs it in threads of this process on a free port of 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from tests.fakes.executor import fake_layout
from tests.shared import tiny_tokenizers

from penstock.config.schema import Config, ModelOptions, ServerOptions
from penstock.core.plan import Admitted, Row, StepPlan, StepResult
from penstock.core.policy import FcfsPolicy
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.loop import turn
from penstock.engine.messages import Ready
from penstock.engine.ranks import InlineExecutor
from penstock.engine.tokenizer import Tokenizer
from penstock.engine.wire import dial
from penstock.server.backend import OneEngine
from penstock.server.chat import ChatRenderer
from penstock.server.serve import run_server
from penstock.server.state import Served

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 32, 601, 2048
STEP_S, TOKEN_S = 0.006, 0.00012  # a step's fixed time, and per token of it
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STORIES = (
    "Once upon a time, there was a little boat named Lily. She loved to play outside on the river.\n\n"
    "One day the water rose, and `Lily` went <b>fast</b> over the dam. She laughed all the way down.\n\n"
    "```\nboat --speed fast\n```\n\nThe end.",
    "The quick brown fox jumps over the lazy dog, and then it sleeps in the park until the rain comes. "
    "Nobody minds the rain, for the park is green and the fox is warm. The dog dreams of the river.",
)


class StoryRank:
    """Runs plans: the token after a prompt is the next one of a story, chosen by the prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._stories = [[*tokenizer.encode(story, False), tokenizer.eos_ids[0]] for story in STORIES]
        self._known: dict[str, Admitted] = {}

    def run(self, plan: StepPlan) -> StepResult:
        """Sleeps for as long as the step would take."""
        for request_id in plan.released:
            self._known.pop(request_id, None)
        for admitted in plan.admitted:
            self._known[admitted.request_id] = admitted
        seconds = STEP_S + TOKEN_S * plan.num_tokens
        time.sleep(seconds)
        return StepResult(plan.step, [self._sampled(row) for row in plan.rows], seconds=seconds)

    def _sampled(self, row: Row) -> list[int]:
        if not row.samples:
            return []
        admitted = self._known[row.request_id]
        story = self._stories[sum(admitted.token_ids[: admitted.prompt_len]) % len(self._stories)]
        position = row.start + row.num_tokens - admitted.prompt_len
        return [story[min(position, len(story) - 1)]]


class EngineThread:
    """An engine in a thread that looks like a process to the server."""

    def __init__(self, address: str, tokenizer: Tokenizer, max_num_seqs: int) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(address, tokenizer, max_num_seqs), daemon=True)
        self._thread.start()

    def _run(self, address: str, tokenizer: Tokenizer, max_num_seqs: int) -> None:
        executor = InlineExecutor(StoryRank(tokenizer).run)
        limits = SchedulerLimits(max_num_seqs, max_num_batched_tokens=256)
        scheduler = Scheduler(fake_layout((None,), BLOCK_SIZE), (NUM_BLOCKS,), limits, FcfsPolicy(), model_id="story")
        engine_limits = EngineLimits(MAX_MODEL_LEN, tokenizer.vocab_size, frozenset(tokenizer.eos_ids))
        engine = Engine(scheduler, executor, engine_limits)
        wire = dial(address)
        try:
            wire.send(Ready("story", MAX_MODEL_LEN, BLOCK_SIZE, NUM_BLOCKS - 1, max_num_seqs, "pretended rank", [], []))
            while not engine.stopped and not self._stop.is_set():
                if not turn(engine, executor, wire, time.monotonic):
                    wire.wait(0.05)
        finally:
            wire.close()

    def poll(self) -> int | None:
        """As subprocess.Popen's."""
        return None if self._thread.is_alive() else 0

    def terminate(self) -> None:
        """End after the step that runs."""
        self._stop.set()

    kill = terminate


@dataclass
class StoryServer:
    """A running server: `base` is its URL without a slash at the end."""

    base: str = ""
    engine: EngineThread | None = None
    up: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def story_server(api_keys: Sequence[str] = (), max_num_seqs: int = 4) -> Iterator[StoryServer]:
    """A server that answers; stopped and joined afterwards."""
    tokenizer = Tokenizer(
        tiny_tokenizers.byte_level(),
        special_tokens={"eos_token": "<|im_end|>"},
        chat_templates={"default": TEMPLATE},
    )
    config = Config(
        model=ModelOptions(model="story"),
        server=ServerOptions(port=0, api_key=tuple(api_keys), disable_log_stats=True),
        origins={"model": ("flag", "--model"), "port": ("flag", "--port")},
    )
    server = StoryServer()

    def launch(address: str) -> EngineThread:
        server.engine = EngineThread(address, tokenizer, max_num_seqs)
        return server.engine

    def load() -> Served:
        return Served(("story",), "story", tokenizer, ChatRenderer(tokenizer.chat_templates), tokenizer.vocab_size)

    def on_ready(ready: Ready, url: str) -> None:
        server.base = url
        server.up.set()

    thread = threading.Thread(target=run_server, args=(config, OneEngine(launch), load), kwargs={"on_ready": on_ready})
    thread.start()
    try:
        if not server.up.wait(30):
            raise RuntimeError("the server did not come up")
        yield server
    finally:
        if server.engine is not None:
            server.engine.terminate()  # the server ends when its engine does
        thread.join(20)
        assert not thread.is_alive()
