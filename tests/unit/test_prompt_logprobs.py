"""Log-probabilities of a prompt's own tokens: exact, whatever is cached, chunked, preempted or beside."""

from __future__ import annotations

import numpy as np
import pytest
from polyhead import LLM, SamplingParams
from polyhead.errors import RequestError
from small_llm import GREEDY, IDS, RUNTIME, assert_idle, seeded


@pytest.fixture(scope="module")
def llm(tiny_model):
    with LLM({"model": str(tiny_model("llama-gqa")), "device": "cpu", "runtime": RUNTIME}) as llm:
        yield llm


def log_softmax(logits):
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def check(llm: LLM, ids: list[int], scores, top: int) -> None:
    expected = log_softmax(llm.logits(ids))
    assert len(scores) == len(ids)
    assert scores[0] is None
    for position in range(1, len(ids)):
        item, row = scores[position], expected[position - 1]
        assert item.token_id == ids[position]
        assert item.logprob == pytest.approx(row[ids[position]], abs=1e-4)
        best = np.argsort(-row, kind="stable")[:top]
        assert [token for token, _ in item.top] == best.tolist()
        assert [value for _, value in item.top] == pytest.approx(row[best].tolist(), abs=1e-4)


PROMPTS = [IDS, [3], [9, 9], list(range(20, 55)), IDS * 6]


def test_they_are_the_log_softmax_of_the_model_s_own_logits(llm):
    params = seeded(1, prompt_logprobs=3, logit_bias={5: -50.0}, repetition_penalty=1.4)
    for out, ids in zip(llm.generate(PROMPTS, params), PROMPTS, strict=True):
        check(llm, ids, out.prompt_logprobs, 3)
        assert out.logprobs is None
    assert_idle(llm)


def test_they_do_not_change_what_is_generated_and_others_have_none(llm):
    asked = [seeded(4, prompt_logprobs=0), seeded(4), seeded(4, logprobs=1)]
    outs = llm.generate([IDS, IDS, IDS], asked)
    assert outs[0].token_ids == outs[1].token_ids == outs[2].token_ids
    assert [out.prompt_logprobs is None for out in outs] == [False, True, True]
    check(llm, IDS, outs[0].prompt_logprobs, 0)


def test_a_cached_prompt_is_scored_all_the_same_and_one_scored_is_cached(llm):
    ids = [60 + i for i in range(13)]
    llm.generate([ids], GREEDY)
    (again,) = llm.generate([ids], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
    assert again.cached_tokens == 0
    check(llm, ids, again.prompt_logprobs, 1)
    other = [61 + i for i in range(13)]
    llm.generate([other], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
    assert llm.generate([other], GREEDY)[0].cached_tokens == 12


def test_samples_share_the_prompt_s(llm):
    (out,) = llm.generate([IDS], seeded(2, n=3, prompt_logprobs=2))
    for each in out.outputs:
        check(llm, IDS, each.prompt_logprobs, 2)


def test_a_stream_has_them_from_the_first_delta_on(llm):
    stream = llm.stream(IDS, seeded(1, prompt_logprobs=0))
    next(stream)
    check(llm, IDS, stream.prompt_logprobs, 0)
    stream.close()
    assert llm.stream(IDS, GREEDY).prompt_logprobs is None
    assert_idle(llm)


@pytest.mark.parametrize("batch", [1, 2])
def test_few_rows_of_logits_only_take_more_steps(tiny_model, batch):
    runtime = {"context": 40, "block_size": 4, "max_batch": batch, "max_tokens_per_step": 8}
    with LLM({"model": str(tiny_model("llama-gqa")), "device": "cpu", "runtime": runtime}) as llm:
        prompts = [[30 + i + j for j in range(20)] for i in range(3)]
        outs = llm.generate(prompts, seeded(1, prompt_logprobs=1, max_tokens=16))
        for out, ids in zip(outs, prompts, strict=True):
            check(llm, ids, out.prompt_logprobs, 1)


def test_a_token_that_cannot_come_has_minus_infinity(llm, monkeypatch):
    run = llm._generation.model._run

    def banned(batch, observe):
        logits = run(batch, observe)
        logits[:, IDS[2]] = -np.inf
        return logits

    monkeypatch.setattr(llm._generation.model, "_run", banned)
    (out,) = llm.generate([IDS], SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1))
    assert out.prompt_logprobs[2].logprob == -np.inf
    assert out.prompt_logprobs[2].token_id == IDS[2]
    assert np.isfinite(out.prompt_logprobs[1].logprob)


@pytest.mark.parametrize("wrong", [-1, 21, True, 1.5])
def test_what_may_be_asked_for(wrong):
    with pytest.raises(RequestError, match="prompt_logprobs must be an integer from 0 to 20, or None"):
        SamplingParams(prompt_logprobs=wrong)
