"""Shared beginnings and several samples in the Python API: the same results, fewer tokens computed, nothing left."""

from __future__ import annotations

import math
from dataclasses import replace

import memory_source
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyhead import LLM, SamplingParams
from polyhead.errors import RequestError
from polyhead.generation import Generation
from polyhead.model import Model
from polyhead.runtime.contract import RuntimeOptions
from polyhead.runtime.cpu.model import CpuModel
from small_llm import counting

RUNTIME = {"context": 40, "block_size": 4, "max_batch": 3, "max_tokens_per_step": 16}
IDS = [5, 17, 2, 80, 33, 9, 9, 1, 60]
SEED_STEP = 0x9E3779B97F4A7C15
GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def open_llm(tiny_model):
    def build(name: str = "llama-gqa", **runtime: object) -> LLM:
        return LLM({"model": str(tiny_model(name)), "device": "cpu", "runtime": {**RUNTIME, **runtime}})

    return build


def assert_idle(llm: LLM) -> None:
    assert llm._generation.free_blocks == llm.plan.num_blocks
    assert not llm._generation.has_work
    llm._generation.check_integrity()


def seeded(seed: int, **more: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "temperature": 1.0, "seed": seed, "ignore_eos": True, **more})


def test_a_completion_says_how_much_of_its_prompt_was_cached(open_llm):
    with open_llm() as llm:
        first, again = (llm.generate([IDS], GREEDY)[0] for _ in range(2))
        assert (first.cached_tokens, again.cached_tokens) == (0, 8)
        assert first == again
        stream = llm.stream([*IDS, *first.token_ids, 7], GREEDY)
        assert stream.prompt_token_ids == (*IDS, *first.token_ids, 7)
        assert len(list(stream)) == 8
        assert stream.cached_tokens == 16
        assert_idle(llm)
    with open_llm(prefix_cache=False) as llm:
        assert [llm.generate([IDS], GREEDY)[0].cached_tokens for _ in range(2)] == [0, 0]
        assert llm._generation.cached_blocks == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_samples_compute_their_prompt_once_and_sample_0_is_the_only_one_s(open_llm, monkeypatch, prefix_cache):
    with open_llm(prefix_cache=prefix_cache) as llm:
        alone = llm.generate([IDS], seeded(3))[0]
        assert (alone.samples, alone.outputs) == ((), (alone,))
        llm.generate([[90, 91, 92]] * 8, GREEDY)  # whatever was kept does not matter
        counts = counting(llm, monkeypatch)
        out = llm.generate([[*IDS, 4]], seeded(3, n=3, logprobs=1))[0]
        assert sum(counts) == len(IDS) + 1 - 8 * prefix_cache + 2 * 2 + 3 * 7
        assert [each.index for each in out.outputs] == [0, 1, 2]
        assert out.outputs[1:] == out.samples
        assert len({each.token_ids for each in out.outputs}) == 3
        for each in out.outputs:
            assert each.text == llm.tokenizer.decode(each.token_ids)
            assert len(each.logprobs) == len(each.token_ids) == 8
            assert each.prompt_token_ids == (*IDS, 4)
        for i, each in enumerate(out.outputs):
            same = llm.generate([[*IDS, 4]], seeded((3 + i * SEED_STEP) % 2**64))[0]
            assert same.token_ids == each.token_ids
        assert llm.generate([[*IDS, 4]], seeded(3))[0].text == out.text
        assert_idle(llm)


def test_samples_may_end_at_different_times_and_for_different_reasons(open_llm):
    with open_llm() as llm:
        ends = {"max_tokens": 6, "stop_token_ids": list(range(0, 97, 12))}
        outs = llm.generate([IDS, [1, 2]], seeded(1, n=6, **ends))
        for out in outs:
            assert len(out.outputs) == 6
            for i, each in enumerate(out.outputs):
                (again,) = llm.generate([out.prompt_token_ids], seeded((1 + i * SEED_STEP) % 2**64, **ends))
                assert (each.token_ids, each.finish_reason) == (again.token_ids, again.finish_reason)
        assert {each.finish_reason for out in outs for each in out.outputs} == {"stop", "length"}
        assert_idle(llm)


def test_what_samples_and_priorities_may_not_be(open_llm):
    with open_llm() as llm:
        with pytest.raises(RequestError, match="a stream has one sample, n is 2"):
            llm.stream(IDS, seeded(1, n=2))
        for n in (0, 129, 1.5, True):
            with pytest.raises(RequestError, match="n must be an integer from 1 to 128"):
                SamplingParams(n=n)
        with pytest.raises(RequestError, match="2 prompts, but 1 priorities"):
            llm.generate([IDS, IDS], GREEDY, priority=[1])
        with pytest.raises(RequestError, match="priority must be"):
            llm.generate([IDS], GREEDY, priority=[1.5])
        banned = SamplingParams(n=3, logit_bias=dict.fromkeys(range(97), -math.inf))
        with pytest.raises(RequestError, match="no token is left"):
            llm.generate([IDS, IDS], [banned, GREEDY])
        assert_idle(llm)


def test_priorities_decide_who_ends_first(open_llm):
    with open_llm(max_batch=1) as llm:
        generation = llm._generation
        jobs = [generation.prepare([i, i + 1], GREEDY, priority) for i, priority in enumerate((0, 3, -2, 3, -2))]
        for job in jobs:
            generation.queue(job)
        order = []
        while generation.has_work:
            order += [jobs.index(job) for job in generation.step() if job.done]
        assert order == [2, 4, 0, 1, 3]
        outs = llm.generate([[i, i + 1] for i in range(5)], GREEDY, priority=[0, 3, -2, 3, -2])
        assert outs == llm.generate([[i, i + 1] for i in range(5)], GREEDY)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-untied"])
