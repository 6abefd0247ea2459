"""An engine process: `python -m penstock.build.engine_process START [NAME BEATS]`.

It reads its configuration from standard input, later the address of the front end's wire, dials it and serves until it
is drained. START: when it was launched, monotonic seconds. NAME: of an engine among others; BEATS: the descriptor of
the pipe by which it says that it goes on. Imports no torch at its top (build/start.py says why).
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from functools import partial
from queue import SimpleQueue

from penstock.build.handover import decode
from penstock.build.start import Stages, begin, import_builder, import_member, no_collections
from penstock.config.kv_events import event_settings
from penstock.config.load import debug_wanted
from penstock.config.log import set_up_logging
from penstock.engine.garbage import rare_collections
from penstock.engine.loop import run_engine
from penstock.engine.messages import Fatal, Progress
from penstock.engine.wire import ZmqWire, dial


def main(encoded: bytes, address: SimpleQueue[str], start_s: float, beats: int | None = None) -> int:
    """The engine process: 0 after a drain, 1 after an error that the front end has been told."""
    stages = Stages(start_s)
    stages.done("start Python")
    handover = decode(encoded)
    resolved, seat = handover.resolved, handover.seat
    set_up_logging(resolved.config.runtime.log_level, "" if seat is None else seat.name)
    if seat is not None and seat.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, seat.cores)
    with no_collections():
        arena = begin(resolved)
        builder = import_builder()
        stages.done("import torch")
        wire = dial(address.get())
        try:
            built = builder.build_engine(
                resolved,
                lambda stage, done, total: wire.send(Progress(stage, done, total)),
                stages,
                arena,
                seat,
                handover.pool,
            )
            del arena  # the weights keep it
            settings = event_settings(resolved.config.cluster.kv_events_config)
            if seat is not None:
                run = import_member().member_loop(built, seat, wire, settings, beats)
            else:
                beside = None if settings is None else import_member().event_publisher(built, settings).turn
                run = partial(run_engine, built.engine, built.executor, wire, time.monotonic, beside)
                wire.send(built.ready)
        except Exception as error:
            return _tell(wire, error)
    gc.freeze()  # torch stays: walking its objects would stop the engine for 0.2 s now and then
    try:
        with rare_collections():
            run()
        built.close()
        return 0
    except Exception as error:
        return _tell(wire, error)
    finally:
        wire.close()
        gc.unfreeze()  # so that the interpreter takes everything down


def _tell(wire: ZmqWire, error: Exception) -> int:
    """Say what ends the engine; its exit code."""
    if debug_wanted():
        raise error
    ours = type(error).__module__.startswith("penstock.") and str(error)  # says it all, for people
    wire.send(Fatal(str(error) if ours else f"{type(error).__name__}: {error}"))
    wire.close()
    return 1


def _read(num_bytes: int) -> bytes:
    """The next bytes of standard input, and none behind them. Leaves when the front end is gone."""
    found = b""
    while len(found) < num_bytes:
        part = os.read(sys.stdin.fileno(), num_bytes - len(found))
        if not part:
            os._exit(1)
        found += part
    return found


def _hear_front_end(address: SimpleQueue[str]) -> None:
    """Its address comes in one piece. Exit when standard input ends: it was killed and could not say anything."""
    found = os.read(sys.stdin.fileno(), 4096)  # not through the buffer: its lock would make Python's own shutdown fatal
    if found:
        address.put(found.decode())
        os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    # The front end decides when to stop; a Ctrl-C in the terminal, or systemd, signals the whole process group.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configuration = _read(int.from_bytes(_read(8), "little"))
    front_end: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_hear_front_end, args=(front_end,), name="penstock-parent", daemon=True).start()
    sys.exit(main(configuration, front_end, float(sys.argv[1]), int(sys.argv[3]) if len(sys.argv) > 3 else None))
