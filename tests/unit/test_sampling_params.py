"""SamplingParams: what is accepted, what is refused and with which words."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.engine import SamplingParams
from polyhead.errors import RequestError

NAN, INF = math.nan, math.inf


def test_defaults_change_nothing():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert params.seed is None
    assert params.logprobs is None
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), {})
    assert not params.greedy


REFUSED = [
    ("temperature", [-0.1, NAN, INF, -INF, True, "1", None, 1j, 10**400], ">= 0"),
    ("top_p", [0, 0.0, -0.5, 1.001, NAN, INF, True, "0.9", None], "> 0 and <= 1"),
    ("top_k", [-1, 2**31, 1.0, True, "5", None, NAN], "from 0 to 2147483647; 0 turns it off"),
    ("min_p", [-0.01, 1.01, NAN, False, None], "from 0 to 1"),
    ("repetition_penalty", [0, -1.0, 0.001, 101, NAN, INF, True], "from 0.01 to 100"),
    ("presence_penalty", [-2.1, 2.1, NAN, True, "0"], "from -2 to 2"),
    ("frequency_penalty", [-2.1, 2.1, NAN, True, "0"], "from -2 to 2"),
    ("seed", [-1, 2**64, 1.0, True, "7"], "from 0 to 18446744073709551615"),
    ("max_tokens", [0, -1, 2**31, 1.0, True, None], "from 1 to 2147483647"),
    ("min_tokens", [-1, 129, 1.0, True, None], "from 0 to 128"),
    ("ignore_eos", [1, None, "yes"], "True or False"),
    ("logprobs", [-1, 21, True, 1.0], "from 0 to 20"),
    ("stop", [5, None, b"x", {"a": 1}], "at most 16"),
    ("stop_token_ids", [5, None, "12", {1: 2}], "at most 256"),
    ("logit_bias", [5, None, [1, 2], "x"], "a mapping"),
]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [(name, value, allowed) for name, values, allowed in REFUSED for value in values],
)
def test_refusal_names_the_field_the_range_and_the_value(name, value, allowed):
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must be ")
    assert allowed in message
    assert repr(value)[:60] in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("stop", [""], r"stop\[0\] must have 1 to 1000 characters, got 0"),
        ("stop", "", "got 0"),
        ("stop", ["ok", "x" * 1001], r"stop\[1\] .*got 1001"),
        ("stop", ["ok", "a\ud800"], r"stop\[1\] has a lone surrogate"),
        ("stop", ["ok", 3], r"stop\[1\] must be a string, got 3"),
        ("stop", [str(i) for i in range(17)], "at most 16 strings"),
        ("stop_token_ids", [1, -1], r"stop_token_ids\[1\] .*got -1"),
        ("stop_token_ids", [True], r"stop_token_ids\[0\]"),
        ("stop_token_ids", range(10**9), "at most 256"),
        ("logit_bias", {"5": 1.0}, "token id of logit_bias .*got '5'"),
        ("logit_bias", {-5: 1.0}, "token id of logit_bias .*got -5"),
        ("logit_bias", {5: 101}, r"logit_bias\[5\] must be a number from -100 to 100, or -inf, got 101"),
        ("logit_bias", {5: INF}, r"logit_bias\[5\]"),
        ("logit_bias", {5: NAN}, r"logit_bias\[5\]"),
        ("logit_bias", {5: True}, r"logit_bias\[5\]"),
        ("logit_bias", dict.fromkeys(range(1025), 0.0), "at most 1024 token ids, got 1025"),
    ],
)
def test_refusal_of_an_item_says_which(name, value, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**{name: value})


def test_an_integer_too_long_to_print_is_refused_like_any_other():
    with pytest.raises(RequestError, match=r"max_tokens must be .* got a far larger number"):
        SamplingParams(max_tokens=10**5000)


def test_bounds_themselves_are_accepted():
    SamplingParams(temperature=0, top_p=1, top_k=0, min_p=1, repetition_penalty=0.01, seed=2**64 - 1, logprobs=20)
    SamplingParams(max_tokens=1, min_tokens=1, presence_penalty=-2, frequency_penalty=2, repetition_penalty=100)
    SamplingParams(stop=["x" * 1000] * 16, logit_bias={0: -INF, 1: -100, 2: 100}, logprobs=0, seed=0)


def test_numpy_scalars_become_python_numbers():
    params = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.int64(4),
        seed=np.uint64(2**64 - 1),
        max_tokens=np.int32(3),
        stop_token_ids=np.array([7, 8]),
        logit_bias={np.int64(3): np.float64(1.5)},
    )
    assert params == SamplingParams(
        temperature=0.5, top_k=4, seed=2**64 - 1, max_tokens=3, stop_token_ids=(7, 8), logit_bias={3: 1.5}
    )
    assert type(params.temperature) is float
    assert {type(v) for v in (params.top_k, params.seed, *params.stop_token_ids, *params.logit_bias)} == {int}


def test_stop_is_normalised_to_a_tuple():
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b", "a"]).stops == ("a", "b")


def test_immutable_hashable_and_copyable():
    bias = {1: 2.0}
    params = SamplingParams(stop="x", logit_bias=bias)
    bias[1] = 9.0
    assert params.logit_bias == {1: 2.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3
    assert hash(params) == hash(SamplingParams(stop="x", logit_bias={1: 2.0}))
    for twin in (
        pickle.loads(pickle.dumps(params)),
        copy.deepcopy(params),
        SamplingParams(**dataclasses.asdict(params)),
    ):
        assert twin == params
    assert dataclasses.replace(params, top_k=3).top_k == 3
    with pytest.raises(RequestError, match="top_k"):
        dataclasses.replace(params, top_k=-3)


def test_token_ids_are_checked_against_a_vocabulary():
    SamplingParams(logit_bias={99: 1.0}, stop_token_ids=[99]).validate_for(100)
    with pytest.raises(RequestError, match=r"logit_bias has token id 100, .* 0 to 99"):
        SamplingParams(logit_bias={100: 1.0}).validate_for(100)
    with pytest.raises(RequestError, match="stop_token_ids has token id 100"):
        SamplingParams(stop_token_ids=[5, 100]).validate_for(100)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=3),
)


@given(st.sampled_from([field.name for field in dataclasses.fields(SamplingParams)]), ANYTHING)
def test_any_value_is_accepted_or_a_request_error(name, value):
    try:
        params = SamplingParams(**{name: value})
    except RequestError:
        return
    assert math.isfinite(params.temperature)
    assert 0 < params.top_p <= 1
