"""Priorities: who runs first, who makes way, what a level is worth, and that a full house is told at once."""

from __future__ import annotations

import pytest
from paged_model import PagedModel, alone
from polyhead.engine import BlockManager, Request, SamplingParams, ScheduledStep, Scheduler, Status
from polyhead.errors import RequestError


def make(name: str, prompt: int, max_tokens: int, priority: int = 0) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return Request(name, [(1 + i) % 16 for i in range(prompt)], params, priority=priority)


def ids(step: ScheduledStep) -> list[str]:
    return [request.id for request in step.requests]


def advance(scheduler: Scheduler, model: PagedModel) -> list[str]:
    step = scheduler.schedule()
    scheduler.postprocess(step, model.run(step))
    scheduler.check_integrity()
    return ids(step)


def test_a_lower_number_runs_earlier_and_ties_go_by_arrival():
    scheduler = Scheduler(BlockManager(64, 2), 16, 1, 64)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -3), ("e", 0)):
        scheduler.add(make(name, 2, 1, priority))
    model = PagedModel(2)
    assert [advance(scheduler, model) for _ in range(5)] == [["d"], ["b"], ["e"], ["a"], ["c"]]


def test_prefill_is_shared_out_by_rank():
    scheduler = Scheduler(BlockManager(64, 2), 4, 4, 64)
    model = PagedModel(2)
    scheduler.add(make("long", 20, 1))
    assert advance(scheduler, model) == ["long"]
    scheduler.add(make("urgent", 6, 1, -1))
    assert [advance(scheduler, model) for _ in range(3)] == [["urgent"], ["urgent", "long"], ["long"]]


def test_a_full_batch_makes_way_for_a_better_priority_and_goes_on_later():
    scheduler = Scheduler(BlockManager(64, 2), 16, 2, 64)
    model = PagedModel(2)
    first, second = make("first", 3, 6), make("second", 3, 6)
    scheduler.add(first)
    scheduler.add(second)
    assert advance(scheduler, model) == ["first", "second"]
    scheduler.add(same := make("same", 3, 1))
    scheduler.add(urgent := make("urgent", 3, 3, -1))
    assert advance(scheduler, model) == ["first", "urgent"]
    assert (second.status, second.num_preemptions, same.num_preemptions) == (Status.WAITING, 1, 0)
    while scheduler.has_work:
        advance(scheduler, model)
    for request in (first, second, same, urgent):
        assert request.output_ids == alone(request, 64, 128)[0]


@pytest.mark.parametrize("sequences", [1, 2])
def test_decodes_that_use_up_the_budget_make_way_too(sequences):
    scheduler = Scheduler(BlockManager(64, 2), sequences, sequences, 64)
    model = PagedModel(2)
    names = [f"r{number}" for number in range(sequences)]
    for name in names:
        scheduler.add(make(name, 1, 20))
    while advance(scheduler, model) != names:
        pass
    advance(scheduler, model)
    scheduler.add(make("urgent", 3, 2, -1))
    assert advance(scheduler, model) == [*names[:-1], "urgent"]


def test_the_worst_priority_and_then_the_latest_gives_up_its_blocks():
    scheduler = Scheduler(BlockManager(10, 2), 16, 4, 64)
    model = PagedModel(2)
    scheduler.add(good := make("good", 3, 12))
    scheduler.add(bad := make("bad", 3, 12, 1))
    scheduler.add(late := make("late", 3, 12))
    preempted = []
    while scheduler.has_work:
        advance(scheduler, model)
        preempted += [r.id for r in (good, bad, late) if r.num_preemptions and r.id not in preempted]
    assert preempted == ["bad", "late"]


def test_nobody_makes_way_where_that_would_not_be_enough():
    scheduler = Scheduler(BlockManager(8, 2), 16, 4, 64)
    model = PagedModel(2)
    scheduler.add(make("best", 8, 3, -5))
    scheduler.add(small := make("small", 1, 3))
    advance(scheduler, model)
    scheduler.add(make("large", 12, 1, -1))
    assert advance(scheduler, model) == ["best", "small"]
    assert small.num_preemptions == 0


def test_a_level_is_worth_so_many_steps_of_waiting():
    scheduler = Scheduler(BlockManager(64, 2), 16, 1, 64, ageing_steps=10)
    model = PagedModel(2)
    scheduler.add(make("running", 1, 30, -100))
    scheduler.add(make("old", 1, 1, 2))
    for number in range(30):
        if number in (0, 19, 20):  # 20 steps make up for two levels
            scheduler.add(make(f"new{number}", 1, 1))
        advance(scheduler, model)
    assert [advance(scheduler, model)[0] for _ in range(4)] == ["new0", "new19", "old", "new20"]


@pytest.mark.parametrize("priority", [2**31, -(2**31), 0.5, "1", True, None])
def test_what_is_no_priority_is_refused(priority):
    with pytest.raises(RequestError, match="priority must be a 32-bit integer"):
        Request("r", [1], priority=priority)


def test_a_prompt_that_makes_way_while_it_is_scored_is_scored_once():
    scheduler = Scheduler(BlockManager(6, 2), 4, 4, 64, ageing_steps=1)
    model = PagedModel(2)
    scored = Request("scored", [1, 2, 3, 4, 5, 6, 7, 8], SamplingParams(max_tokens=2, prompt_logprobs=0, seed=1))
    scheduler.add(scored)
    step = scheduler.schedule()
    scheduler.postprocess(step, model.run(step))
    assert 1 < scored.num_scored < 8
    urgent = Request("urgent", [9] * 8, SamplingParams(max_tokens=2, seed=1), priority=-9)
    scheduler.add(urgent)
    while scheduler.has_work:
        step = scheduler.schedule()
        scheduler.postprocess(step, model.run(step))
    assert scored.num_preemptions == 1
    assert model.scored["scored"] == [1, 2, 3, 4, 5, 6, 7]
