"""Rows to sample and a comparison with the CPU's sampler that allows for what rounding may decide either way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from polyhead.errors import PolyheadError
from polyhead.runtime.contract import SampledToken, SamplingRow
from polyhead.runtime.cpu.sampler import sample as cpu_sample
from polyhead.runtime.philox import uniform

CLOSE = 1e-6  # nearer to a boundary than this, in units of the total weight, two samplers may differ
F32 = NDArray[np.float32]
Run = Callable[[F32, Sequence[SamplingRow]], list[SampledToken]]


def mask(vocab: int, token_ids: Iterable[int]) -> NDArray[np.int32]:
    """A mask that allows these tokens, int32 [ceil(vocab / 32)]."""
    tokens = np.array(list(token_ids), np.int64)
    words = np.zeros(-(-vocab // 32), np.uint32)
    np.bitwise_or.at(words, tokens // 32, np.left_shift(1, tokens % 32).astype(np.uint32))
    return words.view(np.int32)


def allows(words: NDArray[np.int32], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether a mask allows each of the tokens."""
    return (words[tokens // 32].astype(np.int64) >> tokens % 32 & 1).astype(np.bool_)


def adjusted(logits: F32, row: SamplingRow) -> NDArray[np.float64]:
    """Bias, mask and penalties as their definitions say."""
    x = logits.astype(np.float64)
    for token, bias in row.logit_bias.items():
        x[token] += bias
    if row.allowed is not None:
        x[~allows(row.allowed(), np.arange(len(x)))] = -math.inf
    if row.repetition != 1.0:
        for token in {*row.prompt_ids, *row.output_ids}:
            x[token] = x[token] / row.repetition if x[token] > 0 else x[token] * row.repetition
    for token, count in Counter(row.output_ids).items():
        x[token] -= row.presence + row.frequency * count
    return x


def distance(logits: F32, row: SamplingRow) -> float:
    """How far the row's decisions are from going another way, in units of the total weight; greedy is exact: 1."""
    if row.temperature == 0.0:
        return 1.0
    x = adjusted(logits, row)
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((x - x.max()) / row.temperature)
    order = np.argsort(-x, kind="stable")
    if 0 < row.top_k < len(x):
        order = order[: row.top_k]
    near = [1.0]
    if row.top_p < 1.0:
        sums = np.cumsum(weights[order]) / weights[order].sum()
        near.append(float(np.abs(sums - row.top_p).min()))
        order = order[: int(np.searchsorted(sums, row.top_p)) + 1]
    if row.min_p > 0.0:
        near.append(float(np.abs(weights[order] - row.min_p).min()))
        order = order[weights[order] >= row.min_p]
    sums = np.cumsum(weights[np.sort(order)])
    near.append(float(np.abs(sums / sums[-1] - uniform(row.seed, row.position)).min()))
    return min(near)


def outcome(sample: Run, logits: F32, rows: Sequence[SamplingRow]) -> tuple[list[SampledToken], PolyheadError | None]:
    """The tokens, or the error."""
    try:
        return sample(logits, rows), None
    except PolyheadError as error:
        return [], error


def check(logits: F32, rows: Sequence[SamplingRow], run: Run) -> int:
    """Compares with the CPU; returns how many rows were too close to a boundary to be equal."""
    expected, problem = outcome(cpu_sample, logits, rows)
    tokens, other = outcome(run, logits, rows)
    assert (type(other), str(other)) == (type(problem), str(problem))
    close = 0
    for index, (found, wanted) in enumerate(zip(tokens, expected, strict=True)):
        if found.id != wanted.id:
            assert distance(logits[index], rows[index]) < CLOSE, (index, found, wanted, rows[index])
            close += 1
            continue
        assert (found.logprob is None) == (wanted.logprob is None)
        if wanted.logprob is not None:
            np.testing.assert_allclose(found.logprob, wanted.logprob, rtol=0, atol=1e-6)
            assert [token for token, _ in found.top] == [token for token, _ in wanted.top]
            np.testing.assert_allclose([x for _, x in found.top], [x for _, x in wanted.top], rtol=0, atol=1e-6)
    return close


def many_rows(rng: np.random.Generator, count: int, vocab: int) -> list[SamplingRow]:
    def ids() -> list[int]:
        return rng.integers(0, vocab, rng.integers(0, 50)).tolist()

    return [
        SamplingRow(
            seed=int(rng.integers(0, 2**63)),
            position=int(rng.integers(0, 2**20)),
            temperature=float(rng.choice([0.0, 0.5, 0.7, 1.0, 1.7])),
            top_k=int(rng.choice([0, 0, 1, 40, 1_000, vocab // 2])),
            top_p=float(rng.choice([1.0, 0.5, 0.9, 0.95, 0.999])),
            min_p=float(rng.choice([0.0, 0.0, 0.05])),
            repetition=float(rng.choice([1.0, 1.1])),
            presence=float(rng.choice([0.0, 0.5])),
            frequency=float(rng.choice([0.0, 0.25])),
            logit_bias={int(token): 3.0 for token in rng.integers(0, vocab, rng.integers(0, 5))},
            prompt_ids=ids(),
            output_ids=ids(),
            logprobs=[None, 0, 3, 20][rng.integers(4)],
        )
        for _ in range(count)
    ]


def many_logits(rng: np.random.Generator, count: int, vocab: int) -> F32:
    """Peaked, flat, coarse (with many ties), all equal, clustered far below one peak, partly banned."""
    x = rng.standard_normal((count, vocab)) * rng.choice([0.05, 1.0, 3.0], (count, 1))
    for index, kind in enumerate(rng.integers(0, 8, count)):
        if kind == 0:
            x[index] = np.round(x[index] * 4) / 4
        elif kind == 1:
            x[index] = 1.5
        elif kind == 2:
            x[index] = -3.0 + 1e-4 * x[index]
            x[index, rng.integers(vocab)] = 0.0
        elif kind == 3:
            x[index, rng.random(vocab) < 0.5] = -math.inf
            x[index, rng.integers(vocab)] = 0.0
    return x.astype(np.float32)


def masked(rng: np.random.Generator, rows: Sequence[SamplingRow], logits: F32) -> list[SamplingRow]:
    """The rows, most of them with a mask: of few tokens, half, nearly all; each allows one that has a finite logit."""

    def give(row: SamplingRow, x: F32) -> SamplingRow:
        words = mask(len(x), np.flatnonzero(rng.random(len(x)) < rng.choice([0.0, 0.01, 0.5, 0.99])))
        words |= mask(len(x), [int(rng.choice(np.flatnonzero(np.isfinite(x))))])
        return replace(row, allowed=lambda: words)

    return [give(row, x) if rng.random() < 0.7 else row for row, x in zip(rows, logits, strict=True)]
