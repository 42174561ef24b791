"""Speculation in the Python API: the same tokens, texts and log-probabilities in fewer steps."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyhead import LLM, SamplingParams
from polyhead.errors import ConfigError
from small_llm import RUNTIME, assert_idle, counting, seeded

LIKELY = {7: 4.0, 8: 4.0, 9: 4.0}  # a bias with which random weights repeat themselves


@pytest.fixture(scope="module")
def both(tiny_model):
    """The same model without and with guesses, exact whatever shares a step."""
    runtime = {**RUNTIME, "max_batch": 6, "deterministic": True}
    source = {"model": str(tiny_model("llama-gqa")), "device": "cpu"}
    spec = {"max_tokens": 5, "ngram_max": 2, "ngram_min": 1}
    with (
        LLM({**source, "runtime": runtime}) as plain,
        LLM({**source, "runtime": {**runtime, "speculation": spec}}) as llm,
    ):
        yield plain, llm


prompts = st.lists(st.one_of(st.integers(0, 96), st.sampled_from([7, 8])), min_size=1, max_size=16)
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 22),
    stop=st.sampled_from([(), ("e",), ("the", "a b")]),
    stop_token_ids=st.sampled_from([(), (7,), (8, 9)]),
    ignore_eos=st.booleans(),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.0, 1.2]),
    min_tokens=st.sampled_from([0, 0, 0, 1]),
    logit_bias=st.sampled_from([{}, LIKELY, LIKELY]),
    logprobs=st.sampled_from([None, 2]),
    n=st.sampled_from([1, 1, 1, 2]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(st.tuples(prompts, params), min_size=1, max_size=5))
def test_results_are_those_without_guesses(both, requests):
    plain, llm = both
    found = [model.generate([p for p, _ in requests], [s for _, s in requests]) for model in both]
    assert found[0] == found[1]
    assert_idle(llm)
    assert_idle(plain)


def test_a_text_that_repeats_takes_fewer_steps_and_says_so(both, monkeypatch):
    plain, llm = both
    prompt = [7, 8] * 6
    one_token = SamplingParams(temperature=0.0, max_tokens=24, logit_bias={7: 50.0}, ignore_eos=True)
    steps = counting(llm, monkeypatch)
    (out,) = llm.generate([prompt], one_token)
    assert out.token_ids == (7,) * 24
    assert len(steps) <= 8
    assert max(steps[1:]) == 6, "the token and five guesses"
    assert out.accepted_tokens <= out.drafted_tokens
    assert len(steps) == 24 - out.accepted_tokens
    (same,) = plain.generate([prompt], one_token)
    assert same == out
    assert (same.drafted_tokens, same.accepted_tokens) == (0, 0)
    stream = llm.stream(prompt, one_token)
    deltas = list(stream)
    assert [delta.token_ids for delta in deltas] == [(7,)] * 24, "a delta a token, however many a step brings"
    assert stream.accepted_tokens == out.accepted_tokens


def test_a_stop_string_inside_right_guesses_ends_the_text_there(both):
    plain, llm = both
    wanted = seeded(1, max_tokens=20, temperature=0.0, logit_bias={7: 50.0})
    (whole,) = plain.generate([[7] * 9], wanted)
    stop = whole.text[len(whole.text) // 2 : len(whole.text) // 2 + 2]
    ended = seeded(1, max_tokens=20, temperature=0.0, logit_bias={7: 50.0}, stop=stop)
    results = [model.generate([[7] * 9], ended)[0] for model in both]
    assert results[0] == results[1]
    assert results[0].finish_reason == "stop"
    assert len(results[0].token_ids) < 20
    assert_idle(llm)


def test_dropped_streams_in_the_middle_of_guesses_leave_nothing_behind(both):
    _, llm = both
    wanted = SamplingParams(temperature=0.0, max_tokens=20, logit_bias={7: 50.0}, ignore_eos=True)
    for taken in range(1, 12):
        stream = llm.stream([7, 8, 7], wanted)
        assert [next(stream).token_ids for _ in range(taken)] == [(7,)] * taken
        stream.close()
        assert_idle(llm)


def test_a_batch_too_small_for_the_guesses_is_refused(tiny_model):
    source = {"model": str(tiny_model("llama-gqa")), "device": "cpu"}
    with pytest.raises(ConfigError, match="speculation of up to 7 tokens, which needs a max_batch above that; it is 7"):
        LLM({**source, "runtime": {"max_batch": 7, "speculation": "ngram"}})
    with pytest.raises(ConfigError, match="ngram_min 5 above ngram_max 4"):
        LLM({**source, "runtime": {"speculation": {"ngram_min": 5}}})
    with pytest.raises(
        ConfigError, match=r"runtime\.speculation: .draft. is not a way to guess tokens; expected ngram"
    ):
        LLM({**source, "runtime": {"speculation": "draft"}})
