"""Prompts whose tokens are scored: how much of one a step takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from polyhead.engine import Request, SamplingParams
from polyhead.engine.step import scored_chunk

SCORED = SamplingParams(max_tokens=2, prompt_logprobs=0, seed=1)


class Counting(Request):
    __slots__ = ("looks",)

    def unscored(self, start: int, end: int) -> range:
        self.looks += 1
        return super().unscored(start, end)


@given(
    prompt=st.integers(1, 12),
    made=st.integers(0, 3),
    scored=st.integers(1, 12),
    cached=st.integers(0, 14),
    most=st.integers(1, 15),
    rows=st.integers(0, 9),
)
def test_a_chunk_is_the_longest_that_the_rows_suffice_for(prompt, made, scored, cached, most, rows):
    request = Request("r", [1] * prompt, SCORED)
    request.output_ids += [2] * made
    request.num_scored = min(scored, prompt)
    request.num_cached_tokens = min(cached, request.num_tokens - 1)
    most = min(most, request.num_tokens - request.num_cached_tokens)
    fitting = []
    for chunk in range(1, most + 1):
        end = request.num_cached_tokens + chunk
        needed = len(request.unscored(request.num_cached_tokens, end)) - (end < request.num_tokens)
        if needed <= rows:
            fitting.append((chunk, max(0, needed)))
    assert scored_chunk(request, most, rows) == fitting[-1]


def test_a_chunk_of_a_long_prompt_is_found_without_a_search():
    request = Counting("r", [1] * 100_000, SCORED)
    request.looks = 0
    assert scored_chunk(request, 65_536, 63) == (64, 63)
    assert request.looks <= 3
