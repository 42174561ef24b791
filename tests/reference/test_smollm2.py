"""SmolLM2-135M-Instruct, the real model, against transformers in float32 on the same dequantised weights."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import tolerance
from polyhead import LLM, SamplingParams

pytestmark = pytest.mark.model
EXPECTED = golden.load_smollm2()


@pytest.fixture(scope="module")
def llm(smollm2_path):
    assert golden.sha256(smollm2_path) == EXPECTED.sha256
    with LLM({"model": str(smollm2_path), "device": "cpu", "runtime": {"context": 512}}) as llm:
        yield llm


def test_greedy_continuations_of_ten_prompts_equal_the_reference(llm):
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    completions = llm.generate([prompt.ids for prompt in EXPECTED.prompts], params)
    assert [list(completion.token_ids) for completion in completions] == [
        prompt.greedy.tokens for prompt in EXPECTED.prompts
    ]


def test_prompts_and_conversations_tokenise_as_the_reference(llm):
    for prompt in EXPECTED.prompts:
        if prompt.messages is None:
            assert llm.tokenizer.encode(prompt.text, special=True) == prompt.ids
        else:
            assert llm.chat_prompt(prompt.messages) == prompt.ids


def test_logits_equal_the_reference(llm):
    for prompt in EXPECTED.prompts:
        last = llm.logits(prompt.ids)[-1]
        assert tolerance.error(last[prompt.top_ids], prompt.top_logits) < tolerance.CPU_LOGITS
        assert tolerance.error(last[prompt.some_ids], prompt.some_logits) < tolerance.CPU_LOGITS


def test_perplexity_of_a_paragraph_equals_the_reference(llm):
    ids = llm.tokenizer.encode(EXPECTED.paragraph, special=True)
    assert ids == EXPECTED.paragraph_ids
    logits = llm.logits(ids)[:-1].astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(nll, EXPECTED.token_nll, atol=2e-3)
    assert abs(nll.mean() - EXPECTED.nll) < 1e-4


def test_a_question_gets_a_sensible_answer(llm):
    answer = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(temperature=0.0, max_tokens=32),
    )
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"
