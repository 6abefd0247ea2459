"""What tiers cost and save: rates fitted to measurements, load-or-recompute block by block, whether a tier pays.

Pure arithmetic in seconds and bytes. Knows no block pool, no request and no message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


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


def choose_end(
    tiers: Sequence[int],
    load: Mapping[int, tuple[float, float]],
    recompute_s: Callable[[int], float],
    first_block: int = 0,
) -> int:
    """Up to which block to load, so that the whole is there soonest; what follows is computed. `first_block`: nothing.

    `tiers[i]` holds block `first_block + i` (0: none does). `load[tier]`: (seconds per run of blocks, seconds per
    block). `recompute_s(block)`: of that one block, everything before it in place.

    Loads and computing are taken to be one after another; what overlaps only comes sooner. Blocks behind one that must
    be computed are not loaded: a request asks its tiers once, when it starts, and tiers lose the deepest blocks first,
    so such gaps are rare. Exact, in O(blocks). Ties are computed: that cannot fail.
    """
    best_s = saved_s = 0.0
    end = first_block
    for i, tier in enumerate(tiers):
        if not tier:
            break
        run_s, block_s = load[tier]
        saved_s += recompute_s(first_block + i) - block_s - (run_s if not i or tiers[i - 1] != tier else 0.0)
        if saved_s > best_s:
            best_s, end = saved_s, first_block + i + 1
    return end


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
