"""Philox4x32-10 against the known-answer vectors that its authors publish with Random123, and the uniform from it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.runtime.philox import philox4x32, uniform

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    assert philox4x32(counter, key) == words


def test_uniform_is_the_upper_53_bits_of_the_first_two_words():
    assert uniform(0, 0) == ((0x6627E8D5 << 32 | 0xE169C58D) >> 11) / 2**53


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_uniform_is_in_the_half_open_unit_interval_and_reproducible(seed, position):
    value = uniform(seed, position)
    assert 0.0 <= value < 1.0
    assert value == uniform(seed, position)


def test_both_words_of_the_seed_and_the_position_matter():
    draws = {uniform(seed, position) for seed in (0, 1, 1 << 32, 1 << 63) for position in (0, 1, 2**31)}
    assert len(draws) == 12


@pytest.mark.parametrize(("seed", "position"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_out_of_range_is_refused(seed, position):
    with pytest.raises(ValueError, match="is 0 to"):
        uniform(seed, position)


@pytest.mark.parametrize("vary", ["position", "seed"])
def test_uniform_fills_the_interval_evenly(vary):
    n, bins = 20_000, 50
    counts = [0] * bins
    for i in range(n):
        counts[int(bins * (uniform(7, i) if vary == "position" else uniform(i, 7)))] += 1
    chi_square = sum((c - n / bins) ** 2 / (n / bins) for c in counts)
    assert 20 < chi_square < 95  # 49 degrees of freedom: outside once in about 10,000
