"""One request's trouble stays its own: odd tokens, dropped streams, rows that cannot be sampled, Ctrl-C anywhere."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from polyhead import LLM, SamplingParams
from polyhead.errors import PolyheadError, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
PROMPT = [5, 17, 2]


@pytest.fixture(autouse=True, scope="module")
def _young_heap() -> Iterator[None]:
    """What earlier tests left is not looked at by the many collections here; it would take ten times as long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def llm(tiny_model, registry):
    settings = {"model": str(tiny_model("llama-gqa")), "device": "cpu", "runtime": {"context": 48, "block_size": 4}}
    with LLM(settings, registry=registry) as llm:
        yield llm
        llm._generation.check_integrity()
        assert llm._generation.free_blocks == llm.plan.num_blocks


def test_rows_that_only_pad_the_embedding_have_no_text_and_hurt_nobody(llm, monkeypatch):
    expected = llm.generate([PROMPT], GREEDY)[0]
    monkeypatch.setattr(llm.tokenizer, "vocab_size", 40)
    always = SamplingParams(temperature=0.0, max_tokens=6, logit_bias={96: 100.0}, ignore_eos=True)
    padded, other = llm.generate([PROMPT, PROMPT], [always, GREEDY])
    assert padded.token_ids == (96,) * 6
    assert padded.text == ""
    assert padded.finish_reason == "length"
    assert other.token_ids == expected.token_ids


def test_a_row_that_cannot_be_sampled_ends_its_own_request_only(llm):
    expected = llm.generate([PROMPT], GREEDY)[0]
    healthy = llm.stream(PROMPT, GREEDY)
    tokens = [*next(healthy).token_ids]
    banned = llm.stream(PROMPT, SamplingParams(logit_bias=dict.fromkeys(range(97), -np.inf)))
    with pytest.raises(RequestError, match="no token is left"):
        next(banned)
    tokens += [token for delta in healthy for token in delta.token_ids]
    assert tuple(tokens) == expected.token_ids


def test_streams_collected_in_the_middle_of_a_step_change_nothing(llm, monkeypatch):
    from polyhead.engine import ScheduledStep

    expected = llm.generate([PROMPT, [9, 9]], GREEDY)
    plan = ScheduledStep.of

    def collecting(*pieces):
        gc.collect()
        return plan(*pieces)

    monkeypatch.setattr(ScheduledStep, "of", collecting)
    gc.disable()
    try:
        for _ in range(5):
            cycle: list[object] = [llm.stream([7, 8, 9, 10, 11], GREEDY)]
            cycle.append(cycle)
            next(cycle[0])
            del cycle
            found = llm.generate([PROMPT, [9, 9]], GREEDY)
            assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    finally:
        gc.enable()


def test_dropping_a_stream_frees_its_blocks_at_once(llm):
    stream = llm.stream(PROMPT, GREEDY)
    next(stream)
    assert llm._generation.free_blocks < llm.plan.num_blocks
    del stream
    assert llm._generation.free_blocks == llm.plan.num_blocks


@pytest.mark.parametrize("first", range(12))
def test_an_interrupt_at_any_line_of_the_engine_leaves_it_sound(llm, first):
    expected = llm.generate([PROMPT, [9, 9]], GREEDY)
    places = ("/engine/", "/generation.py", "/lookahead.py", "/batches.py", "/deltas.py", "/core/llm.py")
    interrupted = 0
    for line in range(first, 1200, 37):
        left = line

        def trace(frame, event, arg):
            nonlocal left
            if not any(place in frame.f_code.co_filename for place in places):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            llm.generate([PROMPT, [9, 9]], GREEDY)
        except (KeyboardInterrupt, PolyheadError):
            interrupted += 1
        finally:
            sys.settrace(None)
        gc.collect()
        llm._generation.check_integrity()
        found = llm.generate([PROMPT, [9, 9]], GREEDY)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
        assert llm._generation.free_blocks == llm.plan.num_blocks
    assert interrupted > 3


def interrupted_at(line: int, name: str, call: Callable[[], object]) -> bool:
    """Whether Ctrl-C came at the so-manieth line of the function of this name, while it was called."""
    left = line

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_name != name or "polyhead" not in frame.f_globals.get("__name__", ""):
            return trace if event == "call" else None
        if event == "line":
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_an_interrupt_while_a_stream_begins_leaves_no_job_behind(llm):
    for line in itertools.count(1):
        if not interrupted_at(line, "stream", lambda: llm.stream(PROMPT, GREEDY)):
            break
        gc.collect()
        assert not llm._generation.has_work
        assert not llm._generation._jobs
    assert line > 3


def test_an_abort_that_is_interrupted_is_made_all_the_same_or_can_be_made_again(llm):
    generation = llm._generation
    for line in itertools.count(1):
        job = generation.prepare(PROMPT, GREEDY)
        generation.queue(job)
        generation.step()
        again = interrupted_at(line, "abort", lambda name=job.id: generation.abort(name))
        if job.id in generation._jobs:
            generation.abort(job.id)
        assert generation.free_blocks == llm.plan.num_blocks
        assert not generation.has_work
        if not again:
            break
    assert line > 3


def test_two_threads_on_one_stream_end_cleanly(llm):
    stream = llm.stream(PROMPT, SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    seen: list[int] = []
    problems: list[BaseException] = []

    def consume() -> None:
        try:
            for delta in stream:
                seen.extend(delta.token_ids)
        except RequestError:
            pass
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=consume) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert len(seen) == 30


@pytest.mark.parametrize(
    "prompts", [None, 5, b"ab", {1, 2}, {"a": 1}, [b"ab"], [[True, False]], [1.5], [["a"]], np.array(3)]
)
def test_what_is_no_prompt_is_refused(llm, prompts):
    with pytest.raises(RequestError):
        llm.generate(prompts, GREEDY)


@pytest.mark.parametrize("params", [{"temperature": 0}, 0, [], "greedy", [{"temperature": 0}]])
def test_what_is_no_sampling_parameter_is_refused(llm, params):
    with pytest.raises(RequestError):
        llm.generate(["a"], params)
    with pytest.raises(RequestError):
        llm.stream("a", params)
