"""How many layers go into one message: as few as the cost of a message allows. Knows bytes and seconds, no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass

OVERHEADS = 10  # a message takes at least so many times its fixed cost: that cost is then a tenth of it
SMOOTHING = 0.25  # weight of a new observation


@dataclass(slots=True)
class LinkCost:
    """What one connection was measured to do; written by the thread that sends on it."""

    bytes_per_s: float
    message_s: float  # of a message that carries nothing

    @property
    def min_message_bytes(self) -> float:
        """Less than this is not worth a message of its own."""
        return OVERHEADS * self.bytes_per_s * self.message_s

    def observe(self, num_bytes: int, num_messages: int, seconds: float) -> None:
        """So much was sent without a pause. Moves the bandwidth, by an exponentially weighted mean."""
        seconds -= num_messages * self.message_s
        if num_bytes > 0 and seconds > 0:
            self.bytes_per_s += SMOOTHING * (num_bytes / seconds - self.bytes_per_s)


def layers_per_message(num_tokens: int, bytes_per_token: float, cost: LinkCost) -> int:
    """Layers that one message carries when each has `bytes_per_token` for each of `num_tokens`.

    The known switch falls out of it: 1,152 bytes (the latent of DeepSeek-V3) at 50 GB/s and 20 us per message go layer
    by layer above 8.7k tokens, and below that several layers at a time.
    """
    return max(1, math.ceil(cost.min_message_bytes / (num_tokens * bytes_per_token)))
