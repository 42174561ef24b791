"""Prompts whose tokens are scored: how much of one a step takes, and that others do not wait for it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from paged_model import PagedModel
from polyhead.engine import BlockManager, Request, SamplingParams, Scheduler
from polyhead.engine.step import scored_chunk

SCORED = SamplingParams(max_tokens=2, prompt_logprobs=0, seed=1)
PLAIN = SamplingParams(max_tokens=2, seed=1)


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


def test_nobody_waits_for_what_a_scored_prompt_computes_a_few_tokens_at_a_time():
    scheduler = Scheduler(BlockManager(400, 4), 64, 8, 1_000)
    model = PagedModel(4)
    prompt = [1 + i % 7 for i in range(400)]
    scheduler.add(Request("scored", prompt, SCORED, cache_salt=b""))
    scheduler.add(alike := Request("alike", prompt, PLAIN, cache_salt=b""))
    scheduler.add(behind := Request("behind", [3] * 5, PLAIN, cache_salt=b""))
    for _ in range(10):
        step = scheduler.schedule()
        scheduler.postprocess(step, model.run(step))
    assert behind.finished
    assert alike.output_ids
    assert scheduler.num_running == 1


def test_many_scored_prompts_leave_room_for_others_beside_them():
    scheduler = Scheduler(BlockManager(400, 4), 64, 8, 1_000)
    model = PagedModel(4)
    for number in range(7):
        scheduler.add(Request(f"scored{number}", [1 + number] * 100, SCORED, cache_salt=b""))
    scheduler.add(other := Request("other", [9] * 50, PLAIN, cache_salt=b""))
    step = scheduler.schedule()
    scheduler.postprocess(step, model.run(step))
    assert len(step.logit_rows) <= 8
    assert len(other.output_ids) == 1, "the step had room for 64 tokens, and the scored prompts took 8"


def test_a_short_scored_prompt_is_computed_once_for_all_samples():
    scheduler = Scheduler(BlockManager(400, 4), 64, 24, 1_000)
    model = PagedModel(4)
    first = Request("s", [1 + i % 7 for i in range(21)], SCORED, cache_salt=b"")
    for request in (first, first.another("s.1", 1), first.another("s.2", 2)):
        scheduler.add(request)
    while scheduler.has_work:
        step = scheduler.schedule()
        scheduler.postprocess(step, model.run(step))
    assert model.written == 21 + 2 * 1 + 3 * 1, "the prompt, its last token for two more, and the token after it"
