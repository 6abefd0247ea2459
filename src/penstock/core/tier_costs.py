"""What tiers cost and save: rates fitted to measurements, load-or-recompute per run of blocks, whether a tier pays.

Pure arithmetic in seconds and bytes. Knows no block pool, no request and no message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

RECOMPUTE = 0  # in Run.tier


class LinearRate:
    """`seconds = latency_s + byte_s * bytes`, fitted to samples by least squares; old samples fade.

    The prior counts as half a sample, so that a fit always exists; both parts are kept from going below zero.
    """

    def __init__(self, latency_s: float, byte_s: float, scale_bytes: float = 1e6, fade: float = 0.97) -> None:
        self.fade = fade
        self.latency_s, self.byte_s = latency_s, byte_s
        self.num_samples = 0
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        for num_bytes in (0.0, scale_bytes):
            self._add(num_bytes, latency_s + byte_s * num_bytes, 0.25)

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + self.byte_s * num_bytes

    def observe(self, num_bytes: float, seconds: float) -> None:
        """One transfer of so many bytes took so long."""
        self.num_samples += 1
        self._n, self._x, self._y, self._xx, self._xy = (
            self.fade * value for value in (self._n, self._x, self._y, self._xx, self._xy)
        )
        self._add(num_bytes, seconds, 1.0)
        spread = self._n * self._xx - self._x * self._x
        slope = (self._n * self._xy - self._x * self._y) / spread if spread > 1e-9 * self._xx * self._n else 0.0
        if slope <= 0.0:  # equal sizes, or noise: both parts change by the same factor
            fitted = self.latency_s * self._n + self.byte_s * self._x
            ratio = self._y / max(fitted, 1e-30)
            self.latency_s, self.byte_s = self.latency_s * ratio, self.byte_s * ratio
        elif (offset := (self._y - slope * self._x) / self._n) < 0.0:
            self.latency_s, self.byte_s = 0.0, self._xy / self._xx
        else:
            self.latency_s, self.byte_s = offset, slope

    def _add(self, x: float, y: float, weight: float) -> None:
        self._n += weight
        self._x += weight * x
        self._y += weight * y
        self._xx += weight * x * x
        self._xy += weight * x * y


class PrefillRate:
    """Seconds to compute tokens [start, end) of a prompt: `token_s` each and `pair_s` per (token, earlier token) pair.

    The second part is attention, which makes deep tokens dearer. Fitted by least squares like LinearRate; where samples
    cannot tell the parts apart, the ratio of the prior is kept.
    """

    def __init__(self, token_s: float = 1e-3, pair_s: float = 1e-7, fade: float = 0.97) -> None:
        self.token_s, self.pair_s = token_s, pair_s
        self.fade = fade
        self.num_samples = 0
        self._uu = self._uv = self._vv = self._uy = self._vy = 0.0
        for start, end in ((0, 64), (2048, 2112)):
            self._add(start, end, self.seconds(start, end), 0.1)

    def seconds(self, start: int, end: int) -> float:
        return self.token_s * (end - start) + self.pair_s * _num_pairs(start, end)

    def observe(self, start: int, end: int, seconds: float) -> None:
        """A step that computed these tokens, and little else, took so long."""
        self.num_samples += 1
        self._uu, self._uv, self._vv, self._uy, self._vy = (
            self.fade * value for value in (self._uu, self._uv, self._vv, self._uy, self._vy)
        )
        self._add(start, end, seconds, 1.0)
        determinant = self._uu * self._vv - self._uv * self._uv
        token_s = pair_s = -1.0
        if determinant > 1e-6 * self._uu * self._vv:
            token_s = (self._uy * self._vv - self._vy * self._uv) / determinant
            pair_s = (self._vy * self._uu - self._uy * self._uv) / determinant
        if token_s <= 0.0 or pair_s < 0.0:
            fitted = self.token_s * self._uu + self.pair_s * self._uv
            ratio = self._uy / max(fitted, 1e-30)
            token_s, pair_s = self.token_s * ratio, self.pair_s * ratio
        self.token_s, self.pair_s = token_s, pair_s

    def _add(self, start: int, end: int, seconds: float, weight: float) -> None:
        u, v = float(end - start), _num_pairs(start, end)
        self._uu += weight * u * u
        self._uv += weight * u * v
        self._vv += weight * v * v
        self._uy += weight * u * seconds
        self._vy += weight * v * seconds


def _num_pairs(start: int, end: int) -> float:
    return (end * end - start * start) / 2.0


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks [start, end) are loaded from `tier`, or computed where that is RECOMPUTE."""

    start: int
    end: int
    tier: int


