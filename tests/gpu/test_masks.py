"""Masks of allowed tokens on the device: as on the CPU, whatever else a row asks for and whichever rows have one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from polyhead.errors import DeviceError, RequestError
from polyhead.runtime.contract import SamplingRow
from polyhead.runtime.cpu.sampler import sample as cpu_sample
from polyhead.runtime.cuda.sampler import Needs
from sampling_rows import allows, check, many_logits, many_rows, mask, masked

pytestmark = pytest.mark.gpu

INF = math.inf
PLAIN = SamplingRow(seed=1, position=1)


def only(vocab: int, *token_ids: int):
    """What ``allowed`` is for a row that may choose these tokens."""
    words = mask(vocab, token_ids)
    return lambda: words


@pytest.mark.parametrize(
    ("vocab", "count"),
    [(1, 5), (31, 60), (32, 60), (33, 60), (1_000, 80), (2_049, 40), (50_257, 30), (128_256, 2), (128_256, 40)],
)
def test_equals_the_cpu_sampler_over_vocabularies_of_any_size(sampled, vocab, count) -> None:
    rng = np.random.default_rng(vocab + count)
    logits = many_logits(rng, count, vocab)
    rows = masked(rng, many_rows(rng, count, vocab), logits)
    assert 0 < sum(row.allowed is not None for row in rows) <= count
    assert check(logits, rows, sampled) <= 1 + count // 20
    tokens = sampled(logits, rows)
    for token, row in zip(tokens, rows, strict=True):
        assert row.allowed is None or allows(row.allowed(), np.array([token.id]))


@pytest.mark.parametrize("vocab", [1, 33, 10_000])
def test_a_mask_that_allows_one_token_leaves_no_choice_and_log_probabilities_alone(sampled, vocab) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((1, vocab)).astype(np.float32)
    for token in {0, vocab // 2, vocab - 1}:
        for kwargs in ({}, {"temperature": 0.01}, {"temperature": 1.0, "top_k": 3, "top_p": 0.1, "min_p": 0.5}):
            free = SamplingRow(4, 2, logprobs=3, **kwargs)
            (found,) = sampled(logits, [replace(free, allowed=only(vocab, token))])
            assert found.id == token
            x = logits[0].astype(np.float64)
            assert found.logprob == pytest.approx(x[token] - np.log(np.exp(x).sum()), abs=1e-6)
            assert found.top == sampled(logits, [free])[0].top


def test_a_mask_comes_after_the_bias_and_before_the_penalties(sampled) -> None:
    vocab = 5_000
    logits = np.zeros((1, vocab), np.float32)
    logits[0, [10, 2_500, 4_999]] = 5.0, 4.0, 3.0
    row = SamplingRow(seed=0, position=0, allowed=only(vocab, 2_500, 4_999), logprobs=2)
    for kwargs, token in (
        ({}, 2_500),
        ({"logit_bias": {10: 100.0}}, 2_500),
        ({"logit_bias": {2_500: -1.5}}, 4_999),
        ({"logit_bias": {2_500: -INF}}, 4_999),
        ({"frequency": 1.0, "output_ids": (2_500, 2_500, 10)}, 4_999),
        ({"presence": -100.0, "output_ids": (10,)}, 2_500),
        ({"repetition": 1.5, "prompt_ids": (2_500, 10)}, 4_999),
        ({"repetition": 0.01, "prompt_ids": (10,), "logit_bias": {4_999: 2.0}}, 4_999),
    ):
        each = replace(row, **kwargs)
        assert check(np.repeat(logits, 2, axis=0), [each, replace(each, temperature=0.7)], sampled) == 0
        assert sampled(logits, [each])[0].id == token, kwargs


@pytest.mark.parametrize("filters", [{"top_p": 0.7}, {"top_k": 9_000}, {"top_k": 14_000, "top_p": 0.4, "min_p": 0.01}])
def test_an_edge_among_thousands_of_nearly_equal_values_is_exact(sampled, filters) -> None:
    """More entries lie in one bucket than are listed, so the row is read again, and its mask with it."""
    rng = np.random.default_rng(5)
    logits = (-4.0 + rng.integers(0, 50, (30, 20_000)) * 1e-5).astype(np.float32)
    logits[:, 777] = 3.0
    logits[:, 778] = 9.0
    words = mask(20_000, np.flatnonzero((np.arange(20_000) % 5 != 0) & (np.arange(20_000) != 778)))
    rows = [SamplingRow(seed=6, position=at, temperature=0.9, **filters, allowed=lambda: words) for at in range(30)]
    assert check(logits, rows, sampled) == 0


def test_masks_change_from_call_to_call_and_from_row_to_row(sampled) -> None:
    rng, vocab = np.random.default_rng(12), 3_001
    for _ in range(40):
        count = int(rng.integers(1, 7))
        logits = rng.standard_normal((count, vocab)).astype(np.float32)
        tokens = rng.integers(0, vocab, count).tolist()
        given = (rng.random(count) < rng.choice([0.0, 0.5, 1.0])).tolist()
        rows = [
            SamplingRow(3, 5, float(rng.choice([0.0, 1.0])), allowed=only(vocab, token) if has else None)
            for token, has in zip(tokens, given, strict=True)
        ]
        assert check(logits, rows, sampled) == 0
        for found, token, has in zip(sampled(logits, rows), tokens, given, strict=True):
            assert not has or found.id == token


def test_bits_past_the_vocabulary_mean_nothing(sampled) -> None:
    for vocab in (1, 33, 2_047, 4_097):
        logits = np.full((2, vocab), -5.0, np.float32)
        words = mask(vocab, [vocab - 1])
        words[-1] |= np.int32(-1 << vocab % 32)
        rows = [replace(PLAIN, allowed=lambda words=words: words), replace(PLAIN, allowed=only(vocab, 0))]
        assert [token.id for token in sampled(logits, rows)] == [vocab - 1, 0]


@pytest.mark.parametrize("vocab", [1, 33, 5_000])
def test_a_mask_that_allows_nothing_is_the_error_of_its_row(sampled, vocab) -> None:
    logits = np.zeros((3, vocab), np.float32)
    rows = [PLAIN, replace(PLAIN, position=8, allowed=only(vocab)), PLAIN]
    before = sampled(logits[:1], [PLAIN])
    for change in ({}, {"temperature": 1.0, "top_p": 0.5}, {"logit_bias": {0: 5.0}}):
        rows[1] = replace(rows[1], **change)
        check(logits, rows, sampled)
        with pytest.raises(
            RequestError, match=r"no token is left to choose at position 8: structured_outputs"
        ) as error:
            sampled(logits, rows)
        assert error.value.row == 1
    assert sampled(logits[:1], [PLAIN]) == before
    biased = replace(PLAIN, allowed=only(vocab, 0), logit_bias={0: -INF})
    check(logits, [PLAIN, PLAIN, biased], sampled)
    banned = np.where(np.arange(vocab) == vocab - 1, 0.0, -INF).astype(np.float32)[None]
    if vocab > 1:
        check(banned, [replace(PLAIN, allowed=only(vocab, 0))], sampled)


def test_bad_logits_are_told_though_a_mask_bans_them(sampled) -> None:
    for value in (math.nan, INF):
        logits = np.zeros((2, 5_000), np.float32)
        logits[1, 4_999] = value
        row = replace(PLAIN, allowed=only(5_000, 3))
        check(logits, [row, row], sampled)
        with pytest.raises(DeviceError, match="logits in row 1"):
            sampled(logits, [row, row])


def test_what_a_mask_raises_is_the_error_of_its_row_and_of_no_other_step(sampled) -> None:
    """All masks are asked for once; bad logits come first, and then the rows in their order, as on the CPU."""
    calls = []

    def failing(name):
        def allowed():
            calls.append(name)
            raise RequestError(f"the grammar of {name} takes too much work")

        return allowed

    logits = np.zeros((4, 100), np.float32)
    rows = [PLAIN, replace(PLAIN, allowed=failing("b")), replace(PLAIN, allowed=only(100, 7)), PLAIN]
    with pytest.raises(RequestError, match="of b takes") as error:
        sampled(logits, rows)
    assert error.value.row == 1
    assert calls == ["b"]
    rows[3] = replace(PLAIN, allowed=failing("d"))
    check(logits, rows, sampled)
    check(logits, [replace(PLAIN, allowed=only(100)), *rows[1:]], sampled)
    check(logits, [*rows[2:], *rows[:2]], sampled)
    logits[2, 5] = math.nan
    check(logits, rows, sampled)
    logits[2, 5] = 0.0
    rows[1] = rows[3] = PLAIN
    assert [token.id for token in sampled(logits, rows)] == [0, 0, 7, 0]


def test_a_mask_of_another_vocabulary_is_refused(sampled) -> None:
    logits = np.zeros((1, 33), np.float32)
    for words in (mask(32, [0]), mask(65, [0]), mask(33, [0]).astype(np.int64)):
        for run in (cpu_sample, sampled):
            with pytest.raises(ValueError, match="does not go with 33 logits"):
                run(logits, [replace(PLAIN, allowed=lambda words=words: words)])


def test_a_captured_graph_serves_rows_with_and_without_masks(ctx, make_sampler, put) -> None:
    from polyhead.runtime.cuda.graph import Graph

    vocab, count = 4_100, 3
    sampler, logits = make_sampler(vocab), put(np.zeros((count, vocab), np.float32))
    needs = Needs(draws=False, filters=0, logprobs=False)
    rows = [PLAIN] * count
    sampler.prepare(rows)
    sampler.launch(logits, needs)  # loads the kernels
    sampler.collect(rows)
    with Graph(ctx, lambda: sampler.launch(logits, needs), "sampling") as graph:
        for tokens in ((None, None, None), (5, None, 4_099), (None, 2_048, None), (1, 2, 3), (None, None, None)):
            rows = [PLAIN if token is None else replace(PLAIN, allowed=only(vocab, token)) for token in tokens]
            assert needs.covers(sampler.prepare(rows))
            graph.launch()
            assert [token.id for token in sampler.collect(rows)] == [token or 0 for token in tokens]
