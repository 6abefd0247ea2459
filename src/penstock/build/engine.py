"""From a complete configuration to a running engine: model, weights, KV pools, runner, scheduler, executor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from penstock.build.start import Stages
from penstock.build.tiers import Tiers, open_tiers
from penstock.cluster.pool import PoolGone
from penstock.cluster.seat import Seat
from penstock.config.complete import Resolved, can_pack
from penstock.config.fingerprint import model_fingerprint
from penstock.config.kv_pool import pool_settings
from penstock.config.model import KVLayout
from penstock.config.schema import Config
from penstock.config.values import ConfigError
from penstock.core.plan import StepPlan, StepResult
from penstock.core.scheduler import Scheduler
from penstock.core.steps import SchedulerLimits
from penstock.engine.engine import Engine, EngineLimits
from penstock.engine.messages import Ready
from penstock.engine.movers import Movers
from penstock.engine.ranks import InlineExecutor, ThreadExecutor
from penstock.engine.recorder import RecordingScheduler, Setup
from penstock.nn.allocator import bound_kernel_caches, keep_freed_memory
from penstock.nn.doors import AttentionBackend
from penstock.nn.kernels.attention import PagedAttention
from penstock.nn.kernels.native import (
    NativeAttention,
    NativeModel,
    PackedWeights,
    check_layout,
    load_native,
    packed_layout,
    usable_kernels,
)
from penstock.nn.kernels.native_recording import Unsupported
from penstock.nn.models import create_model, model_routes
from penstock.nn.models.llama import LlamaModel
from penstock.nn.weights.create import init_dummy
from penstock.nn.weights.stream import load_weights
from penstock.runner.inputs import RequestTable
from penstock.runner.kv_store import KVStore
from penstock.runner.runner import Model, Runner
from penstock.runner.sampler import Sampler
from penstock.transfer.counter import StepCounter
from penstock.transfer.frames import Identity
from penstock.transfer.memory import KVMemory
from penstock.transfer.mover import LinkMover

log = logging.getLogger("penstock.engine")

ProgressCallback = Callable[[str, int, int], None]
# Setting -> formats of the layers' projections and of the head, whose rows the token table may be.
QUANTIZATION = {
    "none": ("bf16", "bf16"),
    "int8": ("int8", "int8"),
    "w8a8": ("w8a8", "w8a8"),
    "int4": ("int4", "int8"),
    "w4a8": ("w4a8", "w8a8"),
    "bf12": ("bf12", "bf12"),
}


@dataclass(slots=True)
class BuiltEngine:
    """An engine that can take requests, and what it tells about itself. `runner`: for those who measure it.

    `counter`: how far the running step is, where the engine has links.
    """

    engine: Engine
    executor: InlineExecutor | ThreadExecutor
    runner: Runner
    ready: Ready
    links: LinkMover | None = None
    tiers: Tiers | None = None
    counter: StepCounter | None = None

    def close(self) -> None:
        """After the last step: let its threads end."""
        self.executor.close()
        if self.links is not None:
            self.links.close()
        if self.tiers is not None:
            self.tiers.close()


def build_engine(
    resolved: Resolved,
    progress: ProgressCallback,
    stages: Stages,
    arena: Any | None = None,
    seat: Seat | None = None,
    pool: str = "",
) -> BuiltEngine:
    """Load the model and put an engine around it, weights into the arena where one was begun.

    `seat`: its place among engines that hand prompts to one another: then it has links. `pool`: the directory of the
    machine's KV pool where that is a process of its own. torch's number of threads is
    changed on the calling thread while this runs and while a step does, and is as before in between. Raises
    CheckpointError, MemoryError.
    """
    config = resolved.config
    assert config.runtime.num_threads is not None
    with torch_threads(config.runtime.num_threads):
        return _build(resolved, progress, stages, arena, seat, pool)


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """torch's operations of the calling thread use `number` threads meanwhile (OpenMP keeps the number per thread)."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stepping(run: Callable[[StepPlan], StepResult], threads: int) -> Callable[[StepPlan], StepResult]:
    """`run` with torch on `threads` threads.

    One beside native kernels: their team has the processors, what torch does there is small, and OpenMP's workers
    would spin after each operation where nobody could tell them not to: in a process that imported torch before
    penstock (config/openmp.py), steps of a small model took 2.5 times as long.
    """

    def step(plan: StepPlan) -> StepResult:
        with torch_threads(threads):
            return run(plan)

    return step