def choose_runs(
    tiers: Sequence[int],
    load: Mapping[int, tuple[float, float]],
    recompute_s: Callable[[int], float],
    first_block: int = 0,
    detour_s: float = 0.0,
) -> list[Run]:
    """Load or recompute each of the blocks, so that the whole is there soonest. Runs in order, without gaps.

    `tiers[i]` holds block `first_block + i` (0: none does, it must be computed). `load[tier]`: (seconds per run,
    seconds per block). `recompute_s(block)`: of that one block, everything before it in place. `detour_s`: what a step
    in the middle costs beyond its tokens: it is charged per computed run that a loaded one follows.

    Loads and computing are taken to be one after another; what overlaps only comes sooner. Then every cost belongs to a
    block or to the border between two, and the best plan is the shortest path through 2 states a block (computed,
    loaded): exact, in O(blocks). Nothing is loaded whose end is not reached sooner for it, so a plan is a loaded
    beginning, perhaps computed gaps, and a computed rest. Ties are computed: that cannot fail.
    """
    infinite = float("inf")
    computed, loaded = 0.0, infinite  # seconds until blocks [0, i) are there, by what the last one was
    came_computed: list[bool] = []  # best way to compute block i: after a computed one?
    came_loaded: list[bool] = []  # best way to load it: after a loaded one?
    for i, tier in enumerate(tiers):
        came_computed.append(computed <= loaded)
        next_computed = min(computed, loaded) + recompute_s(first_block + i)
        next_loaded = infinite
        stays = False
        if tier:
            run_s, block_s = load[tier]
            after_loaded = loaded + (0.0 if i and tiers[i - 1] == tier else run_s)
            after_computed = computed + run_s + (detour_s if i else 0.0)
            stays = after_loaded < after_computed
            next_loaded = min(after_loaded, after_computed) + block_s
        came_loaded.append(stays)
        computed, loaded = next_computed, next_loaded
    is_loaded = loaded < computed
    runs: list[Run] = []
    for i in range(len(tiers) - 1, -1, -1):
        tier = tiers[i] if is_loaded else RECOMPUTE
        if runs and runs[-1].tier == tier:
            runs[-1] = Run(first_block + i, runs[-1].end, tier)
        else:
            runs.append(Run(first_block + i, first_block + i + 1, tier))
        is_loaded = came_loaded[i] if is_loaded else not came_computed[i]
    return runs[::-1]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A window's figures."""

    pays: bool
    saved_s: float
    spent_s: float
    num_uses: int


class TierWorth:
    """Does a tier save more seconds than it takes? Judged over windows with enough uses and enough time.

    Hysteresis: it is switched off when it saved less than it spent, and stays off `retry_s`, twice as long after every
    further window that did not pay, up to `max_retry_s`. Then one window is its probe.
    """

    def __init__(
        self, min_uses: int = 512, window_s: float = 120.0, retry_s: float = 60.0, max_retry_s: float = 1800.0
    ) -> None:
        self.min_uses = min_uses
        self.window_s = window_s
        self.first_retry_s = self.retry_s = retry_s
        self.max_retry_s = max_retry_s
        self.off_until_s: float | None = None
        self.total_saved_s = self.total_spent_s = 0.0
        self._saved_s = self._spent_s = 0.0
        self._num_uses = 0
        self._since_s: float | None = None

    @property
    def is_on(self) -> bool:
        return self.off_until_s is None

    def saved(self, seconds: float) -> None:
        """Computing that was not needed."""
        self._saved_s += seconds
        self.total_saved_s += seconds

    def spent(self, seconds: float) -> None:
        """Reading, writing, looking up."""
        self._spent_s += seconds
        self.total_spent_s += seconds

    def used(self, num_blocks: int) -> None:
        """Blocks looked up or written: what makes a window's sample."""
        self._num_uses += num_blocks

    def judge(self, now: float) -> Verdict | None:
        """At the end of a window: its figures; the tier is off from then on if it did not pay."""
        if not self.is_on:
            return None
        if self._since_s is None:
            self._since_s = now
        if self._num_uses < self.min_uses or now - self._since_s < self.window_s:
            return None
        verdict = Verdict(self._saved_s >= self._spent_s, self._saved_s, self._spent_s, self._num_uses)
        if verdict.pays:
            self.retry_s = self.first_retry_s
        else:
            self.off_until_s = now + self.retry_s
            self.retry_s = min(2 * self.retry_s, self.max_retry_s)
        self._restart(now)
        return verdict

    def probe(self, now: float) -> bool:
        """On again, when its pause is over: True at that moment."""
        if self.off_until_s is None or now < self.off_until_s:
            return False
        self.off_until_s = None
        self._restart(now)
        return True

    def _restart(self, now: float) -> None:
        self._saved_s = self._spent_s = 0.0
        self._num_uses = 0
        self._since_s = now
