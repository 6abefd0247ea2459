"""Words in memory between one step and those who carry KV meanwhile: what it tells them, what it waits for.

Knows int64 words and layers. Knows nobody who carries, and no request. Native programs do the same by themselves
(native/src/words.cpp) on the same addresses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from ctypes import c_int64

import numpy as np

FIRST_SLEEP_S, LONGEST_SLEEP_S = 20e-6, 200e-6


class StepWords:
    """The words of one step. Layers are counted over the whole model.

    `done`: address of the word that stands at the step's base and is base + l + 1 once the KV of layer l is written;
    0: nobody listens. `loads`: addresses, int64 [N], one word for each load under way that the step reads: how many of
    its layers are in place, negative when it has failed. `patience_s`: how long the step waits for all of them in all;
    then it goes on with what is there. The words must outlive the step.
    """

    def __init__(self, done: int = 0, loads: np.ndarray | None = None, patience_s: float = 10.0) -> None:
        self.done = done
        self.loads: list[int] = [] if loads is None else loads.tolist()
        self.patience_s = patience_s
        self._bad: set[int] = set()
        self._done = c_int64.from_address(done) if done else None
        self._base = 0 if self._done is None else self._done.value
        self._loads = [c_int64.from_address(address) for address in self.loads]

    def written(self, layer: int) -> None:
        """The KV of `layer` is in the pools."""
        if self._done is not None:
            self._done.value = self._base + layer + 1

    def wait(self, layer: int) -> None:
        """Until each load has `layer` in place, has failed, or the step's patience is at its end."""
        for i, word in enumerate(self._loads):
            if i not in self._bad and not self._in_place(word, layer):
                self._bad.add(i)

    def _in_place(self, word: c_int64, layer: int) -> bool:
        if 0 <= word.value <= layer:
            begin, sleep_s = time.perf_counter(), FIRST_SLEEP_S
            while 0 <= word.value <= layer and time.perf_counter() - begin < self.patience_s:
                time.sleep(sleep_s)
                sleep_s = min(2 * sleep_s, LONGEST_SLEEP_S)
            self.patience_s -= time.perf_counter() - begin
        return word.value > layer

    def went_on_without(self, loads: Sequence[int]) -> None:
        """A native program did not get these, as indices."""
        self._bad.update(loads)

    def bad(self) -> list[int]:
        """Indices of loads that have failed by now or came too late: what was computed from them means nothing."""
        return [i for i, word in enumerate(self._loads) if i in self._bad or word.value < 0]
