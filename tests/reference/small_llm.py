"""What the tests of the Python API share: a small configuration, parameters, and what an idle model must look like."""

from __future__ import annotations

import pytest
from polyhead import LLM, SamplingParams

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
RUNTIME = {"context": 40, "block_size": 4, "max_batch": 3, "max_tokens_per_step": 16}
IDS = [5, 17, 2, 80, 33]


def assert_idle(llm: LLM) -> None:
    assert llm._generation.free_blocks == llm.plan.num_blocks
    llm._generation.check_integrity()


def seeded(seed: int | None, **more: object) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 8, "temperature": 1.0, "seed": seed, "ignore_eos": True, **more})


def counting(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each step that the model is given from now on."""
    counts: list[int] = []
    submit = llm._generation.model.submit

    def count(batch, rows, after=None):
        counts.append(len(batch.tokens))
        return submit(batch, rows, after)

    monkeypatch.setattr(llm._generation.model, "submit", count)
    return counts
