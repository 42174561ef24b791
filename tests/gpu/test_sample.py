"""The device's sampler against the CPU's: equal tokens, log-probabilities and errors, whatever else is in the batch."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead.errors import CapacityError, DeviceError, RequestError
from polyhead.runtime.contract import SamplingRow
from polyhead.runtime.cpu.sampler import sample as cpu_sample
from polyhead.runtime.cuda.graph import Graph
from polyhead.runtime.cuda.ops.sample import MAX_VOCAB
from polyhead.runtime.cuda.sampler import Needs
from polyhead.runtime.philox import uniform
from sampling_rows import CLOSE, check, distance, many_logits, many_rows, mask, masked

pytestmark = pytest.mark.gpu

INF = math.inf


VOCAB = 12
FINITE = st.one_of(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0]), st.floats(-20, 20, width=32))
STRANGE = st.one_of(FINITE, FINITE, FINITE, FINITE, st.sampled_from([-INF, INF, math.nan, 3e38, -3e38, 1e-42]))
SMALL = st.lists(STRANGE, min_size=VOCAB, max_size=VOCAB)
IDS = st.lists(st.integers(0, VOCAB - 1), max_size=6)
ROWS = st.builds(
    SamplingRow,
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**20),
    temperature=st.sampled_from([0.0, 1e-308, 0.3, 0.7, 1.0, 1.5, 20.0, 1e308]),
    top_k=st.sampled_from([0, 0, 1, 2, 5, VOCAB, 100]),
    top_p=st.sampled_from([1.0, 1.0, 1e-9, 0.05, 0.37, 0.81, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.013, 0.37, 1.0]),
    repetition=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence=st.sampled_from([0.0, 0.6, -1.1]),
    frequency=st.sampled_from([0.0, 0.4, -0.3]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-INF, -100.0, -1.5, 2.5]), max_size=3),
    prompt_ids=IDS,
    output_ids=IDS,
    logprobs=st.sampled_from([None, None, 0, 1, 5, 20]),
    allowed=st.one_of(st.none(), st.sets(st.integers(0, VOCAB - 1)).map(lambda ids: lambda: mask(VOCAB, ids))),
)


def test_equals_the_cpu_sampler_on_whatever_rows(sampled) -> None:
    @settings(max_examples=400, deadline=None)
    @given(st.lists(st.tuples(SMALL, ROWS), min_size=1, max_size=5))
    def compare(pairs) -> None:
        check(np.array([x for x, _ in pairs], np.float32), [row for _, row in pairs], sampled)

    compare()


@pytest.mark.parametrize(
    ("vocab", "count"),
    [(1, 3), (31, 40), (2_048, 9), (2_049, 9), (4_097, 200), (50_257, 40), (128_256, 3), (128_256, 40), (262_144, 17)],
)
def test_equals_the_cpu_sampler_over_vocabularies_of_any_size(sampled, vocab, count) -> None:
    rng = np.random.default_rng(vocab + count)
    close = check(many_logits(rng, count, vocab), many_rows(rng, count, vocab), sampled)
    assert close <= 1 + count // 20


def test_a_row_gives_the_same_bits_alone_and_in_any_batch(sampled) -> None:
    rng = np.random.default_rng(3)
    vocab, count = 30_011, 150
    logits, rows = many_logits(rng, count, vocab), many_rows(rng, count, vocab)
    rows = [replace(row, logprobs=5) for row in masked(rng, rows, logits)]
    together = sampled(logits, rows)
    order = rng.permutation(count)
    shuffled = sampled(logits[order], [rows[index] for index in order])
    assert shuffled == [together[index] for index in order]
    for index in range(0, count, 7):  # few rows are cut into smaller chunks
        assert sampled(logits[index : index + 1], [rows[index]]) == [together[index]]
    assert sampled(logits, rows) == together


def test_ties_go_to_the_lowest_ids_across_chunks(sampled) -> None:
    logits = np.zeros((40, 10_000), np.float32)
    greedy = [SamplingRow(seed=1, position=at) for at in range(40)]
    assert {token.id for token in sampled(logits, greedy)} == {0}
    peaks = np.full((1, 10_000), -1.0, np.float32)
    peaks[0, [2_047, 2_048, 4_096, 9_999]] = 7.0
    assert sampled(peaks, greedy[:1])[0].id == 2_047
    assert sampled(peaks, [replace(greedy[0], logprobs=4)])[0].top[3][0] == 9_999
    for kwargs, kept in (
        ({"top_k": 3}, 3),
        ({"top_k": 5_000}, 5_000),
        ({"top_p": 0.25}, 2_500),
        ({"top_p": 1e-9}, 1),
        ({"top_k": 4_000, "top_p": 0.5}, 2_000),
    ):
        rows = [SamplingRow(seed=2, position=at, temperature=1.0, **kwargs) for at in range(40)]
        expected = [int(uniform(2, at) * kept) for at in range(40)]
        assert [token.id for token in sampled(logits, rows)] == expected, kwargs


def test_the_draw_is_exact_to_the_last_bits_of_philox(sampled) -> None:
    """Two tokens whose boundary lies 1e-11 below or above the draw, which takes biases in float64."""
    rng = np.random.default_rng(8)
    rows, expected = [], []
    for seed in (0, 2**64 - 1, *(int(seed) for seed in rng.integers(0, 2**64, 100, np.uint64))):
        position = int(rng.integers(0, 2**31))
        u = uniform(seed, position)
        if 0.05 < u < 0.95:
            for token, share in ((0, u + 1e-11), (1, u - 1e-11)):
                rows.append(SamplingRow(seed, position, 1.0, logit_bias={1: math.log((1.0 - share) / share)}))
                expected.append(token)
    assert [token.id for token in sampled(np.zeros((len(rows), 2), np.float32), rows)] == expected


def test_top_p_refers_to_what_top_k_left_and_to_what_min_p_will_drop(sampled) -> None:
    logits = np.tile(np.log(np.array([0.36, 0.27, 0.18, 0.1, 0.09], np.float32)), (60, 1))
    for kwargs, kept in (
        ({"top_k": 2, "top_p": 0.55}, {0}),
        ({"top_p": 0.55}, {0, 1}),
        ({"top_k": 4, "top_p": 0.5, "min_p": 0.6}, {0, 1}),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.4}, {0, 1, 2}),
    ):
        rows = [SamplingRow(seed=3, position=at, temperature=1.0, **kwargs) for at in range(60)]
        assert {token.id for token in sampled(logits, rows)} == kept, kwargs


@pytest.mark.parametrize("filters", [{"top_p": 0.7}, {"top_k": 9_000}, {"top_k": 14_000, "top_p": 0.4, "min_p": 0.01}])
def test_an_edge_among_thousands_of_nearly_equal_values_is_exact(sampled, filters) -> None:
    """More entries lie in one bucket than are listed, so the row is read again."""
    rng = np.random.default_rng(5)
    logits = (-4.0 + rng.integers(0, 50, (30, 20_000)) * 1e-5).astype(np.float32)
    logits[:, 777] = 3.0
    rows = [SamplingRow(seed=6, position=at, temperature=0.9, **filters) for at in range(30)]
    assert check(logits, rows, sampled) == 0


def test_penalties_follow_a_growing_output_and_survive_a_changing_batch(sampled, ctx) -> None:
    rng, vocab = np.random.default_rng(11), 5_000
    penalties = {"repetition": 1.2, "presence": 0.4, "frequency": 0.3}
    outputs: list[list[int]] = [[] for _ in range(6)]
    prompts = [tuple(rng.integers(0, vocab, 30).tolist()) for _ in range(6)]
    for step in range(60):
        live = [index for index in range(6) if (index * 7 + step) % 11 < 8]
        logits = rng.standard_normal((len(live), vocab)).astype(np.float32)
        logits[:, :20] += 6.0  # the same few tokens come again and again
        rows = [
            SamplingRow(9, step, 0.0 if i % 2 else 0.8, **penalties, prompt_ids=prompts[i], output_ids=outputs[i])
            for i in live
        ]
        assert check(logits, rows, sampled) == 0
        for index, token in zip(live, cpu_sample(logits, rows), strict=True):
            outputs[index].append(token.id)


def test_another_content_of_the_same_list_is_noticed(sampled) -> None:
    output: list[int] = []
    logits = np.array([[0.0, 2.5, 2.0]], np.float32)
    for content, token in (([], 1), ([1, 1, 1], 2), ([2, 2, 2, 2], 1), ([1], 2), ([1, 2], 1), ([1, 1, 2], 2)):
        output[:] = content
        assert sampled(logits, [SamplingRow(seed=0, position=0, frequency=1.0, output_ids=output)])[0].id == token


def test_a_token_that_the_host_does_not_know_yet_is_counted(ctx, make_sampler, put) -> None:
    rng, vocab = np.random.default_rng(2), 3_000
    sampler = make_sampler(vocab)
    base = {"repetition": 1.1, "presence": 1.0, "frequency": 0.5, "logit_bias": {3: 1.0}}
    rows = [
        SamplingRow(1, 0, 0.0, **base, prompt_ids=(1, 2, 3)),
        SamplingRow(2, 0, 1.0, top_p=0.9, **base),
        SamplingRow(3, 0, 0.7, top_k=20, top_p=0.8),
    ]
    known: list[list[int]] = [[], [], []]
    for step in range(12):
        logits = rng.standard_normal((3, vocab)).astype(np.float32)
        logits[:, :6] += 5.0
        late = [replace(row, position=step, output_ids=tuple(seen[:-1])) for row, seen in zip(rows, known, strict=True)]
        needs = sampler.prepare(late, recent=step > 0)
        sampler.launch(put(logits), needs)
        found = [token.id for token in sampler.collect(late)]
        exact = [replace(row, position=step, output_ids=tuple(seen)) for row, seen in zip(rows, known, strict=True)]
        assert found == [token.id for token in cpu_sample(logits, exact)]
        for seen, token in zip(known, found, strict=True):
            seen.append(token)


def test_lists_that_run_out_of_room_are_laid_out_anew_and_too_long_ones_are_an_error(make_sampler, put) -> None:
    rng, vocab = np.random.default_rng(4), 1_000
    sampler = make_sampler(vocab, 4, max_seen=400)
    for _ in range(20):  # each round brings other generations; those of the last one must give way
        outputs = [rng.integers(0, vocab, 40).tolist() for _ in range(4)]
        for _ in range(30):
            logits = rng.standard_normal((4, vocab)).astype(np.float32)
            rows = [SamplingRow(5, 1, 0.0, presence=0.5, output_ids=output) for output in outputs]
            found = [token.id for token in sampler.sample(put(logits), rows)]
            assert found == [token.id for token in cpu_sample(logits, rows)]
            for output, token in zip(outputs, found, strict=True):
                output.append(token)
    rows = [SamplingRow(5, 1, 0.0, presence=0.5, output_ids=range(401))]
    with pytest.raises(CapacityError, match=r"401 distinct tokens.*room for 400"):
        sampler.sample(put(np.zeros((1, vocab), np.float32)), rows)


def test_a_captured_graph_serves_other_rows(ctx, make_sampler, put) -> None:
    rng = np.random.default_rng(6)
    vocab, count = 9_001, 5
    sampler = make_sampler(vocab)
    logits = put(np.zeros((count, vocab), np.float32))
    needs = Needs(draws=True, filters=2, logprobs=True)
    rows = many_rows(rng, count, vocab)
    sampler.prepare(rows)
    sampler.launch(logits, needs)  # loads the kernels
    sampler.collect(rows)
    with Graph(ctx, lambda: sampler.launch(logits, needs), "sampling") as graph:
        for _ in range(10):
            values = many_logits(rng, count, vocab)
            rows = masked(rng, many_rows(rng, count, vocab), values)
            ctx.device.upload(logits, values)
            assert needs.covers(sampler.prepare(rows))
            graph.launch()
            found, expected = sampler.collect(rows), cpu_sample(values, rows)
            for index, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert a.id == b.id or distance(values[index], rows[index]) < CLOSE


def test_a_row_in_error_leaves_no_trace(sampled) -> None:
    logits = np.zeros((3, 5_000), np.float32)
    logits[:, 7] = 2.0
    good = [SamplingRow(seed=1, position=at, temperature=0.5, top_p=0.9, top_k=50) for at in range(3)]
    before = sampled(logits, good)
    for value in (math.nan, INF):
        broken = logits.copy()
        broken[1, 4_999] = value
        check(broken, good, sampled)
    with pytest.raises(DeviceError, match=r"only -inf logits in row 2, for the token at position 2"):
        sampled(np.where(np.arange(3)[:, None] == 2, -INF, logits).astype(np.float32), good)
    with pytest.raises(RequestError, match=r"no token is left to choose at position 1"):
        sampled(logits[:, :2], [good[0], replace(good[1], logit_bias={0: -INF, 1: -INF}), good[2]])
    assert sampled(logits, good) == before


@pytest.mark.parametrize(
    "kwargs",
    [
        {"logit_bias": {50: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"repetition": 1.1, "prompt_ids": (3, 50)},
        {"repetition": 1.1, "output_ids": (-2,)},
        {"presence": 0.1, "output_ids": (1, 99)},
    ],
)
def test_token_ids_outside_the_vocabulary_are_refused_as_on_the_cpu(sampled, kwargs) -> None:
    check(np.zeros((1, 50), np.float32), [SamplingRow(seed=0, position=0, **kwargs)], sampled)


def test_what_cannot_be_is_refused_before_a_launch(make_sampler, put, pool) -> None:
    sampler = make_sampler(100, 2)
    row = SamplingRow(seed=0, position=0)
    logits = put(np.zeros((3, 100), np.float32))
    with pytest.raises(DeviceError, match="3 rows to sample exceed the sampler's 2"):
        sampler.sample(logits, [row] * 3)
    with pytest.raises(DeviceError, match=r"f32\[3, 100\] does not go with 2 rows"):
        sampler.sample(logits, [row] * 2)
    with pytest.raises(RequestError, match="logprobs must be at most 20"):
        sampler.sample(logits.slice_rows(0, 1), [replace(row, logprobs=21)])
    with pytest.raises(DeviceError, match=f"up to {MAX_VOCAB:,} tokens"):
        make_sampler(MAX_VOCAB + 1, 1).launch(pool.array((1, MAX_VOCAB + 1), "f32"), Needs(False, 0, False))
    with pytest.raises(DeviceError, match="sample wants rows"):
        sampler.launch(logits, Needs.of([row], 100))
    assert sampler.sample(logits.slice_rows(0, 0), []) == []
