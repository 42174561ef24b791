"""The masks of a batch's rows, on the host and the device. Knows nothing of kernels or grammars."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import PolyheadError
from ..contract import SamplingRow
from ..masks import ask
from .device import CudaDevice
from .memory import Array
from .sampling_lists import Staging

NONE = -1
"""Where the mask of a row without one begins."""


class MaskLists:
    """The masks of the rows that have one, one after another. All of them are uploaded, and nothing if there is none.

    A mask that could not be worked out must not cost the other rows their tokens, nor leave a step half begun: it is
    kept in ``errors``, by row, for whoever reads the tokens.
    """

    def __init__(self, device: CudaDevice, staging: Staging, words: Array, vocab: int) -> None:
        """``words`` is the array on the device, u32 [most rows, mask_words(vocab)]."""
        self._device = device
        self._vocab = vocab
        self._on_device = words
        self._words = staging(np.int32, *words.shape)
        self.errors: dict[int, PolyheadError] = {}

    def update(self, rows: Sequence[SamplingRow]) -> list[int]:
        """Where each row's mask begins, in words; NONE for a row without one, or whose mask is an error.

        Masks are worked out in the order of the rows. Raises ValueError for one of another type or shape.
        """
        starts = [NONE] * len(rows)
        self.errors = {}
        count = 0
        for index, row in enumerate(rows):
            if row.allowed is None:
                continue
            try:
                self._words[count] = ask(row.allowed, index, self._vocab)
            except PolyheadError as error:
                self.errors[index] = error
                continue
            starts[index] = count * self._words.shape[1]
            count += 1
        if count:
            self._device.copy_in(self._on_device.slice_rows(0, count), self._words[:count])
        return starts
