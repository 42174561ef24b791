"""Tasks, threads and event loops that share one model: requests that end early, and that nobody waits for nothing."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from polyhead import AsyncLLM, SamplingParams
from small_llm import IDS, assert_idle, seeded
from tasks import LONG, run, slowly, tokens_of, until_idle

# Ends that come early


async def by_cancelling_the_task(model: AsyncLLM) -> None:
    task = asyncio.create_task(tokens_of(model.stream(IDS, LONG)))
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_cancelling_generate(model: AsyncLLM) -> None:
    task = asyncio.create_task(model.generate([IDS, [3]], LONG))
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def by_a_timeout(model: AsyncLLM) -> None:
    stream = model.stream(IDS, LONG)
    await anext(stream)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await tokens_of(stream)
    assert await tokens_of(stream) == ()


async def by_leaving_the_loop(model: AsyncLLM) -> None:
    async for _ in model.stream(IDS, LONG):
        break


async def by_an_exception_in_the_loop(model: AsyncLLM) -> None:
    async def fail() -> None:
        async for _ in model.stream(IDS, LONG):
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    gc.collect()


async def by_closing_the_stream(model: AsyncLLM) -> None:
    stream = model.stream(IDS, LONG)
    await anext(stream)
    await stream.aclose()
    await stream.aclose()
    assert await tokens_of(stream) == ()


async def by_closing_a_stream_that_another_task_reads(model: AsyncLLM) -> None:
    stream = model.stream(IDS, LONG)
    await stream.start()
    task = asyncio.create_task(tokens_of(stream))
    await asyncio.sleep(0.03)
    await stream.aclose()
    assert 0 < len(await task) < 34


async def by_closing_a_stream_that_waits_for_its_first_step(model: AsyncLLM) -> None:
    before = [model.stream([i], LONG) for i in range(2)]  # with the neighbour, which runs, as many as fit a step
    await asyncio.gather(*map(anext, before))
    stream = model.stream(IDS, LONG)
    await stream.start()
    task = asyncio.create_task(tokens_of(stream))
    await asyncio.sleep(0.01)
    await stream.aclose()
    assert await task == ()
    assert before


async def by_dropping_the_stream(model: AsyncLLM) -> None:
    stream = model.stream(IDS, LONG)
    await anext(stream)
    del stream


async def by_dropping_it_before_it_has_begun(model: AsyncLLM) -> None:
    await model.stream(IDS, LONG).start()
    model.stream(IDS, LONG)


@pytest.mark.parametrize(
    "end", [each for name, each in list(globals().items()) if name.startswith("by_")], ids=lambda end: end.__name__
)
def test_a_request_ends_early_after_the_step_under_way_and_neighbours_never_notice(llm, monkeypatch, end):
    expected = llm.generate([7, 7, 7], LONG)[0].token_ids
    sizes = slowly(llm, monkeypatch, 0.1)

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            stream = model.stream([7, 7, 7], LONG)
            await stream.start()
            neighbour = asyncio.create_task(tokens_of(stream))
            await end(model)
            before = len(sizes)
            sizes.hurry.set()
            assert await neighbour == expected
            assert before < 25, "or there is no time left to see anything"
            assert all(size == 1 for size in sizes[before + 2 :]), (before, sizes)
            await until_idle(llm)

    run(main())


@pytest.mark.parametrize("seed", range(12))
def test_any_order_of_arrivals_and_cancels_on_two_event_loops_beside_a_thread_changes_no_result(llm, seed):
    rng = random.Random(seed)
    prompts = [[rng.randrange(97) for _ in range(rng.randint(1, 20))] for _ in range(30)]
    params = [seeded(i, max_tokens=rng.randint(1, 18), n=rng.choice([1, 1, 2])) for i in range(30)]
    expected = llm.generate(prompts, params)
    outcomes: list[str] = []

    async def task(model: AsyncLLM, rng: random.Random) -> None:
        i = rng.randrange(30)
        await asyncio.sleep(rng.random() * 0.05)
        kind = rng.choice(["generate", "generate", "stream", "stream", "break", "timeout", "cancel"])
        outcomes.append(kind)
        if kind in ("stream", "break") and params[i].n == 1:
            found = []
            async for delta in model.stream(prompts[i], params[i], priority=rng.randint(-1, 1)):
                found += delta.token_ids
                if kind == "break" and rng.random() < 0.3:
                    break
            assert tuple(found) == expected[i].token_ids[: len(found)]
            assert kind == "break" or len(found) == len(expected[i].token_ids)
        elif kind == "timeout":
            try:
                async with asyncio.timeout(rng.random() * 0.03):
                    assert await model.generate(prompts[i], params[i]) == expected[i]
            except TimeoutError:
                outcomes.append("timed out")
        elif kind == "cancel":
            inner = asyncio.create_task(model.generate([prompts[i], prompts[0]], [params[i], params[0]]))
            await asyncio.sleep(rng.random() * 0.03)
            if not inner.cancel():
                assert await inner == [expected[i], expected[0]]
        else:
            assert await model.generate(prompts[i], params[i], priority=rng.randint(-1, 1)) == expected[i]

    async def many(model: AsyncLLM, seed: int) -> None:
        rng = random.Random(seed)
        await asyncio.gather(*(task(model, random.Random(rng.random())) for _ in range(40)))

    def blocking() -> None:
        order = random.Random(seed)
        for _ in range(10):
            i, j = order.sample(range(30), 2)
            assert llm.generate([prompts[i], prompts[j]], [params[i], params[j]]) == [expected[i], expected[j]]
            if params[i].n == 1:
                found = [token for delta in llm.stream(prompts[i], params[i]) for token in delta.token_ids]
                assert tuple(found) == expected[i].token_ids

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            elsewhere = asyncio.to_thread(lambda: asyncio.run(many(model, seed + 1000)))
            await asyncio.gather(many(model, seed), elsewhere, asyncio.to_thread(blocking))
            await until_idle(llm)

    run(main())
    assert {"generate", "stream", "break", "timeout", "cancel"} <= set(outcomes)
    gc.collect()
    assert_idle(llm)


def test_each_event_loop_gets_its_deltas_in_its_own_thread(llm):
    model = AsyncLLM(llm)
    barrier = threading.Barrier(4)

    def work(i: int) -> tuple[int, ...]:
        async def main() -> tuple[int, ...]:
            barrier.wait(50)
            one, two = await asyncio.gather(tokens_of(model.stream([i], LONG)), model.generate([i], LONG))
            assert one == two.token_ids
            return one

        return run(main())

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    assert found == [out.token_ids for out in llm.generate([[i] for i in range(4)], LONG)]
    run(model.aclose())


def test_neither_front_end_waits_for_the_other_s_whole_generation(llm, monkeypatch):
    sizes = slowly(llm, monkeypatch, 0.03)
    order: list[str] = []

    async def main() -> None:
        async with AsyncLLM(llm) as model:

            def blocking(params: SamplingParams, name: str) -> None:
                llm.generate([IDS], params)
                order.append(name)

            long = asyncio.create_task(asyncio.to_thread(blocking, LONG, "long blocking"))
            while not sizes:
                await asyncio.sleep(0.001)
            await model.generate([8], seeded(1, max_tokens=3))
            order.append("short")
            await long
            stream = model.stream(IDS, LONG)
            await anext(stream)
            await asyncio.to_thread(blocking, seeded(1, max_tokens=3), "short blocking")
            await tokens_of(stream)
            order.append("long")

    run(main())
    assert order == ["short", "long blocking", "short blocking", "long"]


def test_two_tasks_may_read_one_stream(llm, monkeypatch):
    prepared = []
    prepare = llm._generation.prepare
    monkeypatch.setattr(llm._generation, "prepare", lambda *args: (prepared.append(args), prepare(*args))[1])

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            stream = model.stream(IDS, LONG)
            parts = await asyncio.gather(*(tokens_of(stream) for _ in range(3)))
            assert len(prepared) == 1
            assert sorted(sum(parts, ())) == sorted(llm.generate([IDS], LONG)[0].token_ids)

    run(main())
