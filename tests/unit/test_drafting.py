"""NgramDrafter: what it guesses, when it rests, and what numbers it takes."""

from __future__ import annotations

import time
from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.engine import NgramDrafter, Request, SamplingParams
from polyhead.errors import ConfigError


def request_of(tokens: list[int]) -> Request:
    return Request("r", tokens, SamplingParams(max_tokens=100, seed=1))


def draft(tokens: list[int], most: int = 10, **numbers: int) -> tuple[int, ...]:
    return NgramDrafter(**{"max_tokens": 10, "ngram_max": 3, "ngram_min": 2, **numbers}).draft(request_of(tokens), most)


def test_what_followed_the_last_tokens_before_is_the_guess():
    assert draft([1, 2, 3, 4, 5, 9, 1, 2], 3) == (3, 4, 5)
    assert draft([1, 2, 3, 4, 5, 9, 1, 2], 1) == (3,)
    assert draft([1, 2, 3, 4, 5, 9, 1, 2], max_tokens=2) == (3, 4)
    assert draft([1, 2, 3, 9, 2], 3) == (), "one token alone is not enough"
    assert draft([1, 2, 3, 9, 2], 3, ngram_min=1) == (3, 9, 2)
    assert draft([7]) == draft([7, 8]) == draft([1, 2, 3]) == ()
    assert draft([1, 2, 3, 9, 1, 2], 0) == ()


def test_the_longest_ending_counts_before_the_latest_place():
    assert draft([1, 2, 3, 40, 2, 3, 50, 1, 2, 3], 1) == (40,)
    assert draft([1, 2, 3, 40, 2, 3, 50, 8, 2, 3], 1) == (50,)
    assert draft([1, 2, 3, 40, 2, 3, 50, 1, 2, 3], 1, ngram_max=2) == (50,)


def test_a_repetition_is_guessed_to_go_on():
    assert draft([4, 4, 4], 5) == (4, 4, 4, 4, 4)
    assert draft([1, 2, 3, 1, 2, 3, 1, 2], 7) == (3, 1, 2, 3, 1, 2, 3)


@given(
    tokens=st.lists(st.sampled_from([0, 1, 256, 257, 65536, 65537, 0xD800, 0x10FFFF]), min_size=1, max_size=40),
    cuts=st.lists(st.integers(1, 39), max_size=4),
    most=st.integers(1, 8),
)
def test_it_is_a_plain_search_whose_memory_grows_with_the_request(tokens, cuts, most):
    # Ids whose bytes look like those of two neighbours; parts come one after the other.
    drafter = NgramDrafter(max_tokens=8, ngram_max=3, ngram_min=1)
    request = request_of(tokens[:1])
    for end in [*sorted({cut for cut in cuts if cut < len(tokens)}), len(tokens)]:
        request.output_ids[:] = tokens[1:end]
        found = drafter.draft(request, most)
        known = tokens[:end]
        expected: list[int] = []
        for size in (3, 2, 1):
            places = (
                [at for at in range(size, end) if known[at - size : at] == known[end - size :]] if size < end else []
            )
            if places:
                text = list(known)
                for i in range(most):
                    text.append(text[places[-1] + i])
                expected = text[end:]
                break
        assert list(found) == expected


def test_ids_beyond_the_last_character_are_guessed_as_they_are():
    assert draft([2**31 - 1, 2**24, 5, 2**31 - 1, 2**24], 2) == (5, 2**31 - 1)


def test_a_long_prompt_made_to_be_slow_is_searched_as_fast_as_any():
    # The bytes of 256 stand in a row of 65536s too, one byte further: a search for bytes stops at each.
    request = request_of([65536] * 400_000)
    drafter = NgramDrafter()
    drafter.draft(request, 7)
    before = request.lookup
    request.output_ids += [256, 256]
    seconds = []
    for _ in range(5):
        request.lookup = deepcopy(before)
        start = time.perf_counter()
        assert drafter.draft(request, 7) == ()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.01


def test_wrong_guesses_make_it_rest_and_right_ones_bolder():
    drafter = NgramDrafter(max_tokens=8, ngram_max=1, ngram_min=1)
    request = request_of([5, 5])
    lengths = []
    for right in (0, 0, 0, 1, 2, 4, 8, 8, 3):
        rested = 0
        while not (guess := drafter.draft(request, 8)):
            rested += 1
        lengths.append((rested, len(guess)))
        drafter.learn(request, len(guess), min(right, len(guess)))
    assert lengths == [(0, 8), (1, 4), (2, 2), (4, 1), (0, 2), (0, 4), (0, 8), (0, 8), (0, 8)]
    assert len(drafter.draft(request, 8)) == 4


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        ({"max_tokens": 0}, "max_tokens of speculation must be a whole number from 1 to 32, got 0"),
        ({"max_tokens": 33}, "from 1 to 32, got 33"),
        ({"max_tokens": 1.5}, "got 1.5"),
        ({"ngram_min": True}, "got True"),
        ({"ngram_max": 0}, "ngram_max of speculation must be a whole number from 1 to 32, got 0"),
        ({"ngram_max": 2, "ngram_min": 3}, "ngram_min of speculation must be a whole number from 1 to 2, got 3"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers, says):
    with pytest.raises(ConfigError, match=says):
        NgramDrafter(**numbers)
