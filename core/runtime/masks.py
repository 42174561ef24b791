"""Masks: which tokens a row may choose, a bit for each, as ``SamplingRow.allowed`` gives them to every runtime.

Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import PolyheadError

Words = NDArray[np.int32]


def mask_words(vocab: int) -> int:
    """How many words of 32 bits hold a mask over ``vocab`` tokens."""
    return -(-vocab // 32)


def ask(allowed: Callable[[], Words], index: int, vocab: int) -> Words:
    """The mask of row ``index``, int32 [mask_words(vocab)]. Bits past the vocabulary mean nothing.

    A ``PolyheadError`` passes through with ``row`` set. Raises ValueError for a mask of another type or shape.
    """
    try:
        words = allowed()
    except PolyheadError as error:
        error.row = index
        raise
    if words.dtype != np.int32 or words.shape != (mask_words(vocab),):
        raise ValueError(f"a mask of {words.dtype} {words.shape} does not go with {vocab} logits")
    return words


def as_flags(words: Words, vocab: int) -> NDArray[np.bool_]:
    """Which tokens may be chosen, bool [vocab]."""
    little = np.ascontiguousarray(words, "<i4")  # whose bytes hold the bits in order
    return np.unpackbits(little.view(np.uint8), count=vocab, bitorder="little").view(np.bool_)
