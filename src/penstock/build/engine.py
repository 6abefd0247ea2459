"""From a complete configuration to a running engine: model, weights, KV pools, runner, scheduler, executor.

`python -m penstock.build.engine ADDRESS START` is an engine process: it reads its configuration from standard input,
dials the front end's wire and serves until it is drained. START: when it was launched, monotonic seconds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from penstock.build.handover import decode_resolved
from penstock.config.complete import Resolved
from penstock.config.values import ConfigError
from penstock.core.scheduler import Scheduler, SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.loop import run_engine
from penstock.engine.messages import Fatal, Progress, Ready
from penstock.engine.ranks import InlineExecutor, ThreadExecutor
from penstock.engine.recorder import RecordingScheduler, Setup
from penstock.engine.wire import dial
from penstock.nn.allocator import bound_kernel_caches, keep_freed_memory
from penstock.nn.doors import AttentionBackend
from penstock.nn.kernels.attention import PagedAttention
from penstock.nn.kernels.native import (
    NativeAttention,
    NativeModel,
    PackedWeights,
    Unsupported,
    check_layout,
    load_native,
    usable_kernels,
)
from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.create import init_dummy
from penstock.nn.weights.stream import load_weights
from penstock.runner.inputs import RequestTable
from penstock.runner.kv_store import KVStore
from penstock.runner.runner import Model, Runner
from penstock.runner.sampler import Sampler

ProgressCallback = Callable[[str, int, int], None]
# Setting -> formats of the layers' projections and of the head, whose rows the token table may be.
QUANTIZATION = {
    "none": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "w8a8": ("w8a8", "w8a8"),
    "int4": ("int4", "int8"),
    "w4a8": ("w4a8", "w8a8"),
}


@dataclass(slots=True)
class BuiltEngine:
    """An engine that can take requests, and what it tells about itself."""

    engine: Engine
    executor: InlineExecutor | ThreadExecutor
    ready: Ready


class Stages:
    """The start-up timeline: which stage took how long. Consecutive, so that every second is accounted for."""

    def __init__(self, start_s: float) -> None:
        self.rows: list[tuple[str, float]] = []
        self._last_s = start_s

    def done(self, name: str) -> None:
        """The time since the last call belongs to `name`."""
        now = time.monotonic()
        self.rows.append((name, now - self._last_s))
        self._last_s = now


def build_engine(resolved: Resolved, progress: ProgressCallback, stages: Stages) -> BuiltEngine:
    """Load the model and put an engine around it. Raises CheckpointError, MemoryError; changes torch's thread count."""
    config, shape = resolved.config, resolved.model
    assert config.runtime.num_threads is not None and config.model.max_model_len is not None
    keep_freed_memory()
    bound_kernel_caches()
    torch.set_num_threads(config.runtime.num_threads)
    device, dtype = torch.device("cpu"), getattr(torch, config.model.dtype)
    progress("allocating", 0, 0)
    model = create_model(shape, dtype, device)
    weights, kernels = _native_weights(resolved, model)
    stages.done("allocate model")
    if config.model.load_format == "dummy":
        init_dummy(model, config.model.seed)
    else:
        load_weights(
            resolved.directory,
            model,
            model_routes(shape),
            threads=config.runtime.num_threads,
            progress=lambda done, total: progress("loading weights", done, total),
            filled=None if weights is None else weights.take,
            quantization=shape.quantization,
            take=None if weights is None else weights.take_rows,
        )
    stages.done("load weights")
    progress("allocating KV", 0, 0)
    layout, num_blocks = resolved.layout, resolved.memory.num_blocks
    max_num_seqs = config.scheduler.max_num_seqs
    store = KVStore(layout, num_blocks, device)
    table = RequestTable(max_num_seqs, config.model.max_model_len, len(layout.groups), layout.block_size)
    computing: Model = model
    attention: AttentionBackend = PagedAttention(layout, store.pools, dtype)
    if weights is not None:
        max_tokens = config.scheduler.max_num_batched_tokens
        computing = NativeModel(model, weights, layout, store.pools, kernels=kernels, max_tokens=max_tokens)
        attention = NativeAttention()
    runner = Runner(computing, attention, store, Sampler(max_num_seqs, shape.vocab_size), table)
    executor = ThreadExecutor(runner.run) if config.scheduler.async_scheduling == "on" else InlineExecutor(runner.run)
    setup = Setup(
        layout=layout,
        num_blocks=num_blocks,
        limits=SchedulerLimits(
            max_num_seqs, config.scheduler.max_num_batched_tokens, config.scheduler.max_queue_wait_s
        ),
        policy=config.scheduler.scheduling_policy,
        model_id=f"{shape.architecture}:{resolved.directory.resolve()}:{config.model.dtype}",
        prefix_caching=config.cache.enable_prefix_caching,
        feeds_back=executor.feeds_back,
    )
    engine = Engine(
        _scheduler(setup, config.scheduler.record_path),
        executor,
        EngineLimits(config.model.max_model_len, shape.vocab_size, frozenset(shape.eos_token_ids)),
    )
    stages.done("allocate KV")
    names = config.model.served_model_name or (config.model.model,)
    ready = Ready(
        model_id=names[0],
        max_model_len=config.model.max_model_len,
        block_size=layout.block_size,
        num_blocks=num_blocks[0] - 1,
        max_num_seqs=max_num_seqs,
        device=f"cpu, {config.runtime.num_threads} threads, {kernels}{' kernels' if weights else ''}",
        memory=list(resolved.memory.rows),
        timeline=stages.rows,
    )
    return BuiltEngine(engine, executor, ready)


