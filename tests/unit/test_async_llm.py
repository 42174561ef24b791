"""The Python API for asyncio on tiny models: what goes in, what comes out, and that event loops never wait."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from polyhead import LLM, AsyncLLM, Completion, PolyheadError, SamplingParams
from polyhead.errors import ConfigError, RequestError, TemplateError
from small_llm import GREEDY, IDS, RUNTIME, assert_idle, seeded
from tasks import run, until_handed_over

CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "the sand"}]


@pytest.fixture
def exact(settings_of):
    """Log-probabilities too are bit-equal, whatever was cached or ran beside."""
    with LLM(settings_of(runtime={**RUNTIME, "deterministic": True})) as llm:
        yield llm
        assert_idle(llm)


# Results


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ("the sand", GREEDY),
        (IDS, seeded(3, logprobs=2)),
        (tuple(IDS), seeded(4, stop="e", max_tokens=20)),
        ([1] * 30, seeded(5, n=3)),
    ],
)
def test_one_prompt_gives_one_completion_equal_to_the_blocking_llm_s(exact, prompt, params):
    async def main() -> object:
        async with AsyncLLM(exact) as model:
            return await model.generate(prompt, params), await model.generate([prompt], params)

    (expected,) = exact.generate(prompt, params)
    one, several = run(main())
    assert isinstance(one, Completion)
    assert one == expected
    assert several == [expected]
    assert len(one.outputs) == params.n


def test_a_list_comes_back_in_order_with_parameters_and_priorities_for_each(llm):
    prompts = ["the", [5], "in the sand", IDS * 5, "a", [9, 9], [1] * 30]
    params = [seeded(i, max_tokens=1 + i, n=1 + i % 2) for i in range(7)]

    async def main() -> object:
        async with AsyncLLM(llm) as model:
            return await model.generate(prompts, params, priority=[3, 0, -1, 2, 9, 0, -7])

    assert run(main()) == llm.generate(prompts, params)


@pytest.mark.parametrize("params", [GREEDY, seeded(11, logprobs=2), seeded(4, stop="e", max_tokens=20)])
def test_a_stream_has_the_deltas_of_the_blocking_stream(exact, params):
    async def main() -> object:
        async with AsyncLLM(exact) as model:
            stream = model.stream("the sand", params)
            assert (stream.prompt_token_ids, stream.cached_tokens) == ((), 0)
            await stream.start()
            await stream.start()
            assert stream.prompt_token_ids == tuple(exact.tokenizer.encode("the sand", special=True))
            deltas = [delta async for delta in stream]
            assert [delta async for delta in stream] == []
            again = model.stream("the sand", params)
            assert [delta async for delta in again] == deltas
            assert again.cached_tokens > 0
            return deltas

    assert run(main()) == list(exact.stream("the sand", params))


def test_a_stream_says_how_good_its_guesses_were(settings_of):
    params = SamplingParams(temperature=0.0, max_tokens=20, logit_bias={7: 50.0}, ignore_eos=True)

    async def main(blocking: LLM) -> None:
        async with AsyncLLM(blocking) as model:
            stream = model.stream([7] * 9, params)
            assert (stream.drafted_tokens, stream.accepted_tokens) == (0, 0)
            await collect(stream)
            (expected,) = blocking.generate([[7] * 9], params)
            assert (stream.drafted_tokens, stream.accepted_tokens) == (
                expected.drafted_tokens,
                expected.accepted_tokens,
            )
            assert stream.accepted_tokens > 0

    with LLM(settings_of(runtime={**RUNTIME, "max_batch": 6, "speculation": {"max_tokens": 3}})) as llm:
        run(main(llm))


def test_without_parameters_those_of_the_configuration_hold_and_chats_go_through_the_template(settings_of, tiny_model):
    model = {"path": str(tiny_model("llama-gqa")), "chat_template": CHAT}
    settings = settings_of(model=model, sampling={"max_tokens": 3, "temperature": 0.0, "ignore_eos": True})

    async def main() -> object:
        async with AsyncLLM(settings) as llm:
            streamed = [delta async for delta in llm.stream_chat(MESSAGES)]
            return await llm.chat(MESSAGES), streamed, await llm.chat(MESSAGES, GREEDY)

    answer, streamed, longer = run(main())
    with LLM(settings) as llm:
        assert answer == llm.chat(MESSAGES)
        assert streamed == list(llm.stream_chat(MESSAGES))
        assert longer == llm.chat(MESSAGES, GREEDY)


# Errors


@pytest.mark.parametrize(
    ("prompts", "params", "priority"),
    [
        ("", None, 0),
        ([], None, 0),
        (None, None, 0),
        ([IDS, []], None, 0),
        ([[1, 97]], None, 0),
        ([[1, 2.5]], None, 0),
        ([IDS, [1] * 40], None, 0),
        ([IDS, IDS], [GREEDY], 0),
        (IDS, "greedy", 0),
        ([IDS, IDS], None, [1]),
        (IDS, None, [1.5]),
        (IDS, SamplingParams(logit_bias={97: 1.0}), 0),
        ([IDS, [7]], SamplingParams(logit_bias=dict.fromkeys(range(97), -float("inf"))), 0),
    ],
)
def test_what_the_blocking_llm_refuses_is_refused_with_the_same_words(llm, prompts, params, priority):
    with pytest.raises(RequestError) as expected:
        llm.generate(prompts, params, priority=priority)

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            neighbour = model.stream(IDS, seeded(1, max_tokens=30))
            await neighbour.start()
            with pytest.raises(RequestError) as found:
                await model.generate(prompts, params, priority=priority)
            assert type(found.value) is type(expected.value)
            assert str(found.value) == str(expected.value)
            assert len(await collect(neighbour)) == 30

    run(main())


def test_a_stream_raises_at_the_first_iteration_or_at_start_and_not_when_it_is_made(llm):
    async def main() -> None:
        async with AsyncLLM(llm) as model:
            for stream, error, message in [
                (model.stream([1] * 40), RequestError, "the context of 40 takes at most 39"),
                (model.stream([97]), RequestError, "token id 97 at position 0"),
                (model.stream("", GREEDY), RequestError, "the prompt is empty"),
                (model.stream(IDS, seeded(1, n=2)), RequestError, "a stream has one sample, n is 2"),
                (model.stream_chat(MESSAGES), TemplateError, "has no chat template"),
            ]:
                with pytest.raises(error, match=message):
                    await anext(stream)
                assert [delta async for delta in stream] == []
            with pytest.raises(RequestError, match="token id 97"):
                await model.stream([97]).start()
            with pytest.raises(TemplateError, match="has no chat template"):
                await model.chat(MESSAGES)

    run(main())


def test_a_model_that_cannot_be_opened_raises_as_the_blocking_llm_does(settings_of, llm):
    async def main() -> None:
        bad = AsyncLLM(settings_of(runtime={"contxt": 5}))
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"runtime\.contxt.*did you mean.*context"):
                await bad.generate(IDS)
        with pytest.raises(PolyheadError, match=r"not loaded yet.*async with"):
            bad.llm  # noqa: B018
        with pytest.raises(ConfigError, match="contxt"):
            async with bad:
                pass

    run(main())
    with pytest.raises(TypeError, match="an LLM was given"):
        AsyncLLM(llm, overrides=["device=cpu"])


# Event loops never wait


def test_nothing_slow_happens_on_the_event_loop_s_thread(settings_of, tiny_model, monkeypatch):
    places: dict[str, set[int]] = {}

    def noting(name: str, work):
        def noted(*args, **more):
            places.setdefault(name, set()).add(threading.get_ident())
            return work(*args, **more)

        return noted

    load = LLM.__init__

    def init(llm: LLM, *args, **more) -> None:
        load(llm, *args, **more)
        llm.tokenizer.encode = noting("encode", llm.tokenizer.encode)
        llm.model.chat_template.render = noting("render", llm.model.chat_template.render)
        llm._generation.prepare = noting("prepare", llm._generation.prepare)
        llm._generation.model.submit = noting("submit", llm._generation.model.submit)
        llm.close = noting("close", llm.close)

    monkeypatch.setattr(LLM, "__init__", noting("load", init))
    monkeypatch.setattr(Completion, "of", noting("of", Completion.of))

    async def main() -> int:
        settings = settings_of(model={"path": str(tiny_model("llama-gqa")), "chat_template": CHAT})
        async with AsyncLLM(settings) as llm:
            await llm.generate("the sand", GREEDY)
            await llm.chat(MESSAGES, GREEDY)
            for stream in (llm.stream("the", GREEDY), llm.stream_chat(MESSAGES, GREEDY)):
                assert len([delta async for delta in stream]) == 8
        return threading.get_ident()

    here = run(main())
    assert set(places) == {"load", "encode", "render", "prepare", "submit", "of", "close"}
    assert all(here not in threads for threads in places.values()), places
    assert len(places["submit"]) == 1


def test_a_first_request_loads_the_model_once_for_all(settings_of, monkeypatch):
    loads = []
    real = LLM.__init__
    monkeypatch.setattr(LLM, "__init__", lambda llm, *args, **more: (loads.append(llm), real(llm, *args, **more))[1])

    async def main() -> None:
        llm = AsyncLLM(settings_of())
        assert not loads
        outs = await asyncio.gather(*(llm.generate(IDS, GREEDY) for _ in range(5)), llm.open())
        assert outs[0] == outs[4]
        assert outs[5] is llm
        await llm.aclose()

    run(main())
    assert len(loads) == 1


def test_a_turn_wakes_an_event_loop_once_at_most(llm, monkeypatch):
    wakes = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe

        def counted(callback, *args, **more):
            if threading.current_thread().name == "polyhead-loop":
                wakes.append(callback)
            return call(callback, *args, **more)

        async with AsyncLLM(llm) as model:
            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            turns = llm._turns
            streams = [model.stream([i, 3], seeded(i, max_tokens=20)) for i in range(12)]
            assert sum(map(len, await asyncio.gather(*map(collect, streams)))) == 240
            assert 240 / 3 <= len(wakes) <= llm._turns - turns
            wakes.clear()
            await model.generate([[i] for i in range(12)], GREEDY)
            assert len(wakes) == 2, "taken in, and done: nobody waits for what is between"

    run(main())


async def collect(stream) -> list:
    return [delta async for delta in stream]


def test_an_event_loop_runs_on_while_a_step_is_under_way(llm, monkeypatch):
    submit = llm._generation.model.submit
    begun, ran_on = threading.Event(), threading.Event()

    def waiting(*args):
        begun.set()
        assert ran_on.wait(50), "the event loop waits for the step, which waits for it"
        return submit(*args)

    monkeypatch.setattr(llm._generation.model, "submit", waiting)

    async def main() -> None:
        async with AsyncLLM(llm) as model:
            task = asyncio.create_task(model.generate(IDS, seeded(1, max_tokens=3)))
            while not begun.is_set():
                await asyncio.sleep(0.001)
            for _ in range(10):
                await asyncio.sleep(0.001)
            ran_on.set()
            assert len((await task).token_ids) == 3

    run(main())


def test_a_consumer_that_does_not_read_holds_nobody_up_and_misses_nothing(llm):
    async def main() -> None:
        async with AsyncLLM(llm) as model:
            slow = model.stream(IDS, seeded(1, max_tokens=30))
            first = await anext(slow)
            for i in range(10):
                assert len((await model.generate([i], GREEDY)).token_ids) == 8
            while llm._generation.has_work:
                await asyncio.sleep(0.001)
            assert_idle(llm)
            assert [first, *[delta async for delta in slow]] == list(llm.stream(IDS, seeded(1, max_tokens=30)))

    run(main())


def test_hundreds_of_tasks_are_one_continuous_batch(llm, monkeypatch):
    count = 240
    expected = [llm.generate([i % 90, i // 90], seeded(i))[0] for i in range(count)]
    steps = []
    submit = llm._generation.model.submit
    monkeypatch.setattr(llm._generation.model, "submit", lambda *args: (steps.append(1), submit(*args))[1])
    until_handed_over(llm, monkeypatch, count)

    async def main() -> None:
        async with AsyncLLM(llm) as model:

            async def one(i: int) -> None:
                prompt, params = [i % 90, i // 90], seeded(i)
                if i % 2:
                    assert await model.generate(prompt, params) == expected[i]
                else:
                    deltas = await collect(model.stream(prompt, params))
                    assert tuple(token for delta in deltas for token in delta.token_ids) == expected[i].token_ids

            await asyncio.gather(*map(one, range(count)))

    run(main())
    assert len(steps) < count * 8 / 2.5, "of three at a time; one by one they are as many as tokens"


def test_an_idle_thread_sleeps(llm):
    async def main() -> None:
        async with AsyncLLM(llm) as model:
            await model.generate(IDS, GREEDY)
            await collect(model.stream(IDS, GREEDY))
            await asyncio.sleep(0.05)
            turns, used = llm._turns, time.process_time()
            await asyncio.sleep(0.5)
            assert llm._turns == turns
            assert time.process_time() - used < 0.1
            await model.generate(IDS, GREEDY)

    run(main())
