"""Philox4x32-10: random numbers as a pure function of (seed, position). Knows nothing of sampling.

There is no state to carry: a row's draw depends on its own seed and position and on nothing else that runs, in any
order, on any device. A GPU kernel computes the same words with 32-bit integer arithmetic.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10

Words4 = tuple[int, int, int, int]


def philox4x32(counter: Words4, key: tuple[int, int]) -> Words4:
    """Four random 32-bit words for a counter of four and a key of two 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = _MULTIPLIER_0 * c0
        product_1 = _MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (
            (product_1 >> 32) ^ c1 ^ k0,
            product_1 & _MASK,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a multiple of 2**-53, for a seed below 2**64 and a position below 2**32.

    The key is the seed's low and high word, the counter ``(position, 0, 0, 0)``; the number is made of the first output
    word and the upper 21 bits of the second: ``(w0 * 2**21 + (w1 >> 11)) * 2**-53``.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is 0 to 2**64 - 1, got {seed}")
    if not 0 <= position < 2**32:
        raise ValueError(f"a position is 0 to 2**32 - 1, got {position}")
    words = philox4x32((position, 0, 0, 0), (seed & _MASK, seed >> 32))
    return ((words[0] << 21) | (words[1] >> 11)) * 2.0**-53
