"""Two prefill and two decode engines, some killed or stopped in the middle: the answer stays what it was."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.e2e.pd import COMMON, KV_BYTES, Asked, Reference, ask, asked, engine_pids, handoffs, prompt
from tests.e2e.serving import RealServer, is_running, penstock_command, streaming, until

from penstock.config.socket_directory import SocketDirectory
from penstock.nn.kernels.native import usable_kernels

ENGINES = {"prefill-0", "prefill-1", "decode-0", "decode-1"}

pytestmark = pytest.mark.skipif(
    not usable_kernels(), reason="bit-equal with native kernels only, which were not built or not for this machine"
)


@pytest.fixture(scope="module")
def running() -> Iterator[RealServer]:
    arguments = ("--pd", "2P2D", "--kv-lease-s", "1", "--engine-restarts", "20", "--kv-cache-memory-bytes", KV_BYTES)
    with RealServer(*arguments, *COMMON) as server:
        yield server.until_ready()
        assert "Traceback" not in server.errors()


@pytest.fixture
def server(running: RealServer) -> Iterator[RealServer]:
    """All four engines run, and hand over; afterwards no block is left."""
    until(lambda: set(engine_pids(running)) == ENGINES, 60, "engines started again")
    hands_over(running)
    yield running
    until(lambda: set(engine_pids(running)) == ENGINES, 60, "engines started again")
    running.until_idle()


@pytest.fixture(scope="module")
def one() -> Iterator[Reference]:
    reference = Reference()
    yield reference
    reference.close()


_numbers = iter(range(1000, 100_000))


def hands_over(server: RealServer) -> None:
    """Ask new prompts until one was handed over: its engines are there and know each other."""
    before = handoffs(server)["received"]

    def handed_over() -> bool:
        server.complete(prompt(200, next(_numbers)), max_tokens=2)
        return handoffs(server)["received"] > before

    until(handed_over, 60, "a hand-off")


def prompts_in_work(server: RealServer) -> bool:
    """Somebody computes: all of it is prompts, as long as no request that runs has given a token."""
    return int(server.snapshot()["totals"]["num_requests_running"]) > 0


def test_prefill_engines_killed_while_they_compute(server: RealServer, one: Reference) -> None:
    requests = [asked(1900, next(_numbers)) for _ in range(6)]
    expected = [one.answers(request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as threads:
        found = [threads.submit(ask, server, request) for request in requests]
        until(lambda: prompts_in_work(server), what="a prompt that is computed")
        for name, pid in engine_pids(server).items():
            if name.startswith("prefill"):
                os.kill(pid, signal.SIGKILL)
        assert [each.result() for each in found] == expected
    until(lambda: server.errors().count("its process ended with SIGKILL") >= 2, what="a word about it")


def test_prefill_engines_stopped_for_longer_than_the_lease(server: RealServer, one: Reference) -> None:
    requests = [asked(1900, next(_numbers)) for _ in range(4)]
    expected = [one.answers(request) for request in requests]
    failed = handoffs(server)["failed"]
    stopped = [pid for name, pid in engine_pids(server).items() if name.startswith("prefill")]
    with ThreadPoolExecutor(len(requests)) as threads:
        found = [threads.submit(ask, server, request) for request in requests]
        until(lambda: prompts_in_work(server), what="a prompt that is computed")
        try:
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            assert [each.result() for each in found] == expected
            late = asked(800, next(_numbers))
            assert ask(server, late) == one.answers(late)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
    until(lambda: handoffs(server)["failed"] > failed, what="a hand-off that failed")
    assert "nothing was heard for 1.0 s" in server.errors()
    for request in (late, asked(900, next(_numbers))):  # what was sent late has harmed nothing
        assert ask(server, request) == one.answers(request)


@pytest.mark.parametrize("num_victims", [1, 2])
def test_decode_engines_killed_while_they_stream(server: RealServer, one: Reference, num_victims: int) -> None:
    """With both gone the streams wait for one that is started again."""
    num_tokens = 300 + num_victims  # no other prompt has as many
    request = asked(num_tokens, next(_numbers), max_tokens=1200, temperature=0.8, seed=5)
    [expected] = one.answers(request)
    told = len(server.errors())
    token_ids: list[int] = []
    text, reasons, victims = "", [], list[str]()
    with streaming(server, "/v1/completions", request.body) as events:
        for number, event in enumerate(events):
            assert "error" not in event, event
            for choice in event["choices"]:
                token_ids += choice.get("token_ids") or ()
                text += choice["text"]
                reasons.append(choice["finish_reason"])
            if number == 10:
                assert len(token_ids) < 1200
                decodes_it = until(lambda: decode_engine_of(server, num_tokens), what="a word about where it runs")
                victims = sorted({"decode-0", "decode-1"}, key=lambda name: name != decodes_it)[:num_victims]
                for victim in victims:
                    os.kill(engine_pids(server)[victim], signal.SIGKILL)
    assert token_ids == expected.token_ids
    assert (text, reasons[-1]) == (expected.text, "length")
    for victim in victims:
        assert f"engine {victim}: its process ended with SIGKILL; it is started again" in server.errors()[told:]


@pytest.mark.parametrize("pd", ["1P2D", "1P1D"])
def test_a_decode_engine_that_hangs_while_it_streams(one: Reference, pd: str) -> None:
    """It is stopped for good, so it is killed; its stream goes on at the other, or at the one that is started again."""
    request = asked(300, next(_numbers), max_tokens=1200, temperature=0.8, seed=6)
    [expected] = one.answers(request)
    arguments = ("--pd", pd, "--engine-hang-s", "2", "--kv-cache-memory-bytes", KV_BYTES)
    with RealServer(*arguments, *COMMON) as server:
        before = engine_pids(server.until_ready())
        hands_over(server)
        token_ids: list[int] = []
        with streaming(server, "/v1/completions", request.body) as events:
            for number, event in enumerate(events):
                assert "error" not in event, event
                token_ids += [token for choice in event["choices"] for token in choice.get("token_ids") or ()]
                if number == 10:
                    victim = until(lambda: decode_engine_of(server, 300), what="a word about where it runs")
                    os.kill(before[victim], signal.SIGSTOP)
        assert token_ids == expected.token_ids
        reason = "it hangs: nothing was heard of it for 2 s, it was killed; it is started again"
        assert f"engine {victim}: {reason}" in server.errors()
        until(lambda: set(engine_pids(server)) == set(before), 60, "an engine started again")
        assert not is_running(before[victim])
        others = {name: pid for name, pid in before.items() if name != victim}
        assert others.items() <= engine_pids(server).items(), "they have done nothing"
        until(server.is_idle, 60, "giving all blocks back")


def test_a_prefill_engine_that_hangs(one: Reference) -> None:
    request = asked(1900, next(_numbers))
    expected = one.answers(request)
    arguments = ("--pd", "1P1D", "--engine-hang-s", "2", "--kv-lease-s", "1", "--kv-cache-memory-bytes", KV_BYTES)
    with RealServer(*arguments, *COMMON) as server:
        stopped = engine_pids(server.until_ready())["prefill-0"]
        hands_over(server)
        os.kill(stopped, signal.SIGSTOP)
        assert ask(server, request) == expected
        until(lambda: "engine prefill-0: it hangs" in server.errors(), what="a word about it")
        lines = server.errors().splitlines()
        assert all(re.match(r"\d\d:\d\d:\d\d (WARNING|ERROR  ) ", line) for line in lines), lines
        assert any(" decode-0: " in line and "nothing was heard for 1.0 s" in line for line in lines), lines
        until(lambda: not is_running(stopped), what="its end")
        hands_over(server)
        server.until_idle()


def decode_engine_of(server: RealServer, num_tokens: int) -> str | None:
    """Of the request with such a prompt."""
    decisions = server.snapshot()["router"]["decisions"]
    return next((each["engine"] for each in decisions if each["prompt_tokens"] == num_tokens), None)


def test_a_request_may_outlive_nothing_it_did_not_start(server: RealServer) -> None:
    """A client that leaves while its engines are gone: nothing of it comes back with them."""
    body = {"prompt": prompt(1900, next(_numbers)), "max_tokens": 100}
    pids = engine_pids(server)
    with streaming(server, "/v1/completions", body):
        for name in ("decode-0", "decode-1"):
            os.kill(pids[name], signal.SIGKILL)
    hands_over(server)
    server.until_idle()


def test_an_engine_that_may_not_come_back(one: Reference) -> None:
    """Without restarts the others go on; the last that decodes takes the server with it."""
    arguments = ("--pd", "1P1D", "--engine-restarts", "0", "--kv-cache-memory-bytes", KV_BYTES)
    with RealServer(*arguments, *COMMON) as server:
        server.until_ready()
        pids = engine_pids(server)
        directories = socket_directories(server)
        assert directories
        os.kill(pids["prefill-0"], signal.SIGKILL)
        for _ in range(2):
            request = asked(500, next(_numbers))
            assert ask(server, request) == one.answers(request)
        os.kill(pids["decode-0"], signal.SIGKILL)
        assert server.wait() == 1
        errors = server.errors()
        assert "engine prefill-0: its process ended with SIGKILL" in errors
        assert "engine decode-0: its process ended with SIGKILL" in errors and "Traceback" not in errors
        assert not any(map(Path.exists, directories))


def test_what_was_asked_before_sigterm_is_answered(one: Reference) -> None:
    """Prefill engines work until the last decode engine has stopped."""
    requests = [asked(1900, next(_numbers)) for _ in range(6)]
    expected = [one.answers(request) for request in requests]
    with RealServer("--pd", "1P1D", "--kv-cache-memory-bytes", KV_BYTES, *COMMON) as server:
        server.until_ready()
        with ThreadPoolExecutor(len(requests)) as threads:
            found = [threads.submit(ask, server, request) for request in requests]
            until(lambda: prompts_in_work(server), what="a prompt that is computed")
            server.process.send_signal(signal.SIGTERM)
            assert [each.result() for each in found] == expected
        assert server.wait() == 0
        assert server.errors().count("\n") == 1 and "SIGTERM" in server.errors()
        assert server.left_over() == []


def test_directories_of_a_killed_server_go_with_the_next_one() -> None:
    with RealServer("--pd", "1P1D", "--kv-cache-memory-bytes", KV_BYTES, *COMMON) as server:
        until(lambda: len(socket_directories(server)) >= 3, 60, "its directories")
        left = socket_directories(server)
        server.process.kill()
        server.wait()
        until(lambda: server.left_over() == [], what="the end of its engines")
    assert all(map(Path.exists, left))
    SocketDirectory().close()
    assert not any(map(Path.exists, left))


def socket_directories(server: RealServer) -> list[Path]:
    """Those that the server's process has locked."""
    found = []
    for descriptor in Path(f"/proc/{server.process.pid}/fd").iterdir():
        try:
            target = descriptor.readlink()
        except OSError:
            continue
        if target.name == "owner" and target.parent.name.startswith("penstock-"):
            found.append(target.parent)
    return found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--pd", "0P1D"), ("0P1D", "between 1 and 64")),
        (("--pd", "1P"), ("1P", "1P1D")),
        (("--pd", "1P1D", "--kv-link", "pigeon"), ("pigeon", "shm", "tcp")),
        (("--pd", "1P1D", "--kv-cache-memory-bytes", "900G"), ("prefill-0", "decode-0")),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    done = penstock_command("serve", "penstock-tiny", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


STRANGERS = """
import sys
from dataclasses import replace
from penstock import cli
from penstock.build import cluster
seats = cluster.make_seats
cluster.make_seats = lambda *given: [replace(seat, secret=seat.name) for seat in seats(*given)]
sys.exit(cli.main(sys.argv[1:]))
"""


def test_engines_that_do_not_share_a_secret(one: Reference) -> None:
    arguments = ("--pd", "1P1D", "--kv-link", "tcp", "--kv-cache-memory-bytes", KV_BYTES)
    with RealServer(*arguments, *COMMON, program=("-c", STRANGERS)) as server:
        server.until_ready()
        request: Asked = asked(500, next(_numbers))
        assert ask(server, request) == one.answers(request)
        until(lambda: handoffs(server)["failed"] == 1, what="counting it")
        assert "decode-0 at " in server.errors()
        assert "refuses prefill-0: it does not hold this cluster's secret" in server.errors()
