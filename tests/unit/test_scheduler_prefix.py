"""Shared beginnings: what is found, what is computed all the same, and when blocks may be found."""

from __future__ import annotations

import pytest
from paged_model import PagedModel, alone
from polyhead.engine import BlockManager, Request, SamplingParams, ScheduledStep, Scheduler

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]


def make(name: str, prompt: list[int], max_tokens: int = 2, salt: bytes | None = b"", **more: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens, seed=1, ignore_eos=True)
    return Request(name, prompt, params, cache_salt=salt, **more)


def run_all(scheduler: Scheduler, model: PagedModel) -> list[ScheduledStep]:
    steps = []
    while scheduler.has_work:
        steps.append(scheduler.schedule())
        scheduler.postprocess(steps[-1], model.run(steps[-1]))
        scheduler.check_integrity()
        assert len(steps) < 1_000
    assert scheduler.block_manager.free_blocks == scheduler.block_manager.num_blocks
    return steps


def shape(step: ScheduledStep) -> list[tuple[str, int, int]]:
    return [(chunk.request.id, chunk.start, chunk.length) for chunk in step.chunks]


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler(BlockManager(32, 4), 16, 4, 64)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        (PROMPT, 4),  # the last token is computed, so its block is too
        ([*PROMPT, 9], 8),
        ([*PROMPT, 9, 10, 11, 12, 13], 8),
        (PROMPT[:7], 4),
        (PROMPT[:4], 0),
        ([1, 2, 3, 9, 5, 6, 7, 8, 9], 0),
        ([9, 2, 3, 4, 5, 6, 7, 8, 9], 0),
        (PROMPT[4:] * 3, 0),
    ],
)
def test_full_blocks_of_a_known_beginning_are_not_computed_again(scheduler, prompt, found):
    model = PagedModel(4)
    scheduler.add(make("first", PROMPT))
    run_all(scheduler, model)
    second = make("second", prompt)
    scheduler.add(second)
    steps = run_all(scheduler, model)
    assert shape(steps[0]) == [("second", found, len(prompt) - found)]
    assert second.num_reused_tokens == found
    assert second.output_ids == alone(second, 64, 128)[0]


def test_output_is_found_as_well_as_prompt(scheduler):
    model = PagedModel(4)
    first = make("first", PROMPT[:6], 8)
    scheduler.add(first)
    run_all(scheduler, model)
    second = make("second", [*first.prompt_ids, *first.output_ids, 1])
    scheduler.add(second)
    run_all(scheduler, model)
    assert second.num_reused_tokens == 12, "13 of 14 tokens were cached, the last sampled one never is"


def test_salts_keep_requests_apart_and_without_one_nothing_is_shared(scheduler):
    model = PagedModel(4)
    for number, salt in enumerate((b"a", b"b", None, None)):
        scheduler.add(request := make(str(number), [*PROMPT, 1], salt=salt))
        run_all(scheduler, model)
        assert request.num_reused_tokens == 0
    scheduler.add(request := make("again", [*PROMPT, 1], salt=b"a"))
    run_all(scheduler, model)
    assert request.num_reused_tokens == 8


def test_requests_that_begin_alike_wait_for_the_first_to_compute_it():
    scheduler = Scheduler(BlockManager(32, 4), 8, 4, 64)
    model = PagedModel(4)
    for number in range(3):
        scheduler.add(make(str(number), [*range(12), number]))
    steps = run_all(scheduler, model)
    assert [shape(step) for step in steps[:3]] == [
        [("0", 0, 8)],
        [("0", 8, 5)],
        [("0", 13, 1), ("1", 12, 1), ("2", 12, 1)],
    ]
    assert model.written == 13 + 1 + 2 * 2, "the beginning once, then what is each one's own, then the second tokens"