def _native_weights(resolved: Resolved, model: LlamaModel) -> tuple[PackedWeights | None, str]:
    """(where native kernels take their weights, the kernels' name), or (None, why plain torch computes instead).

    Raises ConfigError when the settings ask for native kernels that cannot be had.
    """
    config = resolved.config
    wanted, scheme = config.runtime.cpu_kernels, config.model.quantization
    if resolved.model.quantization is not None and (config.model.load_format != "dummy" or scheme == "mixed"):
        scheme = "none"  # what the checkpoint holds comes as it is; the rest stays plain
    assert config.runtime.num_threads is not None
    if wanted == "torch" and scheme == "none":
        return None, "plain torch"
    try:
        load_native()
        usable = usable_kernels()
        if not usable or wanted not in ("auto", *usable):
            name = "native" if wanted == "auto" else wanted
            raise Unsupported(f"this machine has no {name} kernels; usable: {', '.join(usable) or 'none'}")
        check_layout(resolved.layout)
        weights = PackedWeights(model, config.runtime.num_threads, QUANTIZATION[scheme])
    except Unsupported as error:
        if scheme != "none":
            raise ConfigError(f"{scheme} needs native kernels: {error}", "--quantization") from None
        if wanted != "auto":
            raise ConfigError(str(error), "--cpu-kernels") from None
        return None, f"plain torch: {error}"
    return weights, usable[0] if wanted == "auto" else wanted


def _scheduler(setup: Setup, record_path: str | None) -> Scheduler:
    if record_path is None:
        return setup.build()
    return RecordingScheduler(setup, Path(record_path).open("wb"))


def main(address: str, encoded: bytes, start_s: float) -> int:
    """The engine process: 0 after a drain, 1 after an error that the front end has been told."""
    stages = Stages(start_s)
    stages.done("import torch")
    wire = dial(address)
    resolved = decode_resolved(encoded)
    try:
        built = build_engine(resolved, lambda stage, done, total: wire.send(Progress(stage, done, total)), stages)
        wire.send(built.ready)
        run_engine(built.engine, built.executor, wire, time.monotonic)
        built.executor.close()
        return 0
    except Exception as error:
        if os.environ.get("PENSTOCK_DEBUG"):
            raise
        ours = type(error).__module__.startswith("penstock.") and str(error)  # says it all, for people
        wire.send(Fatal(str(error) if ours else f"{type(error).__name__}: {error}"))
        return 1
    finally:
        wire.close()


def _leave_with_parent() -> None:
    """Exit when the front end's end of standard input closes: it was killed and could not say anything."""
    os.read(sys.stdin.fileno(), 1)  # not through the buffer: its lock would make Python's own shutdown fatal
    os._exit(1)


if __name__ == "__main__":
    # The front end decides when to stop; a Ctrl-C in the terminal, or systemd, signals the whole process group.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    configuration = sys.stdin.buffer.read(size)
    threading.Thread(target=_leave_with_parent, name="penstock-parent", daemon=True).start()
    sys.exit(main(sys.argv[1], configuration, float(sys.argv[2])))
