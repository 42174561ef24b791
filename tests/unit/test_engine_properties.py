"""The engine's promises, with any arrivals, cancels, priorities, samples, shared beginnings and tiny block pools.

Every request ends once with the tokens it gets alone, no block is lost, nobody starves. The model is
tests/reference/paged_model.py, which reads back what block tables name and knows what must stand there.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from paged_model import EOS, VOCAB, PagedModel, alone, next_token
from polyhead.engine import BlockManager, NgramDrafter, Request, SamplingParams, Scheduler, Speculation
from polyhead.errors import CapacityError, RequestError

STOP = 5
BEGINNINGS = [tuple((7 * i + j) % VOCAB for i in range(12)) for j in range(2)]


@dataclass(frozen=True)
class Arrival:
    """What comes at a step: a prompt in some samples, perhaps cancelled later, before or during a step."""

    step: int
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int
    salt: bytes | None
    abort: int | None
    inside: bool


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    max_tokens = draw(st.integers(1, 14))
    shared = draw(st.sampled_from(BEGINNINGS))[: draw(st.integers(0, 12))]
    own = draw(st.lists(st.integers(0, VOCAB - 1), max_size=6, min_size=0 if shared else 1))
    return Arrival(
        step=draw(st.integers(0, 12)),
        prompt=(*shared, *own),
        params=SamplingParams(
            max_tokens=max_tokens,
            min_tokens=draw(st.one_of(st.just(0), st.just(0), st.integers(0, max_tokens))),
            stop_token_ids=draw(st.sampled_from([(), (STOP,)])),
            ignore_eos=draw(st.booleans()),
            seed=draw(st.integers(0, 3)),
            n=draw(st.sampled_from([1, 1, 1, 2, 3])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, 0])),
        ),
        priority=draw(st.sampled_from([0, 0, -1, 2])),
        salt=draw(st.sampled_from([b"", b"", b"", b"other", None])),
        abort=draw(st.one_of(st.none(), st.none(), st.integers(0, 25))),
        inside=draw(st.booleans()),
    )


def samples(number: int, arrival: Arrival) -> list[Request]:
    first = Request(
        f"r{number}",
        arrival.prompt,
        arrival.params,
        eos_ids=[EOS],
        priority=arrival.priority,
        cache_salt=arrival.salt,
    )
    return [first, *(first.another(f"r{number}.{i}", i) for i in range(1, arrival.params.n))]


def abort_some(scheduler: Scheduler, requests: list[Request]) -> list[Request]:
    """Aborts them; returns those that had not ended before, as the scheduler must."""
    live = [request for request in requests if not request.finished]
    assert [scheduler.abort(request.id) for request in requests] == [r if r in live else None for r in requests]
    return live


@dataclass
class Guesser:
    """A drafter that guesses what really comes, but for one token in ``wrong``."""

    most: int
    wrong: int

    def draft(self, request: Request, most: int) -> tuple[int, ...]:
        history = request.tokens(0, request.num_tokens)
        guess = []
        for number in range(min(most, self.most)):
            right = next_token(history + guess, request.seed)
            guess.append((right + ((request.num_tokens + number) % self.wrong == 0)) % VOCAB)
        return tuple(guess)

    def learn(self, request: Request, drafted: int, accepted: int) -> None:
        assert 0 <= accepted <= drafted > 0


drafters = st.one_of(
    st.none(),
    st.builds(Guesser, st.integers(1, 4), st.integers(1, 5)),
    st.builds(Guesser, st.integers(1, 4), st.integers(2, 9)),
    st.builds(NgramDrafter, st.integers(1, 4), ngram_max=st.just(2), ngram_min=st.integers(1, 2)),
)


def cost(request: Request) -> int:
    """Steps that a request takes at most while it is the one of the lowest rank."""
    return len(request.prompt_ids) + request.params.max_tokens + 1


@settings(max_examples=300, deadline=None)
@given(
    plan=st.lists(arrivals(), min_size=1, max_size=8),
    num_blocks=st.one_of(st.integers(1, 12), st.integers(30, 60)),
    block_size=st.integers(1, 4),
    budget=st.integers(1, 12),
    max_sequences=st.integers(1, 5),
    context=st.integers(2, 30),
    ageing=st.sampled_from([1, 4, 256]),
    fail=st.sets(st.integers(0, 40), max_size=3),
    drafter=drafters,
    draft_rows=st.integers(2, 12),
    more_rows=st.integers(0, 6),
)
def test_every_request_ends_once_with_the_tokens_it_gets_alone_and_no_block_is_lost(
    plan, num_blocks, block_size, budget, max_sequences, context, ageing, fail, drafter, draft_rows, more_rows
):
    manager = BlockManager(num_blocks, block_size)
    scheduler = Scheduler(
        manager,
        budget,
        max_sequences,
        context,
        ageing_steps=ageing,
        max_logit_rows=max_sequences + more_rows,
        speculation=None if drafter is None else Speculation(drafter, draft_rows),
    )
    model = PagedModel(block_size)
    coming: dict[int, list[Request]] = {}
    cancels: dict[int, list[tuple[Request, bool]]] = {}
    for number, arrival in enumerate(plan):
        group = samples(number, arrival)
        coming.setdefault(arrival.step, []).extend(group)
        if arrival.abort is not None:
            cancels.setdefault(arrival.abort, []).extend((request, arrival.inside) for request in group)
    requests: list[Request] = []
    ended: list[Request] = []
    model_steps = 0
    for now in range(2_000):
        for request in coming.pop(now, ()):
            try:
                scheduler.add(request)
            except CapacityError:
                assert len(request.prompt_ids) > num_blocks * block_size
            except RequestError:
                assert len(request.prompt_ids) >= context
            else:
                requests.append(request)
        ended += abort_some(scheduler, [r for r, inside in cancels.get(now, ()) if not inside and r in requests])
        scheduler.check_integrity()
        if not scheduler.has_work and not coming:
            break
        step = scheduler.schedule()
        scheduler.check_integrity()
        assert len(step.tokens) <= budget
        assert len(step.requests) <= min(max_sequences, budget)
        assert len(step.logit_rows) <= max_sequences + more_rows
        assert len(set(step.logit_rows)) == len(step.logit_rows)
        if step.drafts:
            assert step.decodes + sum(1 + len(draft) for _, draft in step.drafts) <= draft_rows
        live = sorted((r for r in requests if not r.finished), key=lambda r: r.rank)
        if live:
            assert live[0] in step.requests, "the request of the lowest rank moves in every step"
        sampled = model.run(step)
        if now in fail:  # the step is lost and planned anew
            scheduler.check_integrity()
            continue
        ended += abort_some(scheduler, [r for r, inside in cancels.get(now, ()) if inside and r in requests])
        ended += scheduler.postprocess(step, sampled)
        scheduler.check_integrity()
        model_steps += 1
    else:
        pytest.fail("requests starve")
    idle = max(arrival.step for arrival in plan)  # steps that may pass before the last one comes
    assert model_steps <= idle + sum(map(cost, requests))
    assert manager.free_blocks == num_blocks
    assert len(ended) == len(set(ended)) == len(requests)
    assert set(ended) == set(requests)
    for request in requests:
        tokens, reason = alone(request, context, num_blocks * block_size)
        if request.finish_reason == "abort":
            assert request.output_ids == tokens[: len(request.output_ids)]
        else:
            assert (request.output_ids, request.finish_reason) == (tokens, reason)
        assert isinstance(request.error, CapacityError) is (request.finish_reason == "error")
        assert 0 <= request.num_reused_tokens < len(request.prompt_ids)
        assert request.num_reused_tokens % block_size == 0
        if request.params.prompt_logprobs is not None and request.sample == 0 and request.output_ids:
            assert sorted(set(model.scored.get(request.id, []))) == list(range(1, len(request.prompt_ids)))
            if not fail:
                assert model.scored.get(request.id, []) == list(range(1, len(request.prompt_ids)))
        else:
            assert request.sample == 0 or request.id not in model.scored
    event(f"guessed: {any(r.num_drafted for r in requests)}, right: {any(r.num_accepted for r in requests)}")
    event(f"preempted: {any(r.num_preemptions for r in requests)}")
    event(f"reused: {any(r.num_reused_tokens for r in requests)}")


@settings(max_examples=40, deadline=None)
@given(
    levels=st.integers(0, 3),
    ageing=st.integers(1, 12),
    num_blocks=st.integers(4, 10),
    budget=st.integers(2, 8),
    prompt=st.integers(1, 7),
    flood=st.integers(1, 7),
)
def test_a_flood_of_better_priority_delays_a_request_no_longer_than_promised(
    levels, ageing, num_blocks, budget, prompt, flood
):
    scheduler = Scheduler(BlockManager(num_blocks, 2), budget, 3, 64, ageing_steps=ageing)
    model = PagedModel(2)

    def make(name: str, length: int, priority: int) -> Request:
        params = SamplingParams(max_tokens=4, seed=1, ignore_eos=True)
        return Request(name, [len(name)] * length, params, priority=priority, cache_salt=b"")

    old = make("old", prompt, levels)
    requests = []
    for now in range(10_000):
        if now == 5:
            scheduler.add(old)
        for i in range(2):  # more than can ever be done
            requests.append(make(f"{now}.{i}", flood, 0))
            scheduler.add(requests[-1])
        step = scheduler.schedule()
        scheduler.postprocess(step, model.run(step))
        if old.finished:
            break
    before = [request for request in requests if request.rank < old.rank]
    assert len(before) <= 2 * (6 + levels * ageing)
    assert now <= sum(map(cost, before)) + cost(old)
    assert now >= levels * ageing / 2, "the flood is so dense that priority shows"
    scheduler.check_integrity()