def test_waiting_for_a_beginning_ends_when_its_owner_is_aborted():
    scheduler = Scheduler(BlockManager(32, 4), 8, 4, 64)
    model = PagedModel(4)
    first, second = make("first", [*range(12), 1]), make("second", [*range(12), 2])
    scheduler.add(first)
    scheduler.add(second)
    step = scheduler.schedule()
    assert scheduler.postprocess(step, model.run(step)) == []
    scheduler.abort("first")
    assert shape(run_all(scheduler, model)[0]) == [("second", 8, 5)], "what the first has computed is of use"


def test_nobody_waits_for_a_request_of_a_higher_rank():
    scheduler = Scheduler(BlockManager(32, 4), 4, 4, 64)
    model = PagedModel(4)
    scheduler.add(make("slow", [*range(12), 1], priority=5))
    step = scheduler.schedule()
    scheduler.postprocess(step, model.run(step))
    scheduler.add(make("urgent", [*range(12), 2], priority=-5))
    assert shape(scheduler.schedule()) == [("urgent", 4, 4)]


def test_a_step_that_fails_publishes_nothing(scheduler):
    manager = scheduler.block_manager
    scheduler.add(make("first", [*PROMPT, 1]))
    scheduler.schedule()
    assert manager.cached_blocks == 0
    scheduler.finish("first", "error")
    scheduler.add(second := make("second", [*PROMPT, 2]))
    run_all(scheduler, PagedModel(4))
    assert second.num_reused_tokens == 0
    assert manager.cached_blocks == 2


def test_an_abort_while_the_step_runs_publishes_nothing_of_that_step(scheduler):
    model = PagedModel(4)
    scheduler.add(make("first", [*PROMPT, 1]))
    step = scheduler.schedule()
    sampled = model.run(step)
    scheduler.abort("first")
    scheduler.postprocess(step, sampled)
    assert scheduler.block_manager.cached_blocks == 0
    scheduler.check_integrity()


def test_a_preempted_request_finds_its_own_blocks_again():
    scheduler = Scheduler(BlockManager(7, 2), 16, 4, 64)
    model = PagedModel(2)
    old, young = make("old", [1, 2, 3], 9), make("young", [9, 8, 7, 6, 5], 6)
    scheduler.add(old)
    scheduler.add(young)
    steps = run_all(scheduler, model)
    assert young.num_preemptions == 1
    mine = [chunk for step in steps for chunk in shape(step) if chunk[0] == "young"]
    assert mine == [("young", start, length) for start, length in ((0, 5), (5, 1), (6, 1), (7, 1), (2, 7), (9, 1))]
    assert young.num_reused_tokens == 0, "it counts what the prompt had, not what the request computed itself"
    assert old.output_ids == alone(old, 64, 14)[0]
    assert young.output_ids == alone(young, 64, 14)[0]


def test_samples_of_a_prompt_compute_it_once_and_differ(scheduler):
    model = PagedModel(4)
    first = Request("r", [*PROMPT, 1], SamplingParams(max_tokens=6, seed=7, n=4, ignore_eos=True), cache_salt=b"r")
    others = [first.another(f"r.{i}", i) for i in range(1, 4)]
    for request in (first, *others):
        scheduler.add(request)
    steps = run_all(scheduler, model)
    assert shape(steps[0]) == [("r", 0, 9)]
    assert shape(steps[1]) == [("r", 9, 1), *((f"r.{i}", 8, 1) for i in range(1, 4))]
    assert [request.output_ids for request in (first, *others)] == [
        alone(request, 64, 128)[0] for request in (first, *others)
    ]
    assert len({tuple(request.output_ids) for request in (first, *others)}) == 4
    golden = 0x9E3779B97F4A7C15
    assert [request.seed for request in (first, *others)] == [(7 + i * golden) % 2**64 for i in range(4)]


def test_cached_blocks_make_room_for_new_ones():
    scheduler = Scheduler(BlockManager(4, 2), 16, 4, 64)
    model = PagedModel(2)
    for start in range(0, 40, 5):
        scheduler.add(make(str(start), [i % 16 for i in range(start, start + 5)]))
        run_all(scheduler, model)
        assert scheduler.block_manager.cached_blocks <= 4
