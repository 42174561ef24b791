"""The Python API on tiny models: what is refused, seeds, threads, closing, and that nothing is left behind."""

from __future__ import annotations

import gc
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyhead import LLM, PolyheadError, SamplingParams
from polyhead.errors import RequestError, TemplateError
from small_llm import GREEDY, IDS, assert_idle, seeded

# What is refused


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "the prompt is empty"),
        ([""], "the prompt is empty"),
        ([], "the list of prompts is empty"),
        ([[]], "prompt is empty"),
        ([IDS, []], "prompt is empty"),
        ([[1, 97]], r"token id 97 at position 1 of the prompt is not in the vocabulary \(0 to 96\)"),
        ([[-1]], r"token id -1 at position 0"),
        ([[1, 2.5]], "must hold token ids"),
        ([["a"]], "must hold token ids"),
        ([[2**40]], r"token id 1099511627776 at position 0"),
        ([[1] * 40], r"has 40 tokens; the context of 40 takes at most 39"),
        ([IDS, [1] * 1000], r"has 1000 tokens; the context of 40 takes at most 39"),
        ("a" * 500, r"tokens; the context of 40 takes"),
    ],
)
def test_an_impossible_prompt_is_refused_before_anything_runs(llm, prompts, message):
    with pytest.raises(RequestError, match=message):
        llm.generate(prompts, GREEDY)
    assert_idle(llm)
    assert not llm._generation._jobs


def test_stream_and_logits_refuse_at_the_call(llm):
    for call in (llm.stream, llm.logits):
        with pytest.raises(RequestError, match="empty"):
            call([])
        with pytest.raises(RequestError, match="token id 97 at position 0"):
            call([97])
    with pytest.raises(RequestError, match="context of 40"):
        llm.stream([1] * 40)
    with pytest.raises(RequestError, match="41 tokens exceed the context of 40"):
        llm.logits([1] * 41)
    with pytest.raises(RequestError, match="logit_bias has token id 97"):
        llm.stream(IDS, SamplingParams(logit_bias={97: 1.0}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, "1", None])
def test_a_temperature_that_is_no_number_is_refused(value):
    with pytest.raises(RequestError, match="temperature must be a finite number >= 0"):
        SamplingParams(temperature=value)


def test_a_request_that_bans_every_token_fails_alone(llm):
    banned = SamplingParams(max_tokens=4, temperature=1.0, logit_bias=dict.fromkeys(range(97), -math.inf))
    with pytest.raises(RequestError, match="no token is left to choose"):
        llm.generate([IDS], banned)
    assert len(llm.generate([IDS], GREEDY)[0].token_ids) == 8


def test_a_model_without_a_template_cannot_chat(llm):
    with pytest.raises(TemplateError, match="has no chat template"):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY)


def test_a_template_of_the_configuration_makes_it_chat(settings_of, tiny_model):
    model = {
        "path": str(tiny_model("llama-gqa")),
        "chat_template": "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}",
    }
    with LLM(settings_of(model=model)) as llm:
        messages = [{"role": "user", "content": "the sand"}]
        ids = llm.chat_prompt(messages)
        assert ids == llm.tokenizer.encode("user the sand", special=True)
        out = llm.chat(messages, GREEDY)
        assert out == llm.generate([ids], GREEDY)[0]
        assert "".join(delta.text for delta in llm.stream_chat(messages, GREEDY)) == out.text


# Seeds


def test_a_seed_gives_the_same_tokens_alone_and_beside_others(llm):
    alone = llm.generate([IDS], seeded(7))[0]
    assert llm.generate([IDS], seeded(7))[0].token_ids == alone.token_ids
    for others in ([[1]], [[4, 4], "the sand", [2] * 25]):
        prompts, params = [*others, IDS], [*(seeded(i) for i in range(len(others))), seeded(7)]
        assert llm.generate(prompts, params)[-1].token_ids == alone.token_ids
        assert llm.generate(prompts[::-1], params[::-1])[0].token_ids == alone.token_ids


def test_other_seeds_and_none_give_other_tokens(llm):
    by_seed = {llm.generate([IDS], seeded(seed, max_tokens=12))[0].token_ids for seed in range(8)}
    assert len(by_seed) == 8
    unseeded = llm.generate([IDS] * 8, seeded(None, max_tokens=12))
    assert len({out.token_ids for out in unseeded}) == 8


# Threads, closing


def test_threads_may_generate_at_the_same_time(llm):
    prompts = [[i, i + 1, i + 2] for i in range(12)]
    expected = [llm.generate([prompt], seeded(i))[0].token_ids for i, prompt in enumerate(prompts)]
    barrier = threading.Barrier(6)

    def work(start: int) -> list[tuple[int, ...]]:
        barrier.wait(10)
        found = []
        for i in range(start, 12, 6):
            if i % 2:
                found.append(llm.generate([prompts[i]], seeded(i))[0].token_ids)
            else:
                deltas = list(llm.stream(prompts[i], seeded(i)))
                found.append(tuple(token for delta in deltas for token in delta.token_ids))
        return found

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(6)))
    assert [results[i % 6][i // 6] for i in range(12)] == expected


def test_a_closed_model_says_so_and_may_be_closed_again(settings_of):
    llm = LLM(settings_of())
    stream, untouched = llm.stream(IDS, GREEDY), llm.stream(IDS, GREEDY)
    next(stream)
    llm.close()
    llm.close()
    for use in (
        lambda: llm.generate([IDS]),
        lambda: llm.stream(IDS),
        lambda: llm.logits(IDS),
        lambda: llm.plan,
        lambda: next(stream),
        lambda: next(untouched),
    ):
        with pytest.raises(PolyheadError, match="the LLM is closed"):
            use()
    stream.close()
    assert llm.tokenizer.decode(llm.tokenizer.encode("the sand")) == "the sand"


def test_leaving_the_block_closes_the_model_whatever_happened(settings_of):
    with pytest.raises(LookupError), LLM(settings_of()) as llm:
        raise LookupError
    with pytest.raises(PolyheadError, match="closed"):
        llm.generate([IDS])


def test_a_model_can_be_opened_again_and_again(settings_of):
    outs = []
    for _ in range(3):
        with LLM(settings_of()) as llm:
            outs.append(llm.generate([IDS], GREEDY))
    assert outs[0] == outs[1] == outs[2]


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["open", "next", "next", "next", "close", "drop", "generate", "logits"]), st.integers(0, 7)
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
def test_streams_opened_read_closed_and_dropped_in_any_order_leave_every_block_free(llm, actions):
    streams: list = []
    for action, number in actions:
        if action == "open":
            length = 1 + 5 * number
            streams.append(llm.stream([number] * length, seeded(number, max_tokens=1 + 3 * number)))
        elif action == "generate":
            assert llm.generate([[number]], GREEDY)[0].finish_reason == "length"
        elif action == "logits":
            try:
                assert len(llm.logits([number] * 4)) == 4
            except RequestError as error:
                assert "KV blocks" in str(error)  # noqa: PT017
        elif streams:
            stream = streams[number % len(streams)]
            if action == "next":
                next(stream, None)
            else:
                streams.remove(stream)
                if action == "close":
                    stream.close()
                del stream
        llm._generation.check_integrity()
    for stream in streams:
        stream.close()
    del streams
    gc.collect()
    assert_idle(llm)
