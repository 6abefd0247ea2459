"""Prefill and decode apart inside one process: two real engines, the in-process link, and the answers of one engine.

E0 with native kernels, E1 in plain torch. Messages go from member to member by hand; the KV is real.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
from tests.e2e.pd import CHUNK, KV_BYTES, Asked, Reference, asked, prompt
from tests.e2e.serving import MODEL

from penstock.build.engine import BuiltEngine, build_engine
from penstock.build.start import Stages
from penstock.cluster.decode_side import DecodeSide
from penstock.cluster.member import FRONT, Member
from penstock.cluster.prefill_side import PrefillSide
from penstock.cluster.seat import Seat
from penstock.config.complete import complete
from penstock.config.hardware import probe
from penstock.config.load import resolve
from penstock.engine.messages import AddRequest, Failed, Peer, Peers, Tokens

NAMES = {"prefill-0": "prefill", "decode-0": "decode"}
TIMEOUT_S = 60.0


class TwoEngines:
    """A prefill and a decode engine of `settings`, stepped in turns by whoever asks."""

    def __init__(self, **settings: Any) -> None:
        fields = {"model": MODEL, "kv_cache_memory_bytes": KV_BYTES, "max_num_batched_tokens": CHUNK, **settings}
        resolved = complete(resolve(fields), probe())
        self.built: dict[str, BuiltEngine] = {}
        self.members: dict[str, Member] = {}
        self.inbox: deque[tuple[str, str, Any]] = deque()  # to, from, message
        self.answers: dict[str, list[int]] = {}
        self.failed: list[Failed] = []
        for name, role in NAMES.items():
            seat = Seat(name, role, directory="", secret="of this test", link="local")
            built = build_engine(resolved, lambda *_: None, Stages(time.monotonic()), None, seat)
            assert built.links is not None
            self.built[name] = built
            decode = DecodeSide(name, built.links.addresses[0], f"{name}.1", min_tokens=64)
            self.members[name] = Member(built.engine, decode, PrefillSide(built.engine.scheduler.layout.format))
        peers = [Peer(name, NAMES[name], name, member.decode.link) for name, member in self.members.items()]
        for name in NAMES:
            self.inbox.append((name, FRONT, Peers(peers)))

    def ask(self, request: Asked, request_id: str) -> list[int]:
        """The token ids of one answer."""
        now = time.monotonic()
        seed = request.params.seed or 0
        add = AddRequest(request_id, request.prompt, request.params, seed, now, prefill_at=("prefill-0",))
        self.inbox.append(("decode-0", FRONT, add))
        self.answers[request_id] = []
        ended = False
        while not ended:
            assert time.monotonic() < now + TIMEOUT_S and not self.failed, self.failed
            ended = self._turn(request_id)
        return self.answers[request_id]

    def _turn(self, request_id: str) -> bool:
        """All messages, and a step of each engine that has one; True: the request has ended."""
        ended = False
        for _ in range(len(self.inbox)):
            to, source, message = self.inbox.popleft()
            ended |= self._post(to, self.members[to].handle(source, message, time.monotonic()), request_id)
        for name, member in self.members.items():
            ended |= self._post(name, member.launch(time.monotonic()), request_id)
            if member.engine.scheduler.num_submitted:
                result = self.built[name].executor.collect()
                ended |= self._post(name, member.complete(result, time.monotonic()), request_id)
        return ended

    def _post(self, source: str, post: Any, request_id: str) -> bool:
        ended = False
        for to, message in post:
            if to != FRONT:
                self.inbox.append((to, source, message))
            elif isinstance(message, Failed):
                self.failed.append(message)
            elif isinstance(message, Tokens):
                for delta in message.deltas:
                    self.answers[delta.request_id] += delta.token_ids
                    ended |= delta.request_id == request_id and delta.finish_reason is not None
        return ended

    def settle(self) -> None:
        """Until every hand-off has ended on both sides."""
        until_s = time.monotonic() + TIMEOUT_S
        while any(m.handoffs().num_sending or m.handoffs().num_receiving for m in self.members.values()):
            assert time.monotonic() < until_s
            self._turn("")
            time.sleep(1e-3)

    def close(self) -> None:
        for built in self.built.values():
            built.close()


@pytest.fixture(params=["bfloat16", "int8"])
def engines(request: pytest.FixtureRequest) -> Iterator[tuple[TwoEngines, Reference]]:
    settings = {} if request.param == "bfloat16" else {"kv_cache_dtype": "int8"}
    two, one = TwoEngines(**settings), Reference(MODEL, **settings)
    try:
        yield two, one
    finally:
        two.close()
        one.close()


def test_two_engines_in_a_process_say_what_one_says(engines: tuple[TwoEngines, Reference]) -> None:
    """Chunks, a hit in a prefix cache, seeded sampling: the tokens of one engine, and the KV came over the link."""
    two, one = engines
    first = asked(700, 1)
    requests = [
        asked(65, 0),
        first,
        asked(333, 2, temperature=0.9, top_p=0.9, seed=7),
        Asked(first.prompt[:500] + prompt(300, 3), first.fields),
        asked(1500, 4),
    ]
    for number, request in enumerate(requests):
        [expected] = one.answers(request)
        assert two.ask(request, f"r{number}") == expected.token_ids
    two.settle()
    sent, received = (two.members[name].handoffs() for name in NAMES)
    assert (sent.num_sent, received.num_received, received.num_failed, received.num_local) == (5, 5, 0, 0)
    links = two.built["prefill-0"].links
    assert links is not None
    (stats,) = links.stats().values()
    layout = two.built["prefill-0"].engine.scheduler.layout
    assert stats.num_bytes == sum(group.block_bytes for group in layout.groups) * _blocks(requests, layout.block_size)


def _blocks(requests: list[Asked], size: int) -> int:
    """Blocks that D lacked: those of each prompt, less what its cache had."""
    return sum(-(-len(each.prompt) // size) for each in requests) - 500 // size


def test_what_is_not_what_was_sent_is_computed_again(
    engines: tuple[TwoEngines, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum that P tells is not that of the bytes at D: the hand-off fails, the answer is right."""
    two, one = engines
    links = two.built["decode-0"].links
    assert links is not None
    expect = links.expect
    monkeypatch.setattr(links, "expect", lambda move_id, num_units, total: expect(move_id, num_units, total ^ 1))
    request = asked(700, 5)
    [expected] = one.answers(request)
    assert two.ask(request, "r") == expected.token_ids
    two.settle()
    assert two.members["decode-0"].handoffs().num_failed == 1
