"""The CPU sampler against a slow plain-Python one, against exact probabilities, and against its own neighbours."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import suppress
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from polyhead.errors import DeviceError, RequestError
from polyhead.runtime.contract import SampledToken, SamplingRow
from polyhead.runtime.cpu.sampler import sample, with_logprobs
from polyhead.runtime.philox import uniform

INF = math.inf


def adjusted(logits: list[float], row: SamplingRow) -> list[float]:
    """Bias and penalties, written as their definitions."""
    x = [value + row.logit_bias.get(i, 0.0) for i, value in enumerate(logits)]
    if row.allowed is not None:
        x = [value if row.allowed()[i // 32] >> (i % 32) & 1 else -INF for i, value in enumerate(x)]
    for i in set(row.prompt_ids) | set(row.output_ids):
        x[i] = x[i] / row.repetition if x[i] > 0 else x[i] * row.repetition
    counts = Counter(row.output_ids)
    return [value - row.presence * (i in counts) - row.frequency * counts[i] for i, value in enumerate(x)]


class TooCloseError(Exception):
    """Rounding may decide this case either way, so the two samplers may rightly differ."""


def survivors(x: list[float], row: SamplingRow) -> dict[int, float]:
    """Probabilities of the tokens that remain, in order of id, by sorting all."""
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    weight = {i: math.exp((x[i] - x[order[0]]) / row.temperature) for i in order}
    exact = set(weight.values()) <= {0.0, 1.0}
    if row.top_k:
        order = order[: row.top_k]
    if row.top_p < 1:
        target = row.top_p * math.fsum(weight[i] for i in order)
        for n, reached in enumerate(accumulate(weight[i] for i in order), 1):
            if not exact and abs(reached - target) < 1e-11 * target:
                raise TooCloseError
            if reached >= target:
                order = order[:n]
                break
    if 0.0 < row.min_p < 1.0 and any(abs(weight[i] - row.min_p) < 1e-12 for i in order):
        raise TooCloseError
    order = [i for i in order if weight[i] >= row.min_p]
    total = math.fsum(weight[i] for i in order)
    return {i: weight[i] / total for i in sorted(order)}


def slow_sample(logits: list[float], row: SamplingRow) -> int:
    x = adjusted(logits, row)
    if row.temperature == 0:
        return max(range(len(x)), key=lambda i: (x[i], -i))
    kept = survivors(x, row)
    u = uniform(row.seed, row.position)
    for i, reached in zip(kept, accumulate(kept.values()), strict=True):
        if abs(reached - u) < 1e-12:
            raise TooCloseError
        if reached > u:
            return i
    raise AssertionError("the probabilities do not reach 1")


def only(*token_ids: int, vocab: int = 12):
    """What allows these tokens and no others."""
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in token_ids:
        words[token // 32] |= np.uint32(1 << token % 32)
    return lambda: words.view(np.int32)


VOCAB = 12
FINITE = st.one_of(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), st.floats(-20, 20, width=32))
LOGITS = st.lists(st.one_of(FINITE, FINITE, FINITE, st.just(-INF)), min_size=VOCAB, max_size=VOCAB).filter(
    lambda x: max(x) > -INF
)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=6)
ROWS = st.builds(
    SamplingRow,
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**20),
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.5, 20.0]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, VOCAB, 100]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.37, 0.81, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.37, 1.0]),
    repetition=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.6, -1.1]),
    frequency=st.sampled_from([0.0, 0.4, -0.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-INF, -100.0, -1.5, 2.5]), max_size=3),
    prompt_ids=IDS,
    output_ids=IDS,
    allowed=st.none() | st.sets(st.integers(0, VOCAB - 1), min_size=1).map(lambda ids: only(*ids)),
)


def one(logits, row: SamplingRow) -> int:
    return sample(np.array([logits], np.float32), [row])[0].id


def with_row(row: SamplingRow, **changes) -> SamplingRow:
    return SamplingRow(**{name: getattr(row, name) for name in SamplingRow.__slots__} | changes)


@settings(max_examples=300, deadline=None)
@given(LOGITS, ROWS)
def test_equals_the_slow_sampler(logits, row):
    assume(max(adjusted(logits, row)) > -INF)
    with suppress(TooCloseError):
        assert slow_sample(logits, row) == one(logits, row)


@settings(max_examples=60, deadline=None)
@given(LOGITS, ROWS.filter(lambda row: row.temperature > 0))
def test_exactly_the_survivors_are_ever_drawn(logits, row):
    x = adjusted(logits, row)
    assume(max(x) > -INF)
    try:
        kept = survivors(x, row)
    except TooCloseError:
        return
    rows = [with_row(row, position=p) for p in range(300)]
    seen = {token.id for token in sample(np.array([logits] * 300, np.float32), rows)}
    assert seen <= set(kept)
    assert {i for i, p in kept.items() if p > 0.06} <= seen  # missed by chance once in 10**8


@pytest.mark.parametrize("scale", [0.0, 0.2, 1.0, 4.0])
@pytest.mark.parametrize("quantum", [0.0, 0.25])
def test_equals_the_slow_sampler_over_a_large_vocabulary(scale, quantum):
    """Long rows take short cuts, by groups for top-k and buckets for top-p; ties are many with a coarse quantum."""
    vocab = 5_003
    rng = np.random.default_rng(5)
    x = (rng.standard_normal(vocab) * scale).astype(np.float32)
    if quantum:
        x = np.round(x / quantum).astype(np.float32) * np.float32(quantum)
    x[rng.integers(0, vocab, vocab // 5)] = -np.inf
    settings_ = [
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"top_p": 0.99999},
        {"top_k": 7},
        {"top_k": 1_500},
        {"top_k": 3_000, "top_p": 0.9},
        {"min_p": 0.1},
        {},
    ]
    for number, kwargs in enumerate(settings_):
        row = SamplingRow(seed=9, position=0, temperature=0.8, **kwargs)
        kept = survivors(x.tolist(), row)
        ids, cumulative = list(kept), np.cumsum(list(kept.values()))
        rows = [with_row(row, position=number * 100 + p) for p in range(40)]
        for r, token in zip(rows, sample(np.tile(x, (40, 1)), rows), strict=True):
            u = uniform(r.seed, r.position)
            index = int(np.searchsorted(cumulative, u, side="right"))
            assert np.abs(cumulative - u).min() > 1e-11
            assert token.id == ids[index]


def wilson_hilferty(freedom: int, z: float) -> float:
    """The chi-square value with ``freedom`` degrees that a normal deviate z corresponds to (1931)."""
    return freedom * (1 - 2 / (9 * freedom) + z * math.sqrt(2 / (9 * freedom))) ** 3


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 2.0},
        {"top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"top_k": 10, "top_p": 0.9, "min_p": 0.05, "temperature": 0.7},
        {"repetition": 1.5, "presence": 0.5, "frequency": 0.3, "output_ids": (1, 1, 4), "prompt_ids": (2,)},
    ],
)
@pytest.mark.parametrize("vary", ["position", "seed"])
def test_frequencies_follow_the_exact_probabilities(kwargs, vary):
    n = 4_000
    logits = np.random.default_rng(3).standard_normal(20).astype(np.float32)
    base = SamplingRow(**{"seed": 11, "position": 11, "temperature": 1.0} | kwargs)
    exact = survivors(adjusted(logits.tolist(), base), base)
    rows = [with_row(base, **{vary: i}) for i in range(n)]
    counts = Counter(token.id for token in sample(np.broadcast_to(logits, (n, 20)), rows))
    assert set(counts) <= set(exact)
    chi_square = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in exact.items())
    freedom = len(exact) - 1
    assert wilson_hilferty(freedom, -4.0) < chi_square < wilson_hilferty(freedom, 4.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(LOGITS, ROWS), min_size=1, max_size=6), st.randoms())
def test_a_row_does_not_depend_on_its_neighbours(pairs, random):
    pairs = [(x, row) for x, row in pairs if max(adjusted(x, row)) > -INF]
    assume(pairs)
    alone = [sample(np.array([x], np.float32), [row])[0] for x, row in pairs]
    order = list(range(len(pairs)))
    random.shuffle(order)
    together = sample(np.array([pairs[i][0] for i in order], np.float32), [pairs[i][1] for i in order])
    assert together == [alone[i] for i in order]


def test_the_logits_are_left_as_they_were():
    logits = np.array([[1.0, 2.0, 3.0]], np.float32)
    sample(logits, [SamplingRow(1, 1, 0.5, 2, 0.9, 0.1, 1.2, 0.1, 0.1, {0: 5.0}, (1,), (2,), 2)])
    assert logits.tolist() == [[1.0, 2.0, 3.0]]


def test_greedy_takes_the_lowest_id_among_equals():
    rows = [SamplingRow(seed=1, position=i) for i in range(2)]
    assert [t.id for t in sample(np.array([[0, 2, 2, 1], [5, 5, 5, 5]], np.float32), rows)] == [1, 0]


def test_ties_at_the_boundary_go_to_the_lowest_ids():
    logits = np.zeros((300, 10), np.float32)
    for kwargs, kept in [({"top_k": 3}, 3), ({"top_p": 0.3}, 3), ({"top_p": 0.31}, 4), ({"top_p": 1e-9}, 1)]:
        rows = [SamplingRow(seed=2, position=p, temperature=1.0, **kwargs) for p in range(300)]
        assert {token.id for token in sample(logits, rows)} == set(range(kept)), kwargs


def test_the_draw_inverts_the_distribution_in_order_of_id():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    for position in range(200):
        u = uniform(4, position)
        expected = 0 if u < 0.1 else 1 if u < 0.5 else 2 if u < 0.7 else 3
        assert one(logits, SamplingRow(seed=4, position=position, temperature=1.0)) == expected


def test_filters_run_in_their_order():
    """top_p counts what top_k left: 0.5 of the whole is 0.625 of the first two, so 0.6 keeps one token, not two."""
    logits = np.log(np.array([0.5, 0.3, 0.1, 0.1], np.float32))
    rows = [SamplingRow(seed=1, position=p, temperature=1.0, top_k=2, top_p=0.6) for p in range(200)]
    assert {t.id for t in sample(np.tile(logits, (200, 1)), rows)} == {0}
    rows = [SamplingRow(seed=1, position=p, temperature=1.0, top_p=0.6) for p in range(200)]
    assert {t.id for t in sample(np.tile(logits, (200, 1)), rows)} == {0, 1}


@pytest.mark.parametrize("temperature", [1e-308, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = [1.0, 3.0, 2.999, -INF, -50.0]
    assert {one(logits, SamplingRow(seed=1, position=p, temperature=temperature)) for p in range(50)} == {1}


def test_penalties_by_hand():
    greedy = {"seed": 0, "position": 9}
    assert one([2.0, 1.9, -1.0], SamplingRow(**greedy, repetition=1.1, prompt_ids=(0,))) == 1
    assert one([-1.0, -1.05, -9.0], SamplingRow(**greedy, repetition=1.1, prompt_ids=(0,))) == 1
    assert one([2.0, 1.9], SamplingRow(**greedy, presence=0.2, prompt_ids=(0,))) == 0
    assert one([2.0, 1.9], SamplingRow(**greedy, presence=0.2, output_ids=(0,))) == 1
    assert one([2.0, 1.7], SamplingRow(**greedy, frequency=0.2, output_ids=(0,))) == 0
    assert one([2.0, 1.7], SamplingRow(**greedy, frequency=0.2, output_ids=(0, 0))) == 1
    assert one([2.0, 1.0], SamplingRow(**greedy, logit_bias={1: 1.5})) == 1
    assert one([2.0, 1.0], SamplingRow(**greedy, logit_bias={0: -INF})) == 1


@settings(max_examples=100, deadline=None)
@given(LOGITS, st.integers(0, VOCAB + 2), ROWS)
def test_logprobs_are_those_of_the_unmodified_logits_best_first(logits, count, row):
    assume(max(adjusted(logits, row)) > -INF)
    token = sample(np.array([logits], np.float32), [with_row(row, logprobs=count)])[0]
    peak = max(logits)
    normaliser = peak + math.log(math.fsum(math.exp(x - peak) for x in logits))
    order = sorted((i for i in range(VOCAB) if logits[i] > -INF), key=lambda i: (-logits[i], i))
    assert token.id == one(logits, row)
    assert token.logprob == pytest.approx(logits[token.id] - normaliser, abs=1e-12)
    assert [i for i, _ in token.top] == order[:count]
    assert [p for _, p in token.top] == pytest.approx([logits[i] - normaliser for i in order[:count]], abs=1e-12)


def test_logprobs_of_a_long_row_and_of_a_given_token():
    logits = np.random.default_rng(1).integers(-40, 40, 5_000).astype(np.float32)
    token = with_logprobs(logits, 17, 20)
    exact = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert token.id == 17
    assert token.logprob == pytest.approx(exact[17], abs=1e-10)
    assert [i for i, _ in token.top] == sorted(range(5_000), key=lambda i: (-logits[i], i))[:20]


def test_without_logprobs_there_are_none():
    assert sample(np.array([[0.0, 1.0]], np.float32), [SamplingRow(1, 1)]) == [SampledToken(1, None, ())]
    assert sample(np.array([[0.0, 1.0]], np.float32), [SamplingRow(1, 1, logprobs=0)])[0].top == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([0, math.nan, INF], "NaN"),
        ([math.nan] * 3, "NaN"),
        ([0, INF, 1], r"\+inf"),
        ([-INF] * 3, "only -inf"),
    ],
)
def test_a_broken_row_is_an_error_that_names_it(temperature, bad, words):
    logits = np.array([[0, 1, 2], bad], np.float32)
    rows = [SamplingRow(seed=1, position=40 + i, temperature=temperature) for i in range(2)]
    with pytest.raises(DeviceError, match=f"{words} logits in row 1, for the token at position 41"):
        sample(logits, rows)


def test_a_bias_that_bans_everything_is_an_error():
    row = SamplingRow(seed=1, position=6, logit_bias={0: -INF, 2: -INF})
    with pytest.raises(RequestError, match="no token is left to choose at position 6"):
        sample(np.array([[1.0, -INF, 2.0]], np.float32), [row])


@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_chosen_at_every_place_of_a_mask(vocab, temperature):
    logits = np.zeros((1, vocab), np.float32)
    for token in range(vocab):
        row = SamplingRow(seed=1, position=token, temperature=temperature, allowed=only(token, vocab=vocab))
        assert sample(logits, [row])[0].id == token
    row = SamplingRow(seed=1, position=1, temperature=temperature, allowed=only(0, vocab - 1, vocab=vocab), logprobs=0)
    token = sample(logits, [row])[0]
    assert token.id in (0, vocab - 1)
    assert token.logprob == pytest.approx(-math.log(vocab))  # of the logits as they were


def test_a_mask_that_leaves_nothing_is_an_error_that_says_so():
    row = SamplingRow(seed=1, position=6, logit_bias={1: -INF}, allowed=only(1, vocab=3))
    with pytest.raises(RequestError, match="at position 6: structured_outputs, with logit_bias") as caught:
        sample(np.zeros((2, 3), np.float32), [SamplingRow(seed=1, position=6), row])
    assert caught.value.row == 1


def test_what_a_mask_raises_concerns_its_row():
    def fails():
        raise RequestError("too complex")

    with pytest.raises(RequestError, match=r"^too complex$") as caught:
        sample(np.zeros((2, 3), np.float32), [SamplingRow(1, 1), SamplingRow(1, 1, allowed=fails)])
    assert caught.value.row == 1


@pytest.mark.parametrize("mask", [np.zeros(2, np.int32), np.zeros(0, np.int32), np.zeros((1, 1), np.int32), [0]])
def test_a_mask_of_another_shape_is_refused(mask):
    with pytest.raises(ValueError, match="does not go with 5 logits"):
        sample(np.zeros((1, 5), np.float32), [SamplingRow(1, 1, allowed=lambda: np.array(mask))])


@pytest.mark.parametrize(
    "kwargs",
    [
        {"logit_bias": {3: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"repetition": 1.2, "prompt_ids": [0, 3]},
        {"repetition": 1.2, "output_ids": [-1]},
        {"presence": 1.0, "output_ids": [3]},
    ],
)
def test_a_token_id_outside_the_vocabulary_is_refused(kwargs):
    with pytest.raises(RequestError, match=r"token id (3|-1) in .* is not in the vocabulary \(0 to 2\)"):
        sample(np.zeros((1, 3), np.float32), [SamplingRow(seed=1, position=1, **kwargs)])


def test_shapes_must_agree():
    assert sample(np.zeros((0, 5), np.float32), []) == []
    with pytest.raises(ValueError, match="do not go with 1 rows"):
        sample(np.zeros((2, 5), np.float32), [SamplingRow(1, 1)])
