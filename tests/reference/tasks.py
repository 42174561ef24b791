"""What tests of tasks share: one that never hangs, a model whose steps take a while, and waiting until it is idle."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from polyhead import LLM, SamplingParams

LONG = SamplingParams(max_tokens=34, temperature=0.0, ignore_eos=True)


def run(main) -> object:
    """A test that waits for ever fails soon."""
    return asyncio.run(asyncio.wait_for(main, 60))


async def tokens_of(stream) -> tuple[int, ...]:
    return tuple([token async for delta in stream for token in delta.token_ids])


async def until_idle(llm: LLM) -> None:
    for _ in range(2000):
        with llm._engine() as generation:
            if not generation.has_work and generation.free_blocks == llm.plan.num_blocks:
                generation.check_integrity()
                return
        await asyncio.sleep(0.002)
    raise AssertionError("requests or blocks are left")


def slowly(llm: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.005) -> list[int]:
    """Makes every step take a while; returns the number of sequences of each step to come."""
    sizes: list[int] = []
    submit = llm._generation.model.submit

    def slow(batch, rows, after=None):
        time.sleep(seconds)
        sizes.append(len(batch.context_lens))
        return submit(batch, rows, after)

    monkeypatch.setattr(llm._generation.model, "submit", slow)
    return sizes


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "polyhead-loop"]
