"""Wires: what goes in comes out, in order, over both kinds; bounded, closed cleanly, and fed into a loop in batches."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.plan import Logprobs
from penstock.core.request import SamplingParams
from penstock.engine import wire as wire_module
from penstock.engine.messages import (
    AddRequest,
    CancelRequest,
    Drain,
    Explain,
    Failed,
    Fatal,
    FromEngine,
    KVReport,
    Miss,
    Progress,
    Ready,
    Record,
    Report,
    RequestRecord,
    ResetPrefixCache,
    Span,
    Stopped,
    ToEngine,
    TokenDelta,
    Tokens,
    Watch,
)
from penstock.engine.wire import LoopWire, WireFull, dial, listen, local_pair

PARAMS = SamplingParams(
    stop=("a", "b"), logit_bias={3: -1.5}, allowed_token_ids=(1, 2), bad_words_ids=((1,), (2, 3)), seed=2**64 - 1,
    extra_args={"x": [1, {"y": None}]},
)  # fmt: skip
RECORD = RequestRecord(
    "r",
    "finished",
    9,
    4,
    2,
    0.5,
    0.6,
    0.7,
    0.8,
    "stop",
    1,
    "budget",
    [Span("queue", 0.5, None)],
    Miss("tail", 4, "."),
    4,
)
TO_ENGINE: list[ToEngine] = [
    AddRequest("r", [1, 2, 3], PARAMS, 2**64 - 1, 1.5, 2.5, -1, "adapter", "salt"),
    CancelRequest("r", "stop", "\n"),
    Watch(3.0),
    ResetPrefixCache(),
    Drain(9.0),
    Explain("r"),
]
FROM_ENGINE: list[FromEngine] = [
    Progress("weights", 1, 2),
    Ready("m", 100, 16, 10, 4, "cpu", [("a", "b")], [("c", 1.0)]),
    Tokens([TokenDelta("r", [7], None, None, [Logprobs([7, 8], [-0.5, float("-inf")], 1)], [None], 3)], 1.0),
    Tokens([TokenDelta("r", [], "stop", 5, record=RECORD), TokenDelta("q", [1], "stop", "x")], 1.0),
    Failed("r", 500, "why"),
    Record(RECORD),
    Report(
        1.0, 1, 2, {"budget": 2}, KVReport(16, 10, 1, 2, 3, 4, 0, 1, 1, "u1"), 1, 0.5, 1, 1, 1, 0, 3, 2, [5], [RECORD]
    ),
    Fatal("over"),
    Stopped(),
]


def pull(wire: Any, number: int) -> list[Any]:
    """Receive until `number` messages have come."""
    got: list[Any] = []
    while len(got) < number:
        assert wire.wait(5.0), f"only {len(got)} of {number} messages came"
        got += wire.receive()
    return got


def test_local_pair_hands_messages_over_as_they_are() -> None:
    front, engine = local_pair()
    assert engine.receive() == []
    for message in TO_ENGINE:
        front.send(message)
    received = engine.receive()
    assert all(a is b for a, b in zip(received, TO_ENGINE, strict=True))
    assert not engine.wait(0.0)
    engine.send(FROM_ENGINE[0])
    assert front.wait(0.0)
    assert front.receive() == [FROM_ENGINE[0]]


@pytest.mark.parametrize("address", [None, "tcp://127.0.0.1:*"])
def test_every_message_survives_the_zmq_wire(address: str | None) -> None:
    front = listen(address)
    engine = dial(front.address)
    try:
        for answer in FROM_ENGINE:
            engine.send(answer)
        assert pull(front, len(FROM_ENGINE)) == FROM_ENGINE
        for message in TO_ENGINE:
            front.send(message)
        assert pull(engine, len(TO_ENGINE)) == TO_ENGINE
    finally:
        engine.close()
        front.close()


def test_the_socket_file_is_private_and_goes_away() -> None:
    front = listen()
    path = Path(front.address.removeprefix("ipc://"))
    assert path.parent.stat().st_mode & 0o077 == 0
    front.close()
    assert not path.parent.exists()
    front.close()  # twice is fine


def test_an_engine_may_dial_before_anybody_listens(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/late"
    engine = dial(address)
    engine.send(Progress("early", 0, 1))
    front = listen(address)
    try:
        assert pull(front, 1) == [Progress("early", 0, 1)]
    finally:
        engine.close()
        front.close()


def test_receive_is_bounded_and_keeps_order() -> None:
    front = listen()
    engine = dial(front.address)
    try:
        for number in range(50):
            engine.send(Progress("n", number, 50))
        got: list[Any] = []
        while len(got) < 50:
            assert front.wait(5.0)
            batch = front.receive(7)
            assert len(batch) <= 7
            got += batch
        assert [message.done for message in got] == list(range(50))
    finally:
        engine.close()
        front.close()


def test_a_full_wire_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "MAX_QUEUED", 4)
    front = listen()
    big = AddRequest("r", list(range(20_000)), PARAMS, 0, 0.0)
    try:
        with pytest.raises(WireFull):
            front.send(big)  # nobody has dialled
        engine = dial(front.address)
        engine.send(Stopped())
        pull(front, 1)
        with pytest.raises(WireFull):
            for _ in range(1000):
                front.send(big)
        engine.close(0.0)
    finally:
        front.close(0.0)


def test_a_foreign_frame_is_dropped_and_the_wire_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    front = listen()
    engine = dial(front.address)
    try:
        engine.socket.send(b"\xc1 this is no message")
        engine.socket.send(msgspec.msgpack.encode(["Tokens", "no list", 1.0]))
        engine.send(Stopped())
        assert pull(front, 1) == [Stopped()]
        assert caplog.text.count("does not decode") == 2
    finally:
        engine.close()
        front.close()


def test_a_message_sent_right_before_close_arrives() -> None:
    front = listen()
    script = "import sys; from penstock.engine.wire import dial; from penstock.engine.messages import Fatal\n"
    script += "wire = dial(sys.argv[1]); wire.send(Fatal('last words')); wire.close()"
    try:
        subprocess.run(
            [sys.executable, "-c", script, front.address],
            check=True,
            timeout=60,
            env={"PYTHONPATH": ":".join(sys.path)},
        )
        assert pull(front, 1) == [Fatal("last words")]
    finally:
        front.close()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 16))
def test_a_loop_gets_everything_in_order_whatever_the_bursts(bursts: list[int], max_batch: int) -> None:
    """Edge-triggered descriptor: no message may stay behind, also when sends happen in between."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        front = listen()
        engine = dial(front.address)
        got: list[int] = []
        done = asyncio.Event()

        def take(messages: Sequence[Any]) -> None:
            assert 0 < len(messages) <= max_batch
            got.extend(message.done for message in messages)
            feed.send(ResetPrefixCache())
            if len(got) == sum(bursts):
                done.set()

        feed = LoopWire(front, loop, take, max_batch)
        number = 0
        for burst in bursts:
            for _ in range(burst):
                engine.send(Progress("n", number, 0))
                number += 1
            feed.send(ResetPrefixCache())
            await asyncio.sleep(0)
        if number:
            await asyncio.wait_for(done.wait(), 10)
        assert got == list(range(number))
        feed.close()
        feed.send(ResetPrefixCache())  # after the end: nothing happens
        engine.close(0.0)
        front.close(0.0)

    asyncio.run(run())


