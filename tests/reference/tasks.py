"""What tests of tasks share: one that never hangs, a model whose steps take a while, and waiting until it is idle."""

from __future__ import annotations

import asyncio
import threading

import pytest
from polyhead import LLM, SamplingParams
from polyhead.loop_thread import LoopThread

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


class Sizes(list[int]):
    """The number of sequences of each step. Once ``hurry`` is set, steps are as fast as they can be."""

    def __init__(self) -> None:
        super().__init__()
        self.hurry = threading.Event()


def slowly(llm: LLM, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.005) -> Sizes:
    """Makes every step take a while; returns the sizes of the steps to come."""
    sizes = Sizes()
    submit = llm._generation.model.submit

    def slow(batch, rows, after=None):
        sizes.hurry.wait(seconds)
        sizes.append(len(batch.context_lens))
        return submit(batch, rows, after)

    monkeypatch.setattr(llm._generation.model, "submit", slow)
    return sizes


def until_handed_over(llm: LLM, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Holds the next step until tasks have handed over so many calls more, however long that takes them."""
    all_there = threading.Event()
    handed: list[object] = []
    take, submit = LoopThread.submit, llm._generation.model.submit

    def counted(thread, call):
        take(thread, call)
        handed.append(call)
        if len(handed) == calls:
            all_there.set()

    def held(*args):
        assert all_there.wait(50), f"{len(handed)} of {calls} calls came"
        return submit(*args)

    monkeypatch.setattr(LoopThread, "submit", counted)
    monkeypatch.setattr(llm._generation.model, "submit", held)


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "polyhead-loop"]
