"""How far the running step is, in one word of memory: what lets a mover send a layer while the next one computes.

Knows numbers of steps and layers. Does not know what a step computes, nor who reads.
"""

from __future__ import annotations

import numpy as np

LAYERS_PER_STEP = 4096  # a power of two above any model's depth: value = step * LAYERS_PER_STEP + layers done


class StepCounter:
    """Progress of the steps of one rank, written by the thread that computes, read by any other.

    Layer `layer` of step `step` is done when `value >= step * LAYERS_PER_STEP + layer + 1`; the value never falls. It
    is one aligned int64 at `address`, so that native code may write it after each layer: it must do so with a release
    store, after that layer's KV is in memory. Readers in Python see it with no lock.
    """

    def __init__(self) -> None:
        self._cell = np.zeros(1, np.int64)

    @property
    def address(self) -> int:
        """Of the int64, valid as long as this object lives."""
        return int(self._cell.ctypes.data)

    @property
    def value(self) -> int:
        return int(self._cell[0])

    def begin(self, step: int) -> None:
        """No layer of `step` is done, and all earlier steps are."""
        value = step * LAYERS_PER_STEP
        assert value >= self._cell[0], f"step {step} begins at {value}, after {self.value}"
        self._cell[0] = value

    def layer_done(self) -> None:
        """One more layer of the step that began last."""
        self._cell[0] += 1

    def end(self) -> None:
        """All layers of the step that began last are done, counted one by one or not."""
        self._cell[0] |= LAYERS_PER_STEP - 1

    def is_done(self, step: int, layer: int) -> bool:
        return self.value >= step * LAYERS_PER_STEP + layer + 1

    def layers_done(self, step: int) -> int:
        """How many layers of `step`, the first ones, are done; LAYERS_PER_STEP - 1 when the step is over."""
        return min(max(self.value - step * LAYERS_PER_STEP, 0), LAYERS_PER_STEP - 1)
