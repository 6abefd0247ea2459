"""Which rows of which parameter a checkpoint tensor fills."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Route:
    """Checkpoint tensor `source` fills parameter `target`, whole or rows [start, end) of its first axis.

    kind "fill": the checkpoint must hold `source`. kind "tied": `source` may be absent because another tensor fills
    `target` already; where both are stored their values must be equal, and where only `source` is, it fills `target`.
    """

    source: str
    target: str
    rows: tuple[int, int] | None = None
    kind: Literal["fill", "tied"] = "fill"
