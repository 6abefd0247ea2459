"""How far a step has come, as one word in memory: written by the step, polled by those who carry its KV.

Knows no KV and no step but by its number.
"""

from __future__ import annotations

import numpy as np

LAYERS_PER_STEP = 4096  # more than any model has


class StepCounter:
    """`word`: int64 [1], its own or in memory that other processes see; value = step * 4096 + layers done.

    One step writes at a time, anybody reads: an aligned word is never seen half written. Steps only count up, so a
    later step says of all earlier ones that they are done.
    """

    def __init__(self, word: np.ndarray | None = None) -> None:
        self.word = np.full(1, -1, np.int64) if word is None else word
        assert self.word.dtype == np.int64 and self.word.shape == (1,)

    @property
    def address(self) -> int:
        """Of the word, for native code. Valid as long as this object."""
        return int(self.word.ctypes.data)

    def begin(self, step: int) -> None:
        """No layer of `step` is done yet, every layer of earlier steps is."""
        self.word[0] = step * LAYERS_PER_STEP

    def layer_done(self, layer: int) -> None:
        """Layers 0 to `layer` of the step that began last are done."""
        self.word[0] = int(self.word[0]) // LAYERS_PER_STEP * LAYERS_PER_STEP + layer + 1

    def end(self) -> None:
        """Every layer of the step that began last is done, whether or not somebody told of them one by one."""
        self.layer_done(LAYERS_PER_STEP - 2)

    def is_done(self, step: int, layer: int) -> bool:
        """Whether the KV of `layer` that `step` computes is in the pools."""
        return int(self.word[0]) >= step * LAYERS_PER_STEP + layer + 1
