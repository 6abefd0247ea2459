"""A placement without predictions: requests go to the engine with the fewest tokens to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.cluster.decisions import Forecast
from penstock.cluster.router import DECODE, PREFILL, Placed
from penstock.core.kv_events import KVEvents, KVSnapshot, SnapshotRequest
from penstock.engine.messages import AddRequest, Ready, Report


class LeastLoaded:
    """Requests go to the engine with the fewest tokens to do; every prompt may be computed by any prefill engine.

    `roles`: of all engines by name. Prompts of up to `min_tokens` tokens are computed where they are decoded.
    """

    def __init__(self, roles: dict[str, str], min_tokens: int = 256) -> None:
        self._roles = dict(roles)
        self._min_tokens = min_tokens
        self._alive: set[str] = set()
        self._load = dict.fromkeys(roles, 0)
        self._charged: dict[str, list[tuple[str, int]]] = {}  # request -> (engine, tokens) still to do

    def joined(self, name: str, ready: Ready) -> None:
        self._alive.add(name)

    def left(self, name: str) -> None:
        self._alive.discard(name)

    def place(self, request: AddRequest, now: float) -> Placed | None:
        decoding = self._least(name for name in self._alive if self._roles[name] != PREFILL)
        if not decoding:
            return None
        loads = {name: float(self._load[name]) for name in self._alive}
        engine, num_prompt = decoding[0], len(request.token_ids)
        num_output = request.params.max_tokens or num_prompt
        peers = self._least(n for n in self._alive if self._roles[n] != DECODE and n != engine)
        if num_prompt < self._min_tokens:
            peers = []
        self._charge(request.request_id, [(engine, num_output), (peers[0] if peers else engine, num_prompt)])
        terms = {name: loads[name] for name in (*peers[:1], engine)}
        reason = "fewest tokens to do" if peers or num_prompt >= self._min_tokens else "a short prompt stays"
        runner_ups = tuple((name, loads[name]) for name in decoding[1:3])
        return Placed(engine, tuple(peers), Forecast(reason, None, terms, runner_ups))

    def assign(self, name: str, role: str) -> None:
        self._roles[name] = role

    def tick(self, now: float) -> list[SnapshotRequest]:
        return []

    def told(self, name: str, report: Report, now: float) -> None:
        """Its own count is enough."""

    def changed(self, events: KVEvents, now: float) -> SnapshotRequest | None:
        """Caches do not count."""
        return None

    def restored(self, snapshot: KVSnapshot, now: float) -> SnapshotRequest | None:
        return None

    def first_token(self, request_id: str, num_cached: int, now: float) -> None:
        """The prompt is done."""
        charges = self._charged.get(request_id, [])
        if len(charges) == 2:
            name, num_tokens = charges.pop()
            self._load[name] -= num_tokens

    def ended(self, request_id: str, num_output: int, now: float) -> None:
        for name, num_tokens in self._charged.pop(request_id, ()):
            self._load[name] -= num_tokens

    def _charge(self, request_id: str, charges: Sequence[tuple[str, int]]) -> None:
        self._charged[request_id] = list(charges)
        for name, num_tokens in charges:
            self._load[name] += num_tokens

    def _least(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (self._load[name], name))
