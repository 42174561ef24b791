"""The Python API on tiny models: what goes in, what comes out, and streaming."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from polyhead import LLM, Completion, Delta, SamplingParams
from polyhead.errors import ConfigError, ModelNotFoundError, RequestError
from small_llm import GREEDY, IDS, RUNTIME, assert_idle, seeded

# What goes in


def test_a_prompt_is_text_or_ids_and_one_alone_is_a_list_of_one(llm):
    text = "the sand"
    ids = llm.tokenizer.encode(text, special=True)
    (expected,) = llm.generate(text, GREEDY)
    assert expected.prompt_token_ids == tuple(ids)
    for same in (
        [text],
        ids,
        [ids],
        tuple(ids),
        [tuple(ids)],
        np.array(ids),
        tuple(np.array(ids, np.int32)),
        [np.array(ids)],
    ):
        assert llm.generate(same, GREEDY) == [expected]


def test_mixed_prompts_come_back_in_their_order_whatever_their_length(llm):
    prompts = ["the", [5], "in the sand", IDS * 5, "a", [9, 9], [1] * 30]
    together = llm.generate(prompts, GREEDY)
    assert together == [llm.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert [len(out.prompt_token_ids) for out in together[3::2]] == [25, 2]


def test_more_prompts_than_fit_a_batch_all_come_back(llm):
    prompts = [[i, i + 1] for i in range(4 * RUNTIME["max_batch"])]
    outs = llm.generate(prompts, GREEDY)
    assert [out.prompt_token_ids for out in outs] == [tuple(prompt) for prompt in prompts]
    assert len({out.token_ids for out in outs}) > 1


def test_parameters_may_differ_from_prompt_to_prompt(llm):
    each = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in (1, 5, 3)]
    outs = llm.generate([IDS, IDS, IDS], each)
    assert [len(out.token_ids) for out in outs] == [1, 5, 3]
    assert outs[1].token_ids[:3] == outs[2].token_ids
    with pytest.raises(RequestError, match="3 prompts, but 2 sampling parameters"):
        llm.generate([IDS, IDS, IDS], each[:2])


def test_without_parameters_those_of_the_configuration_hold(settings_of):
    sampling = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True, "logprobs": 1}
    with LLM(settings_of(sampling=sampling)) as llm:
        (out,) = llm.generate([IDS])
        assert len(out.token_ids) == len(out.logprobs) == 3
        assert [delta.token_ids for delta in llm.stream(IDS)] == [(token,) for token in out.token_ids]
        assert len(llm.generate([IDS], GREEDY)[0].token_ids) == 8


def test_a_model_opens_from_a_path_a_dict_a_yaml_file_or_with_overrides(tiny_model, tmp_path):
    path = tiny_model("llama-gqa")
    (tmp_path / "run.yaml").write_text(f"model: {path}\ndevice: cpu\nruntime: {{context: 33}}\n")
    for source, context in [(str(path), 64), (Path(path), 64), ({"model": {"path": str(path)}}, 64)]:
        with LLM(source, overrides=["device=cpu"]) as llm:
            assert llm.plan.context == context
    with LLM(tmp_path / "run.yaml") as llm:
        assert llm.plan.context == 33
    with LLM(str(tmp_path / "run.yaml"), overrides=["runtime.context=21"]) as llm:
        assert llm.plan.context == 21


def test_a_model_that_cannot_be_opened_is_an_error_of_its_own(settings_of, tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"absent\.gguf"):
        LLM({"model": str(tmp_path / "absent.gguf")})
    with pytest.raises(ConfigError, match=r"runtime\.contxt.*did you mean.*context"):
        LLM(settings_of(runtime={"contxt": 5}))
    with pytest.raises(ConfigError, match=r"runtime\.context is 65, but the model was made for 64"):
        LLM(settings_of(runtime={"context": 65}))
    with pytest.raises(
        RequestError, match="stop_token_ids has token id 97, but the model's vocabulary has ids 0 to 96"
    ):
        LLM(settings_of(sampling={"stop_token_ids": [97]}))


# What comes out


def test_a_completion_says_why_it_ended(llm):
    whole = llm.generate([IDS], GREEDY)[0]
    assert isinstance(whole, Completion)
    assert (whole.finish_reason, len(whole.token_ids), whole.logprobs) == ("length", 8, None)
    assert whole.text == llm.tokenizer.decode(whole.token_ids)
    full = llm.generate([IDS], SamplingParams(max_tokens=10**6, temperature=0.0, ignore_eos=True))[0]
    assert (full.finish_reason, len(full.token_ids)) == ("length", RUNTIME["context"] - len(IDS))


def test_a_stop_token_ends_the_generation_and_is_reported_but_not_shown(llm):
    whole = llm.generate([IDS], GREEDY)[0]
    at = next(i for i, token in enumerate(whole.token_ids) if i and token not in whole.token_ids[:i])
    params = SamplingParams(
        max_tokens=8, temperature=0.0, ignore_eos=True, stop_token_ids=[whole.token_ids[at]], logprobs=0
    )
    out = llm.generate([IDS], params)[0]
    assert (out.finish_reason, out.token_ids) == ("stop", whole.token_ids[: at + 1])
    assert len(out.logprobs) == at + 1
    assert out.text == llm.tokenizer.decode(whole.token_ids[:at])


def test_the_model_s_own_end_token_ends_it_unless_ignored(llm):
    (eos,) = llm.tokenizer.stop_ids
    forced = {"max_tokens": 6, "temperature": 0.0, "logit_bias": {eos: 100.0}}
    out = llm.generate([IDS], SamplingParams(**forced))[0]
    assert (out.finish_reason, out.token_ids, out.text) == ("stop", (eos,), "")
    out = llm.generate([IDS], SamplingParams(**forced, min_tokens=3))[0]
    assert (out.finish_reason, len(out.token_ids), out.token_ids[-1]) == ("stop", 4, eos)
    assert eos not in out.token_ids[:3]
    out = llm.generate([IDS], SamplingParams(**forced, ignore_eos=True))[0]
    assert (out.finish_reason, out.token_ids) == ("length", (eos,) * 6)


def test_a_stop_string_is_found_wherever_tokens_are_cut(llm):
    whole = llm.generate([IDS], SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True))[0]
    text = whole.text
    assert len(text) >= 10
    stops = {text[i : i + size] for size in (1, 2, 3, 5) for i in range(len(text) - size + 1)}
    assert len(stops) > 20
    for stop in sorted(stops):
        params = SamplingParams(max_tokens=14, temperature=0.0, ignore_eos=True, stop=stop)
        out = llm.generate([IDS], params)[0]
        assert (out.text, out.finish_reason) == (text[: text.find(stop)], "stop")
        assert out.token_ids == whole.token_ids[: len(out.token_ids)]
        streamed = list(llm.stream(IDS, params))
        assert "".join(delta.text for delta in streamed) == out.text
        assert streamed[-1].finish_reason == "stop"


def test_a_stop_string_that_does_not_come_holds_nothing_back(llm):
    whole = llm.generate([IDS], GREEDY)[0]
    almost = whole.text[-2:] + "\0"
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, stop=[almost, "\0" * 5])
    out = llm.generate([IDS], params)[0]
    assert (out.text, out.finish_reason, out.token_ids) == (whole.text, "length", whole.token_ids)


@pytest.mark.parametrize("params", [seeded(3, logprobs=4), seeded(3, logprobs=0, top_k=3, repetition_penalty=1.5)])
def test_logprobs_are_the_log_softmax_of_the_model_s_own_logits(llm, params):
    out = llm.generate([IDS], params)[0]
    logits = llm.logits([*IDS, *out.token_ids]).astype(np.float64)[len(IDS) - 1 : -1]
    expected = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    assert len(out.logprobs) == len(out.token_ids)
    for item, token, row in zip(out.logprobs, out.token_ids, expected, strict=True):
        assert item.token_id == token
        assert item.logprob == pytest.approx(row[token], abs=1e-4)
        best = np.sort(row)[::-1][: params.logprobs]
        assert [value for _, value in item.top] == pytest.approx(best.tolist(), abs=1e-4)
        assert all(value == pytest.approx(row[token], abs=1e-4) for token, value in item.top)


def test_logits_have_a_row_for_each_token_however_they_are_chunked(llm):
    ids = (IDS * 8)[: RUNTIME["context"]]
    logits = llm.logits(ids)
    assert (logits.shape, logits.dtype) == ((len(ids), 97), np.float32)
    np.testing.assert_allclose(llm.logits(ids[:7]), logits[:7], rtol=1e-4, atol=1e-5)
    assert llm.logits(np.array(ids[:2])).shape == (2, 97)


# Streaming


@pytest.mark.parametrize("params", [GREEDY, seeded(11), seeded(11, logprobs=2), seeded(4, stop="e", max_tokens=20)])
def test_the_deltas_of_a_stream_add_up_to_the_completion(llm, params):
    for prompt in (IDS, "the sand", [1] * 30):
        out = llm.generate([prompt], params)[0]
        deltas = list(llm.stream(prompt, params))
        assert all(isinstance(delta, Delta) for delta in deltas)
        assert "".join(delta.text for delta in deltas) == out.text
        assert tuple(token for delta in deltas for token in delta.token_ids) == out.token_ids
        assert [delta.finish_reason for delta in deltas] == [None] * (len(deltas) - 1) + [out.finish_reason]
        if params.logprobs is None:
            assert all(delta.logprobs is None for delta in deltas)
        else:
            assert tuple(item for delta in deltas for item in delta.logprobs) == out.logprobs


def test_a_stream_that_has_ended_stays_ended(llm):
    stream = llm.stream(IDS, GREEDY)
    assert len(list(stream)) == 8
    assert list(stream) == []
    stream.close()
    stream.close()


def test_closing_a_stream_early_frees_its_memory_at_once(llm):
    stream = llm.stream([1] * 20, SamplingParams(max_tokens=15, temperature=0.0, ignore_eos=True))
    next(stream)
    assert llm._generation.free_blocks < llm.plan.num_blocks
    stream.close()
    assert_idle(llm)
    assert list(stream) == []


def test_a_stream_that_is_dropped_or_left_with_an_exception_frees_its_memory(llm):
    def look_at_one() -> None:
        for delta in llm.stream(IDS, GREEDY):
            raise LookupError(delta.text)

    with pytest.raises(LookupError):
        look_at_one()
    gc.collect()
    assert_idle(llm)
    dropped = llm.stream(IDS, GREEDY)
    next(dropped)
    del dropped
    gc.collect()
    assert_idle(llm)


def test_streams_advance_side_by_side_and_beside_generate(llm):
    alone = [list(llm.stream([i, 2, 3], seeded(i))) for i in range(4)]
    streams = [llm.stream([i, 2, 3], seeded(i)) for i in range(4)]
    found = [[next(stream)] for stream in streams]
    assert llm.generate([IDS], GREEDY)[0].finish_reason == "length"
    for i in (2, 0, 3, 1):
        found[i] += streams[i]
    assert found == alone


BYTES = {"Ã": 0xC3, "©": 0xA9, "â": 0xE2, "Ĥ": 0x82, "¬": 0xAC, "a": 0x61}  # of é, € and a, as tokens spell them


def test_a_stream_never_shows_half_a_character(settings_of, tmp_path, monkeypatch):
    tokens = [chr(c) for c in range(33, 127)] + ["Ġ", *list(BYTES)[:-1], "aa", "<|endoftext|>"]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), 131)]
    monkeypatch.setattr(tiny_models, "vocabulary", lambda _: (tokens, [1] * 101 + [3] + [5] * 29, ["a a"]))
    tiny_models.build("llama-mha", tmp_path / "bytes.gguf")
    with LLM(settings_of(model=str(tmp_path / "bytes.gguf"))) as llm:
        bias = {tokens.index(token): 100.0 for token in BYTES}
        held_back = 0
        for seed in range(30):
            deltas = list(llm.stream("a", seeded(seed, max_tokens=12, logit_bias=bias, temperature=4.0)))
            ids = [token for delta in deltas for token in delta.token_ids]
            whole = bytes(BYTES[tokens[token]] for token in ids).decode("utf-8", "replace")
            assert "".join(delta.text for delta in deltas) == whole
            held_back += sum(delta.text == "" for delta in deltas)
        assert held_back > 10
