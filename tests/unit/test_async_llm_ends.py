"""AsyncLLM when something ends it: failures of the model, faults, interrupts, closing, event loops that are gone."""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import threading
import time
from collections.abc import Callable

import pytest
from polyhead import LLM, AsyncLLM, PolyheadError, SamplingParams
from polyhead.errors import DeviceError, RequestError
from small_llm import GREEDY, IDS, assert_idle, seeded
from tasks import LONG, loop_threads, run, slowly, tokens_of, until_handed_over, until_idle

# Failures


def failing(llm: LLM, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool], error: BaseException) -> None:
    """Makes steps fail: ``when`` is told how many steps there were before, and may look at what is open."""
    submit, count = llm._generation.model.submit, itertools.count()

    def submit_or_fail(*args):
        time.sleep(0.01)
        if when(next(count)):
            raise error
        return submit(*args)

    monkeypatch.setattr(llm._generation.model, "submit", submit_or_fail)


def test_a_failure_of_the_model_ends_the_requests_of_its_step_and_serves_the_next(llm, monkeypatch):
    armed: list[bool] = []
    failing(llm, monkeypatch, lambda _: bool(armed) and armed.pop(), DeviceError("the device fell over"))

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            for _ in range(2):
                armed.append(True)
                streams = [asyncio.create_task(tokens_of(model.stream([i], LONG))) for i in range(2)]
                whole = asyncio.create_task(model.generate([IDS, [9]], LONG))
                found = await asyncio.gather(*streams, whole, return_exceptions=True)
                assert any(isinstance(each, DeviceError) for each in found)
                assert all(isinstance(each, DeviceError) for each in found if isinstance(each, BaseException))
                assert {str(each) for each in found if isinstance(each, DeviceError)} == {"the device fell over"}
                out = await model.generate(IDS, GREEDY)
                assert len(out.token_ids) == 8
            await until_idle(llm)

    run(main())


def test_the_deltas_before_a_failure_come_before_its_error(llm, monkeypatch):
    expected = llm.generate([IDS], LONG)[0].token_ids
    failing(llm, monkeypatch, lambda steps: steps == 7, DeviceError("the device fell over"))

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            stream = model.stream(IDS, LONG)
            await stream.start()
            await until_idle(llm)  # it has failed, and nothing was read
            found: list[int] = []
            with pytest.raises(DeviceError, match="fell over"):
                await read(stream, found)
            assert tuple(found) == expected[:7]
            assert await tokens_of(stream) == ()

    async def read(stream, found: list[int]) -> None:
        async for delta in stream:
            found += delta.token_ids

    run(main())


def test_a_request_that_bans_every_token_fails_alone(llm):
    banned = SamplingParams(max_tokens=4, temperature=1.0, logit_bias=dict.fromkeys(range(97), -math.inf))

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            healthy = asyncio.create_task(tokens_of(model.stream(IDS, LONG)))
            for use in (model.generate(IDS, banned), anext(model.stream(IDS, banned))):
                with pytest.raises(RequestError, match="no token is left to choose"):
                    await use
            assert len(await healthy) == 34

    run(main())


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), MemoryError(), SystemError("a device's")])
def test_an_unexpected_exception_ends_all_open_requests_with_it_and_the_thread_goes_on(llm, monkeypatch, error):
    failing(llm, monkeypatch, lambda _: len(llm._generation._jobs) == 18, error)

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            streams = [model.stream([i], LONG) for i in range(3)]
            await asyncio.gather(*(stream.start() for stream in streams))
            until_handed_over(llm, monkeypatch, 10)
            tasks = [asyncio.create_task(tokens_of(model.stream([i], LONG))) for i in range(5)]
            tasks += [asyncio.create_task(model.generate([[i], IDS], LONG)) for i in range(5)]
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert found == [error] * 10
            for stream in streams:
                with pytest.raises(type(error)):
                    await tokens_of(stream)
            assert len(loop_threads()) == 1
            await until_idle(llm)
            assert len((await model.generate(IDS, GREEDY)).token_ids) == 8

    run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_cannot_go_on_says_so_instead_of_leaving_anybody_waiting(llm, monkeypatch):
    def abort(self, job_id: str) -> None:
        raise ArithmeticError("nothing works")

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            await model.generate([1], seeded(1, max_tokens=1))
            failing(llm, monkeypatch, lambda _: len(llm._generation._jobs) == 3, ZeroDivisionError("a bug"))
            monkeypatch.setattr(type(llm._generation), "abort", abort)
            until_handed_over(llm, monkeypatch, 3)
            tasks = [asyncio.create_task(tokens_of(model.stream([i], LONG))) for i in range(3)]
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(each) for each in found] == [ZeroDivisionError] * 3
            while loop_threads():
                await asyncio.sleep(0.01)
            with pytest.raises(PolyheadError, match=r"the thread that runs the model has ended: .*nothing works"):
                await model.generate(IDS, GREEDY)
            with pytest.raises(PolyheadError, match="has ended"):
                await anext(model.stream(IDS, GREEDY))

    run(main())
    monkeypatch.undo()
    for job in list(llm._generation._jobs):
        llm._abort(job)


