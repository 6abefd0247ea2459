"""How many engines each role needs, and when one should change its role. Pure: windows of measurements in, signals out.

Source: Tencent's Angel-HCF scales decodes by mean output length and remaining slots. Knows no engine by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """`target_load`: what an engine should carry at most. `excess`: by how much need must exceed what there is."""

    target_load: float = 0.8
    excess: float = 0.15
    num_windows: int = 3
    window_s: float = 10.0
    cool_down_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Window:
    """What one window measured, over all engines. Rates per second; capacities of one engine."""

    num_prefill: int
    num_decode: int
    new_tokens_per_s: float  # of prompts, after cache hits
    output_tokens_per_s: float
    prefill_tokens_per_s: float  # that one engine computes
    decode_tokens_per_s: float  # that one engine gives within the TPOT SLO
    resident_tokens: float  # of KV of running requests
    decode_capacity_tokens: float  # of KV of one engine
    num_running: int = 0
    free_slots: int = 0
    step_rate: float = 0.0  # decode steps a second
    mean_output: float = 0.0  # of the last 1,000 that finished


@dataclass(frozen=True, slots=True)
class Need:
    """In engines, as fractions; and decode slots that are free, or will be by the end of the next window."""

    prefill: float
    decode: float
    slots_free_soon: float


@dataclass(frozen=True, slots=True)
class Signals:
    """`flip`: (from, to) when one engine should change its role now. `scale`: for an outer autoscaler, engines wanted
    per role."""

    need: Need
    flip: tuple[str, str] | None
    scale: dict[str, int]
    why: str


def need(window: Window, limits: ScalingLimits) -> Need:
    """How many engines the window's load asks for. A rate of 0 where there is load means: unknown, as many as are."""
    prefill = _ratio(window.new_tokens_per_s, window.prefill_tokens_per_s, window.num_prefill * limits.target_load)
    decode = max(
        _ratio(window.output_tokens_per_s, window.decode_tokens_per_s, window.num_decode * limits.target_load),
        _ratio(window.resident_tokens, window.decode_capacity_tokens, window.num_decode * limits.target_load),
    )
    ending = window.num_running * limits.window_s * window.step_rate / max(window.mean_output, 1.0)
    soon = window.free_slots + min(float(window.num_running), ending)
    return Need(prefill / limits.target_load, decode / limits.target_load, soon)


def _ratio(load: float, capacity: float, unknown: float) -> float:
    if load <= 0:
        return 0.0
    return load / capacity if capacity > 0 else unknown


@dataclass(slots=True)
class RoleScaler:
    """Remembers windows: `observe` gives the signals after each. One role change at a time, with hysteresis.

    An engine flips when the other role's need has exceeded what it has by over 15 % for three windows, and the donor,
    one engine poorer, would still be within its own. Then nothing flips for the cool-down. Every role keeps one engine.
    """

    limits: ScalingLimits = field(default_factory=ScalingLimits)
    _short: dict[str, int] = field(default_factory=lambda: {PREFILL: 0, DECODE: 0})
    _flipped_s: float = -math.inf

    def observe(self, window: Window, now: float) -> Signals:
        """One window has ended."""
        needed = need(window, self.limits)
        have = {PREFILL: window.num_prefill, DECODE: window.num_decode}
        wants = {PREFILL: needed.prefill, DECODE: needed.decode}
        for role in have:
            is_short = wants[role] > have[role] * (1 + self.limits.excess)
            self._short[role] = self._short[role] + 1 if is_short else 0
        scale = {role: max(1, math.ceil(wants[role] - 1e-9)) for role in have}
        flip, why = None, "no role is short"
        for role, donor in ((PREFILL, DECODE), (DECODE, PREFILL)):
            if not self._short[role]:
                continue
            lacks = f"{role} needs {wants[role]:.1f} of {have[role]} engines"
            if self._short[role] < self.limits.num_windows:
                why = f"{lacks}, for {self._short[role]} windows"
            elif now < self._flipped_s + self.limits.cool_down_s:
                why = f"{lacks}; an engine has just changed its role"
            elif have[donor] <= 1 or wants[donor] > have[donor] - 1:
                why = f"{lacks}; {donor} cannot spare one: it needs {wants[donor]:.1f} of {have[donor]}"
            else:
                flip, why = (donor, role), f"{lacks}; {donor} needs {wants[donor]:.1f} of {have[donor]}"
                self._flipped_s = now
                self._short = dict.fromkeys(self._short, 0)
                break
        return Signals(needed, flip, scale, why)
