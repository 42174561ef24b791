"""Structured outputs in the Python API: every text has the form asked for, and nobody else notices."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyhead import SamplingParams
from polyhead.errors import RequestError
from polyhead.generation import Generation
from small_llm import GREEDY, IDS, RUNTIME, assert_idle, seeded

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x", "yes"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
REGEXES = ["[a-c]{2,4}", "(ab|ba)+c", "x?[0-9]+\\.[0-9]"]


def formed(seed: int, form: dict[str, object], **more: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 30, "temperature": 1.0, "seed": seed, "structured_outputs": form, **more})


def fits(text: str, form: dict[str, object]) -> bool:
    if "json" in form:
        value = json.loads(text)
        return set(value) == {"a", "b"} and 0 <= value["a"] <= 99 and value["b"] in ("x", "yes")
    if "choice" in form:
        return text in form["choice"]
    return re.fullmatch(form["regex"], text) is not None


forms = st.one_of(
    st.just({"json": SCHEMA}),
    st.sampled_from([{"regex": each} for each in REGEXES]),
    st.just({"choice": ["the sand", "the", "in"]}),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(
        st.tuples(st.lists(st.integers(0, 95), min_size=1, max_size=9), st.none() | forms, st.integers(0, 99)),
        min_size=1,
        max_size=6,
    ),
    temperature=st.sampled_from([0.0, 1.0]),
    samples=st.sampled_from([1, 1, 3]),
)
def test_texts_have_their_form_and_neighbours_the_tokens_they_get_alone(shared, asked, temperature, samples):
    prompts = [prompt for prompt, _, _ in asked]
    params = [
        formed(seed, form, temperature=temperature, n=samples) if form else seeded(seed) for _, form, seed in asked
    ]
    for out, (prompt, form, _), each in zip(shared.generate(prompts, params), asked, params, strict=True):
        if form is None:
            assert out == shared.generate([prompt], each)[0]
            continue
        for sample in out.outputs:
            if sample.finish_reason == "stop":
                assert fits(sample.text, form)
            else:
                assert len(prompt) + len(sample.token_ids) == RUNTIME["context"] or len(sample.token_ids) == 30
    assert_idle(shared)


def test_a_text_that_is_complete_ends_at_once_and_without_an_end_token(llm):
    (out,) = llm.generate([IDS], formed(1, {"choice": ["the sand"]}, max_tokens=8, logprobs=1))
    assert (out.text, out.finish_reason, len(out.token_ids)) == ("the sand", "stop", 8)
    assert len(out.logprobs) == 8
    (cut,) = llm.generate([IDS], formed(1, {"choice": ["the sand"]}, max_tokens=7))
    assert (cut.text, cut.finish_reason) == ("the san", "length")
    deltas = list(llm.stream(IDS, formed(1, {"choice": ["the sand"]})))
    assert "".join(delta.text for delta in deltas) == "the sand"
    assert [delta.finish_reason for delta in deltas] == [None] * 7 + ["stop"]


def test_an_open_end_is_the_model_s_to_choose(llm):
    end = next(iter(llm.tokenizer.stop_ids))
    (out,) = llm.generate([IDS], formed(1, {"regex": "[a-z]+"}, logit_bias={end: 100.0}))
    assert (len(out.text), out.token_ids[1:], out.finish_reason) == (1, (end,), "stop")
    (out,) = llm.generate([IDS], formed(1, {"regex": "[a-z]+"}, logit_bias={end: -100.0}))
    assert out.finish_reason == "length"


def test_log_probabilities_are_the_model_s_own_and_penalties_still_count(llm):
    plain = llm.generate([IDS], seeded(1, logprobs=0))[0]
    (out,) = llm.generate([IDS], formed(1, {"regex": "[0-9]{5}"}, logprobs=3))
    first, free = (
        np.array([value for _, value in each.logprobs[0].top])
        for each in (out, llm.generate([IDS], seeded(1, logprobs=3))[0])
    )
    np.testing.assert_allclose(first, free, rtol=1e-5)
    assert plain.logprobs[0].logprob <= free[0] + 1e-6
    (spread,) = llm.generate([IDS], formed(1, {"regex": "[01]{12}"}, frequency_penalty=2.0, temperature=0.0))
    assert 4 <= spread.text.count("0") <= 8


def test_stop_strings_and_stop_tokens_still_end_a_text(llm):
    (out,) = llm.generate([IDS], formed(1, {"regex": "a{5}b{5}"}, stop="ab"))
    assert (out.text, out.finish_reason) == ("aaaa", "stop")
    b = llm.tokenizer.encode("b")[0]
    (out,) = llm.generate([IDS], formed(1, {"regex": "a{5}b{5}"}, stop_token_ids=[b]))
    assert (out.text, out.finish_reason) == ("aaaaa", "stop")


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"regex": "("}, "structured_outputs.regex"),
        ({"json": {"type": "objekt"}}, "structured_outputs.json"),
        ({"grammar": "start: nothing"}, "structured_outputs.grammar"),
        ({"regex": "[a-z]&&[0-9]", "choice": ["a"]}, "exactly one of"),
    ],
)
def test_a_form_that_makes_no_sense_is_refused_before_anything_runs(llm, form, says):
    with pytest.raises(RequestError, match=says):
        llm.generate([IDS, IDS], [GREEDY, SamplingParams(structured_outputs=form)])


def test_a_ban_that_leaves_nothing_is_that_request_s_error_alone(llm):
    (a,) = llm.tokenizer.encode("a")
    banned = formed(1, {"regex": "a+"}, logit_bias={a: -float("inf")})
    stream = llm.stream(IDS, GREEDY)
    with pytest.raises(RequestError, match="no token is left"):
        llm.generate([IDS], banned)
    assert tuple(token for delta in stream for token in delta.token_ids) == llm.generate([IDS], GREEDY)[0].token_ids


def test_no_step_with_a_form_is_handed_over_early_and_others_are_again_once_it_has_ended(llm, monkeypatch):
    asked = [formed(1, {"choice": ["the sand"]}), seeded(5, max_tokens=20)]
    expected = llm.generate([IDS] * 2, asked)
    model, steps = llm._generation.model, []
    submit = model.submit

    def watched(batch, rows, after=None):
        steps.append((any(row.allowed is not None for row in rows), after is not None))
        return submit(batch, rows, after)

    monkeypatch.setattr(model, "submit", watched)
    monkeypatch.setattr(model, "runs_ahead", True)
    assert llm.generate([IDS] * 2, asked) == expected
    assert steps[:8] == [(True, False)] * 8
    assert not any(masked for masked, _ in steps[8:])
    assert sum(early for _, early in steps) >= 10


def test_min_tokens_and_ignore_eos_contradict_a_form():
    for more in ({"min_tokens": 2}, {"ignore_eos": True}):
        with pytest.raises(RequestError, match="cannot be combined"):
            formed(1, {"regex": "a"}, **more)
    assert replace(formed(1, {"regex": "a"}), structured_outputs=None).structured is None


def test_without_a_tokenizer_there_is_no_form_of_text(shared):
    with pytest.raises(RequestError, match="need a tokenizer, and this model was loaded without one"):
        Generation(shared._generation.model, None).prepare(IDS, formed(1, {"regex": "a"}))
