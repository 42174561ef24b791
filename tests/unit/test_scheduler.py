"""Scheduler: what a step computes, who is admitted, sent back or refused, and how a request ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paged_model import PagedModel, alone
from polyhead.engine import BlockManager, Request, SamplingParams, ScheduledStep, Scheduler, Status
from polyhead.errors import CapacityError, ConfigError, RequestError


def run_all(scheduler: Scheduler, model: PagedModel) -> list[ScheduledStep]:
    steps = []
    while scheduler.has_work:
        steps.append(scheduler.schedule())
        scheduler.postprocess(steps[-1], model.run(steps[-1]))
        assert len(steps) < 1_000
    return steps


def make(name: str, prompt: int, max_tokens: int, **kwargs) -> Request:
    return Request(
        name,
        [1 + i % 7 for i in range(prompt)],
        SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True),
        **kwargs,
    )


def shape(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(chunk.request.id, chunk.start, chunk.length) for chunk in step.chunks]


def test_decodes_come_first_and_prefill_takes_the_rest_in_chunks():
    scheduler = Scheduler(BlockManager(64, 4), 8, 4, 64)
    scheduler.add(make("a", 2, 5))
    scheduler.add(make("b", 15, 2))
    steps = run_all(scheduler, PagedModel(4))
    assert [shape(step) for step in steps] == [
        [("a", 0, 2), ("b", 0, 6)],
        [("a", 2, 1), ("b", 6, 7)],
        [("a", 3, 1), ("b", 13, 2)],
        [("a", 4, 1), ("b", 15, 1)],
        [("a", 5, 1)],
    ]
    assert [[request.id for request in step.sampled] for step in steps] == [
        ["a"],
        ["a"],
        ["a", "b"],
        ["a", "b"],
        ["a"],
    ]


def test_the_step_is_laid_out_as_a_batch():
    scheduler = Scheduler(BlockManager(8, 2), 16, 4, 64)
    scheduler.add(Request("a", [7, 8, 9]))
    scheduler.add(Request("b", [4]))
    step = scheduler.schedule()
    assert step.tokens == [7, 8, 9, 4]
    assert step.positions == [0, 1, 2, 0]
    assert step.query_start == [0, 3, 4]
    assert step.context_lens == [3, 1]
    assert step.block_tables == [[0, 1], [2]]
    assert step.logit_rows == [2, 3]


def test_the_youngest_is_preempted_and_computed_again():
    scheduler = Scheduler(BlockManager(5, 2), 16, 4, 64)
    old, young = make("old", 3, 6), make("young", 3, 4)
    expected = [alone(request, 64, 10) for request in (old, young)]
    scheduler.add(old)
    scheduler.add(young)
    steps = run_all(scheduler, PagedModel(2))
    assert (old.num_preemptions, young.num_preemptions) == (0, 1)
    assert [(r.output_ids, r.finish_reason) for r in (old, young)] == expected
    recomputed = next(i for i, step in enumerate(steps) if i and ("young", 0) in {s[:2] for s in shape(step)})
    assert shape(steps[recomputed])[-1][2] > 3, "prompt and output are computed again together"


def test_a_newcomer_leaves_a_spare_block_for_each_running_request():
    scheduler = Scheduler(BlockManager(4, 2), 16, 4, 64)
    scheduler.add(make("old", 2, 4))
    scheduler.add(make("new", 6, 1))
    steps = run_all(scheduler, PagedModel(2))
    assert shape(steps[0]) == [("old", 0, 2)], "3 blocks are free and 3 are needed, but old wants one of them next"
    assert sum(step.chunks[-1].request.id == "new" for step in steps) == 1, "new is computed once, when it fits"


def test_a_large_request_at_the_head_is_not_overtaken():
    scheduler = Scheduler(BlockManager(8, 2), 16, 4, 64)
    small = [make(f"s{i}", 2, 3) for i in range(3)]
    large = make("large", 14, 1)
    for request in (small[0], large, *small[1:]):
        scheduler.add(request)
    order = []
    for step in run_all(scheduler, PagedModel(2)):
        order += [chunk.request.id for chunk in step.chunks if chunk.request.id not in order]
    assert order == ["s0", "large", "s1", "s2"]


def test_a_request_that_outgrows_the_cache_ends_with_an_error_that_has_the_numbers():
    scheduler = Scheduler(BlockManager(3, 2), 16, 4, 64)
    request = make("r", 4, 50)
    scheduler.add(request)
    run_all(scheduler, PagedModel(2))
    assert request.finish_reason == "error"
    assert len(request.output_ids) == 3
    with pytest.raises(
        CapacityError, match=r"'r' with 4 prompt tokens and 3 generated ones needs 4 blocks .* has 3 of 2"
    ):
        raise request.error


def test_blocks_held_by_others_end_in_an_error_not_in_an_endless_loop():
    manager = BlockManager(3, 2)
    manager.extend([], 4)
    scheduler = Scheduler(manager, 16, 4, 64)
    request = make("r", 4, 1)
    scheduler.add(request)
    step = scheduler.schedule()
    assert step.requests == step.chunks == ()
    assert scheduler.has_work
    assert scheduler.postprocess(step, []) == [request]
    assert "1 of them free" in str(request.error)
    assert not scheduler.has_work


def test_a_full_context_ends_with_length():
    scheduler = Scheduler(BlockManager(8, 4), 16, 4, 10)
    request = make("r", 7, 50)
    scheduler.add(request)
    run_all(scheduler, PagedModel(4))
    assert (len(request.output_ids), request.finish_reason) == (3, "length")


def test_impossible_requests_are_refused_with_both_numbers():
    scheduler = Scheduler(BlockManager(2, 4), 16, 4, 10)
    with pytest.raises(RequestError, match="has 10 tokens; the context of 10 takes at most 9"):
        scheduler.add(make("r", 10, 1))
    with pytest.raises(CapacityError, match=r"needs 3 blocks .* it has 2 of 4"):
        scheduler.add(make("r", 9, 1))
    scheduler.add(make("r", 8, 1))
    with pytest.raises(RequestError, match="'r' is in use"):
        scheduler.add(make("r", 1, 1))
    with pytest.raises(RequestError, match="prompt is empty"):
        Request("r", [])
    with pytest.raises(RequestError, match="must hold token ids"):
        Request("r", [1, "2"])
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize("limits", [(0, 4, 8), (4, 0, 8), (4, 4, 1)])
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ConfigError, match="must be at least"):
        Scheduler(BlockManager(4, 4), *limits)


def test_abort_of_waiting_running_ended_and_unknown():
    manager = BlockManager(8, 2)
    scheduler = Scheduler(manager, 16, 1, 64)
    first, second = make("first", 4, 1), make("second", 4, 9)
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert scheduler.abort("second") is second
    assert scheduler.postprocess(step, [0]) == [first]
    assert scheduler.abort("first") is None
    assert scheduler.abort("nobody") is None
    assert (second.status, second.finish_reason, second.output_ids) == (Status.FINISHED, "abort", [])
    assert manager.free_blocks == 8
    scheduler.add(make("first", 1, 1))  # the id of a request that has ended is free again
    with pytest.raises(RequestError, match="was added before"):
        scheduler.add(second)


def test_what_a_step_computes_for_an_aborted_decode_is_dropped():
    scheduler = Scheduler(BlockManager(8, 2), 16, 4, 64)
    model = PagedModel(2)
    gone, stays = make("gone", 3, 9), make("stays", 3, 9)
    scheduler.add(gone)
    scheduler.add(stays)
    for made in range(3):
        step = scheduler.schedule()
        sampled = model.run(step)
        if made == 2:
            scheduler.abort("gone")
        scheduler.postprocess(step, sampled)
        scheduler.check_integrity()
    assert (len(gone.output_ids), gone.num_cached_tokens, len(stays.output_ids)) == (2, 0, 3)


def test_finish_ends_a_request_for_the_callers_reason():
    scheduler = Scheduler(BlockManager(8, 2), 16, 4, 64)
    request = make("r", 4, 9)
    scheduler.add(request)
    step = scheduler.schedule()
    assert scheduler.postprocess(step, [0]) == []
    assert scheduler.finish("r", "stop") is request
    assert (request.finish_reason, request.output_ids, scheduler.has_work) == ("stop", [0], False)


def test_a_failed_step_can_be_scheduled_again_and_a_stale_one_is_refused():
    scheduler = Scheduler(BlockManager(8, 2), 16, 4, 64)
    scheduler.add(make("r", 4, 9))
    stale = scheduler.schedule()
    step = scheduler.schedule()
    assert shape(step) == shape(stale)
    with pytest.raises(RuntimeError, match="the last call of schedule"):
        scheduler.postprocess(stale, [0])
    with pytest.raises(RuntimeError, match="samples 1 tokens, but 2 were given"):
        scheduler.postprocess(step, [0, 1])
    scheduler.postprocess(step, [0])
    with pytest.raises(RuntimeError, match="once"):
        scheduler.postprocess(step, [0])


def test_min_tokens_bans_the_stop_tokens_until_then():
    params = SamplingParams(min_tokens=2, stop_token_ids=[5], logit_bias={3: 1.0, 8: 2.0})
    request = Request("r", [1], params, eos_ids=[3])
    inf = float("inf")
    assert request.logit_bias == {3: -inf, 5: -inf, 8: 2.0}
    request.output_ids += [1, 1]
    assert request.logit_bias == {3: 1.0, 8: 2.0}
    assert Request("r", [1], SamplingParams(min_tokens=1, ignore_eos=True), eos_ids=[3]).logit_bias == {}


def test_a_seed_is_kept_or_drawn():
    assert Request("r", [1], SamplingParams(seed=5)).seed == 5
    drawn = {Request("r", [1]).seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(0 <= seed < 2**64 for seed in drawn)


def test_a_request_checks_its_ids_against_a_vocabulary():
    Request("r", [0, 15]).validate_for(16)
    with pytest.raises(RequestError, match=r"token id 16 at position 1 of the prompt .*\(0 to 15\)"):
        Request("r", [0, 16]).validate_for(16)
    with pytest.raises(RequestError, match="token id -1"):
        Request("r", [-1]).validate_for(16)
    with pytest.raises(RequestError, match="stop_token_ids"):
        Request("r", [1], SamplingParams(stop_token_ids=[99])).validate_for(16)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.lists(st.integers(0, 9), max_size=6), st.data())
def test_tokens_are_a_slice_of_prompt_and_output(prompt, output, data):
    request = Request("r", prompt)
    request.output_ids += output
    start = data.draw(st.integers(0, request.num_tokens))
    stop = data.draw(st.integers(start, request.num_tokens))
    assert request.tokens(start, stop) == (prompt + output)[start:stop]