def _build(
    resolved: Resolved, progress: ProgressCallback, stages: Stages, arena: Any | None, seat: Seat | None, pool: str
) -> BuiltEngine:
    config, shape = resolved.config, resolved.model
    assert config.runtime.num_threads is not None and config.model.max_model_len is not None
    keep_freed_memory()
    bound_kernel_caches()
    device, dtype = torch.device("cpu"), getattr(torch, config.model.dtype)
    progress("allocating", 0, 0)
    model = create_model(shape, dtype, device, config.model.max_model_len)
    weights, kernels = _native_weights(resolved, model, arena)
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
            packer=weights,
            quantization=shape.quantization,
        )
    stages.done("load weights")
    progress("allocating KV", 0, 0)
    layout = resolved.layout if weights is None else packed_layout(resolved.layout)
    num_blocks = resolved.memory.num_blocks
    max_num_seqs = config.scheduler.max_num_seqs
    store = KVStore(layout, num_blocks, device)
    table = RequestTable(max_num_seqs, config.model.max_model_len, len(layout.groups), layout.block_size)
    computing: Model = model
    attention: AttentionBackend = PagedAttention(layout, store.pools, dtype)
    if weights is not None:
        max_tokens = config.scheduler.max_num_batched_tokens
        computing = NativeModel(model, weights, layout, store.pools, kernels=kernels, max_tokens=max_tokens)
        attention = NativeAttention()
    tiers = None
    if config.cache.kv_offloading_size is not None:
        directory = (seat and seat.directory) or pool or None
        try:
            tiers = open_tiers(pool_settings(config), layout, store.byte_views(), directory)
        except PoolGone as error:  # an engine that computes everything is better than none
            log.error("%s: this engine goes on without KV tiers", error)
    counter = None if seat is None else StepCounter()
    sampler = Sampler(max_num_seqs, shape.vocab_size)
    loads = None if tiers is None else tiers.mover
    runner = Runner(computing, attention, sampler, table, counter=counter, loads=loads)
    links = None if seat is None or counter is None else _links(seat, layout, store, counter)
    run = _stepping(runner.run, config.runtime.num_threads if weights is None else 1)
    executor = ThreadExecutor(run) if config.scheduler.async_scheduling == "on" else InlineExecutor(run)
    setup = Setup(
        layout=layout,
        num_blocks=num_blocks,
        limits=SchedulerLimits(
            max_num_seqs, config.scheduler.max_num_batched_tokens, config.scheduler.max_queue_wait_s
        ),
        policy=_policy(config, seat),
        model_id=f"{shape.architecture}:{_fingerprint(resolved)}",
        prefix_caching=config.cache.enable_prefix_caching,
        feeds_back=executor.feeds_back,
    )
    scheduler = _scheduler(setup, config.scheduler.record_path)
    source = None if tiers is None else tiers.source(config.cache, layout, scheduler)
    scheduler.source = source
    engine = Engine(
        scheduler,
        executor,
        EngineLimits(config.model.max_model_len, shape.vocab_size, frozenset(shape.eos_token_ids)),
        links if tiers is None else Movers(tiers.mover, links),
        tiers=source,
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
        cache_model=setup.model_id,
        cache_format=layout.format,
        block_bytes=sum(group.block_bytes for group in layout.groups),
    )
    return BuiltEngine(engine, executor, runner, ready, links, tiers, counter)


def _fingerprint(resolved: Resolved) -> str:
    """Of what KV depends on beside its layout: tiers outlive the engine, and machines that share them keep the
    checkpoint in different places."""
    model = resolved.config.model
    random = model.seed if model.load_format == "dummy" else None
    return model_fingerprint(resolved.directory, model.dtype, model.quantization, model.load_format == "dummy", random)


def _policy(config: Config, seat: Seat | None) -> str:
    """The scheduling policy: on a prefill engine short prompts go first, unless somebody has chosen."""
    chosen = config.scheduler.scheduling_policy
    is_open = config.origins.get("scheduling_policy", ("default", ""))[0] == "default"
    return "sjf_aged" if is_open and seat is not None and seat.role == "prefill" else chosen


def _links(seat: Seat, layout: KVLayout, store: KVStore, counter: StepCounter) -> LinkMover:
    """What carries KV to and from other engines."""
    places = {"shm": f"{seat.directory}/{seat.name}.link", "local": seat.name}
    address = f"{seat.link}://{places.get(seat.link) or (seat.host or '127.0.0.1') + ':0'}"
    identity = Identity(seat.name, layout.format, seat.secret.encode())
    memory = KVMemory(layout, store.byte_views())
    return LinkMover(memory, counter, identity, [address], mode=seat.link_mode)


def _native_weights(resolved: Resolved, model: LlamaModel, arena: Any | None) -> tuple[PackedWeights | None, str]:
    """(where native kernels take their weights, the kernels' name), or (None, why plain torch computes instead).

    Raises ConfigError when the settings ask for native kernels that cannot be had.
    """
    config = resolved.config
    wanted, scheme = config.runtime.cpu_kernels, config.model.quantization
    stored = resolved.model.quantization is not None
    if stored and (config.model.load_format != "dummy" or scheme == "mixed" or wanted == "torch"):
        scheme = "none"  # what the checkpoint holds comes as it is; the rest stays plain
    assert config.runtime.num_threads is not None
    if wanted == "torch":
        if scheme != "none":
            raise ConfigError(f"{scheme} needs native kernels, and --cpu-kernels torch is without", "--quantization")
        return None, "plain torch"
    try:
        load_native()
        usable = usable_kernels()
        if not usable or wanted not in ("auto", *usable):
            name = "native" if wanted == "auto" else wanted
            raise Unsupported(f"this machine has no {name} kernels; usable: {', '.join(usable) or 'none'}")
        weights = PackedWeights(model, config.runtime.num_threads, QUANTIZATION[scheme], arena)
        check_layout(resolved.layout)
    except Unsupported as error:
        if arena is not None:
            arena.finish()  # its memory was for nothing
        if scheme != "none":
            raise ConfigError(f"{scheme} needs native kernels: {error}", "--quantization") from None
        if wanted != "auto":
            raise ConfigError(str(error), "--cpu-kernels") from None
        if stored and can_pack(wanted, config.model.dtype, resolved.model, resolved.layout):
            hint = "--cpu-kernels torch computes with its weights dequantized, in the memory of a plain model"
            raise ConfigError(
                f"this quantized checkpoint needs native kernels: {error}; {hint}", "--cpu-kernels"
            ) from None
        log.warning("plain torch computes, slower: %s", str(error))  # a record of the error would keep the weights
        return None, f"plain torch: {error}"
    return weights, usable[0] if wanted == "auto" else wanted


def _scheduler(setup: Setup, record_path: str | None) -> Scheduler:
    if record_path is None:
        return setup.build()
    return RecordingScheduler(setup, Path(record_path).open("wb"))