def test_an_interrupt_in_another_thread_s_step_leaves_no_task_waiting(llm, monkeypatch):
    expected = llm.generate([IDS], LONG)[0].token_ids
    submit = llm._generation.model.submit
    for at in range(2, 30, 9):
        seen = []

        def interrupted(batch, rows, after=None, at=at, seen=seen):
            pending = submit(batch, rows, after)
            if threading.current_thread().name != "polyhead-loop":
                seen.append(1)
                if len(seen) == at:
                    raise KeyboardInterrupt
            return pending

        monkeypatch.setattr(llm._generation.model, "submit", interrupted)

        def blocking() -> None:
            with pytest.raises(KeyboardInterrupt):
                llm.generate([[3]] * 9, LONG)

        async def main() -> None:
            async with AsyncLLM(llm) as model:
                task = asyncio.create_task(asyncio.to_thread(blocking))
                while not task.done():
                    try:
                        assert await tokens_of(model.stream(IDS, LONG)) == expected
                    except PolyheadError as error:
                        assert "interrupted" in str(error)  # noqa: PT017
                await task
                await until_idle(llm)

        run(main())


# Closing


@pytest.mark.parametrize("given", [True, False])
def test_closing_ends_requests_with_an_error_and_the_thread(llm, settings_of, monkeypatch, given):
    async def main() -> AsyncLLM:
        model = AsyncLLM(llm if given else settings_of())
        await model.open()
        own = model.llm
        slowly(own, monkeypatch, 0.03)
        streams = [model.stream([i], LONG) for i in range(3)]
        await asyncio.gather(*map(anext, streams))
        tasks = [asyncio.create_task(tokens_of(stream)) for stream in streams]
        tasks += [asyncio.create_task(model.generate([[i], IDS], LONG)) for i in range(3)]
        tasks.append(asyncio.create_task(tokens_of(model.stream("the sand", LONG))))
        await asyncio.sleep(0)
        await asyncio.gather(model.aclose(), model.aclose())
        found = await asyncio.gather(*tasks, return_exceptions=True)
        said = {str(error) for error in found if isinstance(error, PolyheadError)}
        # Whoever is still taking in a prompt may hear it from the LLM that is closed as well.
        assert said - (set() if given else {"the LLM is closed"}) == {"the AsyncLLM is closed"}
        assert all(isinstance(error, PolyheadError) for error in found[3:])
        assert not loop_threads()
        for use in (model.generate(IDS), model.open(), anext(model.stream(IDS)), model.chat([])):
            with pytest.raises(PolyheadError, match="the AsyncLLM is closed"):
                await use
        await model.aclose()
        if given:
            assert len(own.generate(IDS, GREEDY)) == 1
            assert_idle(own)
        else:
            with pytest.raises(PolyheadError, match="the LLM is closed"):
                own.generate(IDS, GREEDY)

    run(main())


def test_closing_the_llm_under_it_ends_requests_with_what_the_llm_says(settings_of, monkeypatch):
    llm = LLM(settings_of())
    slowly(llm, monkeypatch, 0.05)

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            stream = model.stream(IDS, LONG)
            await anext(stream)
            whole = asyncio.create_task(model.generate([[i] for i in range(20)], LONG))
            await asyncio.sleep(0)
            llm.close()
            for use in (tokens_of(stream), whole, model.generate(IDS), model.generate([1, 2], GREEDY)):
                with pytest.raises(PolyheadError, match=r"^the LLM is closed$"):
                    await use

    run(main())
    assert not loop_threads()


def test_leaving_the_block_with_an_exception_or_while_it_loads_closes_the_model(settings_of, monkeypatch):
    opened: list[LLM] = []
    left = threading.Event()
    load = LLM.__init__

    def slow(llm: LLM, *args, **more) -> None:
        load(llm, *args, **more)
        opened.append(llm)
        assert len(opened) == 1 or left.wait(50)

    monkeypatch.setattr(LLM, "__init__", slow)

    async def leave() -> None:
        async with AsyncLLM(settings_of()) as model:
            await model.generate(IDS, GREEDY)
            raise LookupError

    async def main() -> None:
        with pytest.raises(LookupError):
            await leave()
        assert opened[0]._generation is None
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05), AsyncLLM(settings_of()):
                raise AssertionError("it cannot be loaded yet")
        left.set()
        while len(opened) < 2 or opened[1]._generation is not None:
            await asyncio.sleep(0.01)

    run(main())
    assert not loop_threads()


def test_a_dropped_model_s_thread_ends(llm):
    async def main() -> None:
        await AsyncLLM(llm).generate(IDS, GREEDY)
        gc.collect()
        while loop_threads():
            await asyncio.sleep(0.01)

    run(main())


@pytest.mark.parametrize("whole", [True, False])
def test_an_event_loop_that_was_closed_takes_its_requests_with_it_and_nothing_else(llm, monkeypatch, whole):
    sizes = slowly(llm, monkeypatch)
    model = AsyncLLM(llm)
    gone = asyncio.new_event_loop()
    task = gone.create_task(model.generate(IDS, LONG) if whole else tokens_of(model.stream(IDS, LONG)))

    while len(sizes) < 3:
        gone.run_until_complete(asyncio.sleep(0.001))
    gone.close()  # with the task pending, which asyncio.run would have cancelled

    async def other() -> None:
        assert await tokens_of(model.stream([7], LONG)) == llm.generate([7], LONG)[0].token_ids
        await until_idle(llm)
        assert sizes[:10].count(2) < 4
        await model.aclose()

    run(other())
    task._log_destroy_pending = False  # it would write that to stderr, rightly
