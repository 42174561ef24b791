"""The request loop on the GPU: many requests and cancels, guesses, log-probabilities of prompts, forms of texts."""

from __future__ import annotations

import gc
import json
import re

import numpy as np
import pytest
from churn import churn
from polyhead import LLM, SamplingParams

pytestmark = pytest.mark.gpu


@pytest.fixture
def open_tiny(ctx, tiny_model):
    def open_(name: str, device: str = "cuda", **runtime: object) -> LLM:
        settings = {"max_tokens_per_step": 64, "block_size": 8, "max_batch": 64, **runtime}
        return LLM({"model": str(tiny_model(name)), "device": device, "runtime": settings})

    return open_


def test_500_requests_with_random_cancels_three_times_leave_memory_as_it_was(ctx, open_tiny):
    free = []
    for seed in range(3):
        with open_tiny("llama-gqa", deterministic=True) as llm:
            churn(llm, 500, seed)
        gc.collect()
        free.append(ctx.device.free())
    assert max(free) - min(free) <= 4 << 20


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_no_token(name, temperature, open_tiny):
    prompts = [[5, 9, 5, 9, 5, 9], [7] * 9, [1, 2, 3]]
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=30, logit_bias={7: 9.0, 9: 9.0}, ignore_eos=True)
        for i in range(3)
    ]
    spec = {"max_tokens": 5, "ngram_max": 2, "ngram_min": 1}
    with open_tiny(name, deterministic=True) as plain, open_tiny(name, deterministic=True, speculation=spec) as llm:
        expected = plain.generate(prompts, params)
        found = llm.generate(prompts, params)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]
    assert sum(out.accepted_tokens for out in found) > 0


@pytest.mark.parametrize("name", ["llama-gqa", "gptneox-parallel"])
def test_log_probabilities_of_a_prompt_are_those_of_the_cpu_runtime(name, open_tiny):
    prompts = [[(7 * i + 3 * j) % 90 for i in range(30)] for j in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=3)
    with open_tiny(name, "cpu") as cpu, open_tiny(name) as llm:
        for one, other in zip(cpu.generate(prompts, params), llm.generate(prompts, params), strict=True):
            expected, found = ([each.logprob for each in out.prompt_logprobs[1:]] for out in (one, other))
            np.testing.assert_allclose(found, expected, atol=5e-2)
            assert [each.token_id for each in other.prompt_logprobs[1:]] == list(other.prompt_token_ids[1:])


@pytest.mark.parametrize("speculation", [None, {"max_tokens": 5, "ngram_max": 2, "ngram_min": 1}])
def test_forms_are_kept_in_any_company_and_their_logits_never_leave_the_device(open_tiny, monkeypatch, speculation):
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yes"]}}, "required": ["a"]}
    seeded = {"temperature": 1.0, "max_tokens": 24, "n": 2}
    forms = [
        SamplingParams(seed=1, structured_outputs={"json": {**schema, "additionalProperties": False}}, **seeded),
        SamplingParams(seed=2, structured_outputs={"regex": "[01]{12}"}, frequency_penalty=0.5, logprobs=2, **seeded),
        SamplingParams(seed=3, structured_outputs={"choice": ["the sand", "the"]}, top_p=0.9, **seeded),
    ]
    free = [SamplingParams(seed=i, ignore_eos=True, **{**seeded, "max_tokens": 40}) for i in range(3)]
    asked, prompts = [*forms, *free], [[5, 17, 2, 80, 33], [9] * 7, [3], [5, 9] * 4, [8, 7], [1]]
    with open_tiny("llama-gqa", deterministic=True, speculation=speculation) as llm:
        model, steps = llm._generation.model, []
        submit = model.submit

        def watched(batch, rows, after=None):
            steps.append((any(row.allowed is not None for row in rows), after is not None))
            return submit(batch, rows, after)

        monkeypatch.setattr(model, "submit", watched)
        monkeypatch.setattr(model, "logits", None)
        found = llm.generate(prompts, asked)
        assert not any(masked and early for masked, early in steps)
        assert speculation is not None or any(early for _, early in steps)
        assert [llm.generate([prompt], each)[0] for prompt, each in zip(prompts, asked, strict=True)] == found
    for sample in found[0].outputs:
        if sample.finish_reason == "stop":  # random weights may prefer blanks up to the end
            assert json.loads(sample.text)["a"] in ("x", "yes")
    for sample in found[1].outputs:
        assert re.fullmatch("[01]{12}", sample.text)
    for sample in found[2].outputs:
        assert sample.text in ("the sand", "the")


def test_a_text_has_the_form_that_is_asked_for_and_its_neighbours_have_their_tokens(ctx, smollm2_path):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    plain = SamplingParams(temperature=0.0, max_tokens=24)
    forms = [
        SamplingParams(temperature=0.8, seed=1, max_tokens=80, structured_outputs={"json": schema}),
        SamplingParams(temperature=0.8, seed=2, max_tokens=40, structured_outputs={"regex": "[0-9]{3}-[0-9]{4}"}),
    ]
    runtime = {"deterministic": True, "context": 512}
    with LLM({"model": str(smollm2_path), "device": "cuda", "runtime": runtime}) as llm:
        alone = llm.generate("The capital of France is", plain)[0]
        prompts = ["A person as JSON: ", "My phone number is ", "The capital of France is"]
        person, number, capital = llm.generate(prompts, [*forms, plain])
    assert set(json.loads(person.text)) == {"name", "age"}
    assert re.fullmatch("[0-9]{3}-[0-9]{4}", number.text)
    assert person.finish_reason == number.finish_reason == "stop"
    assert capital.token_ids == alone.token_ids