def test_deterministic_results_are_bit_equal_alone_in_any_batch_chunked_or_not_and_with_a_hit(open_llm, name):
    prompts = [IDS, [*IDS, *IDS], [*IDS, 3], [4], [*IDS, 3, *range(9)], IDS[:4] * 5]
    params = [seeded(i, logprobs=3) for i in range(len(prompts))]
    expected = []
    with open_llm(name, deterministic=True, prefix_cache=False, max_batch=1, max_tokens_per_step=40) as llm:
        expected = [llm.generate([prompt], each)[0] for prompt, each in zip(prompts, params, strict=True)]
    for runtime in ({"max_tokens_per_step": 3}, {"max_tokens_per_step": 40, "max_batch": 8}, {"block_size": 1}):
        with open_llm(name, deterministic=True, **runtime) as llm:
            assert llm.generate(prompts, params) == expected
            again = llm.generate(prompts, params)
            assert again == expected
            assert sum(out.cached_tokens for out in again) >= 40
            assert [llm.generate([p], each)[0] for p, each in zip(prompts, params, strict=True)] == expected
            assert_idle(llm)


class AheadModel(CpuModel):
    """The CPU runtime with steps handed over early, as a GPU has them."""

    runs_ahead = True


@pytest.fixture(scope="module")
def parts(tiny_model, registry):
    with Model(tiny_model("llama-gqa"), registry) as model:
        return model.decoder, {spec.name: model.file.dequantise(spec.name) for spec in model.claims.specs}


JOBS = st.lists(
    st.tuples(
        st.integers(0, 12),  # step of arrival
        st.integers(0, 9),  # tokens shared with others
        st.lists(st.integers(0, 96), min_size=1, max_size=5),
        st.builds(
            SamplingParams,
            temperature=st.sampled_from([0.0, 1.0]),
            seed=st.integers(0, 9),
            max_tokens=st.integers(1, 16),
            stop_token_ids=st.lists(st.integers(0, 96), max_size=20),
            repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
            n=st.sampled_from([1, 1, 2, 3]),
        ),
        st.integers(-1, 1),  # priority
        st.one_of(st.none(), st.integers(0, 15)),  # step of abort
    ),
    min_size=1,
    max_size=6,
)


def run(model: CpuModel, jobs: list, prefix_cache: bool = True) -> list[dict[int, list[int]]]:
    """The tokens of every sample of every job; aborted ones have fewer."""
    generation = Generation(model, None, prefix_cache=prefix_cache)
    found: list[dict[int, list[int]]] = [{} for _ in jobs]
    queued = {}
    for now in range(500):
        for number, (arrival, shared, own, params, priority, abort) in enumerate(jobs):
            if arrival == now:
                job = generation.prepare([*IDS[:shared], *own], params, priority)
                generation.queue(job)
                queued[job.id] = number
            if abort is not None and max(abort, arrival) == now:
                generation.abort(next(id for id, other in queued.items() if other == number))
        for job in generation.step():
            assert job.error is None
            while job.deltas:
                delta = generation.take(job.id)
                found[queued[job.id]].setdefault(delta.index, []).extend(delta.token_ids)
        generation.check_integrity()
        if not generation.has_work and now > 15:
            break
    assert not generation.has_work
    assert generation.free_blocks == model.plan.num_blocks
    assert not generation._jobs
    assert not generation._texts
    return found


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(jobs=JOBS, prefix_cache=st.booleans(), num_blocks=st.integers(6, 18))
def test_batched_is_alone_token_for_token(parts, jobs, prefix_cache, num_blocks):
    decoder, weights = parts
    source = memory_source.MemorySource(weights)
    model = AheadModel(decoder, source, RuntimeOptions(context=22, block_size=4, max_tokens=8, max_batch=3))
    model.plan = replace(model.plan, num_blocks=num_blocks)  # so few that requests are sent back
    found = run(model, jobs, prefix_cache)
    plain = CpuModel(decoder, source, RuntimeOptions(context=22, block_size=4, max_tokens=24, max_batch=1))
    for (_, *job, abort), tokens in zip(jobs, found, strict=True):
        (expected,) = run(plain, [(0, *job, None)], prefix_cache=False)
        if abort is None:
            assert tokens == expected
        else:
            assert all(tokens[i] == expected[i][: len(tokens[i])] for i in tokens)


def test_a_job_s_error_ends_its_other_samples_and_leaves_the_rest(parts):
    decoder, weights = parts
    model = AheadModel(decoder, memory_source.MemorySource(weights), RuntimeOptions(context=24, block_size=4))
    generation = Generation(model, None)
    bans = (dict.fromkeys(range(97), -math.inf), {})
    bad, good = (generation.prepare(IDS, seeded(1, n=3, logit_bias=bias)) for bias in bans)
    for job in (bad, good):
        generation.queue(job)
    assert bad.error is None
    assert generation.step() == [bad]
    assert [request.finish_reason for request in bad.requests] == ["error", "abort", "abort"]
    while generation.has_work:
        generation.step()
    assert sum(len(delta.token_ids) for delta in good.deltas) == 24
    with pytest.raises(RequestError, match="no token is left"):
        generation.take(bad.id)
    assert generation.free_blocks == model.plan.num_blocks
