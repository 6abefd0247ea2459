"""Where the two phases of a request run: prefill and decode apart, both on P, or both on D. A pure function of costs.

Sources: RTP-LLM's flexible routing; the gates of NVIDIA Dynamo's conditional disaggregation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Mode(Enum):
    """P then D; all on the prefill engine; all on the decode engine."""

    SPLIT = "split"
    PREFILL_ONLY = "prefill_only"
    DECODE_ONLY = "decode_only"


@dataclass(frozen=True, slots=True)
class ModeLimits:
    """When a phase may stay where it does not belong, and the SLOs."""

    max_output_on_p: int = 16  # answers so short are finished where they begin
    max_total_on_p: int = 512  # prompt + answer
    max_p_load: float = 0.6
    max_new_on_d: int = 256  # prompt tokens that D may compute after its hit
    max_d_load: float = 0.8
    ttft_slo_s: float = 2.0
    tpot_slo_s: float = 0.05


@dataclass(frozen=True, slots=True)
class ModeCosts:
    """One request on the P and the D that were picked for it. Seconds, unless said; loads are shares of capacity."""

    prompt_tokens: int
    output_tokens: int  # expected
    queue_p_s: float
    prefill_p_s: float
    tail_s: float  # of the transfer that shows
    queue_d_s: float
    new_tokens_d: int  # after D's hit
    prefill_d_s: float
    harm_d_s: float  # what computing them costs those that decode there, summed
    step_p_s: float  # of a decode token on P, beside its prompts
    step_d_s: float
    harm_p_s: float  # what decoding there costs P's prompts, summed
    p_load: float
    d_load: float
    has_p: bool = True
    has_d: bool = True


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """`cost_s` per mode that was allowed; `why` in words, for people."""

    mode: Mode
    cost_s: dict[Mode, float]
    why: str


def choose_mode(costs: ModeCosts, limits: ModeLimits | None = None) -> ModeChoice | None:
    """The cheapest allowed mode that meets the SLOs; if none does, the cheapest. None without any engine.

    The gates keep what must not grow, long answers on P and long prompts on D, from ever being cheapest by a wrong
    estimate. A role that has no engine is done by the other, whatever the gates say.
    """
    limits = limits or ModeLimits()
    decode_d_s = costs.output_tokens * costs.step_d_s
    ttft = {
        Mode.SPLIT: costs.queue_p_s + costs.prefill_p_s + costs.tail_s + costs.queue_d_s,
        Mode.PREFILL_ONLY: costs.queue_p_s + costs.prefill_p_s,
        Mode.DECODE_ONLY: costs.queue_d_s + costs.prefill_d_s,
    }
    cost = {
        Mode.SPLIT: ttft[Mode.SPLIT] + decode_d_s,
        Mode.PREFILL_ONLY: ttft[Mode.PREFILL_ONLY] + costs.output_tokens * costs.step_p_s + costs.harm_p_s,
        Mode.DECODE_ONLY: ttft[Mode.DECODE_ONLY] + decode_d_s + costs.harm_d_s,
    }
    is_short = (
        costs.output_tokens <= limits.max_output_on_p
        or costs.prompt_tokens + costs.output_tokens < limits.max_total_on_p
    )
    allowed = {
        Mode.SPLIT: costs.has_p and costs.has_d,
        Mode.PREFILL_ONLY: costs.has_p and (not costs.has_d or (is_short and costs.p_load < limits.max_p_load)),
        Mode.DECODE_ONLY: costs.has_d
        and (not costs.has_p or (costs.new_tokens_d <= limits.max_new_on_d and costs.d_load < limits.max_d_load)),
    }
    cost = {mode: seconds for mode, seconds in cost.items() if allowed[mode]}
    if not cost:
        return None
    tpot = {Mode.SPLIT: costs.step_d_s, Mode.PREFILL_ONLY: costs.step_p_s, Mode.DECODE_ONLY: costs.step_d_s}
    in_time = [m for m in cost if ttft[m] <= limits.ttft_slo_s and tpot[m] <= limits.tpot_slo_s]
    mode = min(in_time or cost, key=cost.__getitem__)
    why = f"{mode.value}: {1e3 * cost[mode]:.0f} ms, the least of {len(cost)} allowed"
    return ModeChoice(mode, cost, why if in_time else f"{why}; none meets the SLOs")