def test_a_callback_that_raises_does_not_stop_the_feed() -> None:
    async def run() -> list[int]:
        loop = asyncio.get_running_loop()
        errors: list[Any] = []
        loop.set_exception_handler(lambda _, context: errors.append(context))
        front = listen()
        engine = dial(front.address)
        got: list[int] = []
        done = asyncio.Event()

        def take(messages: Sequence[Any]) -> None:
            for message in messages:
                if message.done == 0:
                    raise RuntimeError("a bug")
                got.append(message.done)
                done.set()

        feed = LoopWire(front, loop, take, max_batch=1)
        engine.send(Progress("n", 0, 0))
        engine.send(Progress("n", 1, 0))
        await asyncio.wait_for(done.wait(), 10)
        assert len(errors) == 1
        feed.close()
        engine.close(0.0)
        front.close(0.0)
        return got

    assert asyncio.run(run()) == [1]


def test_a_clogged_loop_wire_keeps_its_messages_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire_module, "MAX_QUEUED", 4)

    async def run() -> None:
        front = listen()
        feed = LoopWire(front, asyncio.get_running_loop(), lambda messages: None)
        number = 0
        while not feed.is_full:
            feed.send(Progress("n", number, 0))
            number += 1
            assert number < 5000
        feed.send(Progress("n", number, 0))
        engine = dial(front.address)
        decode = msgspec.msgpack.Decoder(FromEngine).decode  # both ends speak both unions' encoding
        got: list[int] = []
        deadline_s = asyncio.get_running_loop().time() + 10
        while len(got) <= number:
            assert asyncio.get_running_loop().time() < deadline_s, f"{len(got)} of {number + 1} came"
            try:
                got.append(decode(engine.socket.recv(zmq.NOBLOCK)).done)  # type: ignore[union-attr]
            except zmq.Again:
                await asyncio.sleep(0.01)
        assert got == list(range(number + 1))
        assert not feed.is_full
        feed.close()
        engine.close(0.0)
        front.close(0.0)

    asyncio.run(run())


def test_no_torch_is_imported() -> None:
    script = textwrap.dedent("""
        import sys, penstock.engine.wire, penstock.engine.client
        assert "torch" not in sys.modules
    """)
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, env={"PYTHONPATH": ":".join(sys.path)})
