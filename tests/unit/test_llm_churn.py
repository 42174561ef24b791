"""Many requests with random cancels on the CPU runtime; tests/gpu has the same with 500."""

from __future__ import annotations

import pytest
from churn import churn
from polyhead import LLM


@pytest.mark.parametrize("speculation", [None, {"max_tokens": 3, "ngram_max": 2, "ngram_min": 1}])
def test_requests_dropped_at_random_cost_no_other_its_tokens_and_leave_no_block_behind(tiny_model, speculation):
    runtime = {"context": 64, "block_size": 4, "max_batch": 8, "max_tokens_per_step": 32, "deterministic": True}
    source = {"model": str(tiny_model("llama-gqa")), "device": "cpu"}
    with LLM({**source, "runtime": {**runtime, "speculation": speculation}}) as llm:
        churn(llm, 60, seed=4)
