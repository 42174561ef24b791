"""From logits to tokens, on NumPy: the reference that a device's sampler answers to.

Knows nothing of requests or models. A row's token depends on its logits and its SamplingRow only, never on the rows
beside it. All arithmetic after the logits is float64. In this order:

1. logit bias: added (-inf bans);
1b. allowed tokens: the logits of all others become -inf;
2. repetition penalty r, for each id in prompt or output: logit / r if positive, else logit * r;
3. presence p and frequency f, for each id in the output n times: logit - p - f * n;
4. temperature 0: the highest logit, the lowest id among equals. Else T: weights exp((logit - highest) / T);
5. top-k: the first k by (logit descending, id ascending);
6. top-p: of these, in the same order, the fewest whose weights sum to at least top_p times the sum of all of these;
7. min-p: of these, the ones whose weight is at least min_p times the greatest, which is 1;
8. draw: cumulative weights in order of id; the first that exceeds u times the last, u = philox.uniform(seed, position).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import RequestError
from ..contract import SampledToken, SamplingRow
from ..masks import as_flags, ask
from ..philox import uniform
from ..sampling_errors import bad_logits, nothing_left

Floats = NDArray[np.float64]
Ids = NDArray[np.intp]

_BUCKETS = 2_048
_GROUP = 32


def sample(logits: NDArray[np.float32], rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """One token for each row of ``logits``, float32 [M, vocab], as the M ``rows`` say.

    A logit of -inf is a token that cannot be chosen. Raises ``DeviceError`` for a row with NaN, +inf or nothing but
    -inf, and ``RequestError`` for a token id outside the vocabulary or if every token is banned. What a row's
    ``allowed`` raises passes through with ``row`` set.
    """
    if logits.ndim != 2 or logits.shape[0] != len(rows):
        raise ValueError(f"logits of shape {logits.shape} do not go with {len(rows)} rows")
    if not rows:
        return []
    best = np.argmax(logits, axis=1)  # the first of equals; a NaN counts as the highest
    for index, peak in enumerate(logits[np.arange(len(rows)), best].tolist()):
        _check_peak(peak, index, rows[index])
    result: list[SampledToken] = []
    for index, row in enumerate(rows):
        if row.temperature == 0.0 and not _adjusts(row):
            token = int(best[index])
        else:
            token = _sample_row(logits[index], index, row)
        if row.logprobs is None:
            result.append(SampledToken(token))
        else:
            result.append(with_logprobs(logits[index], token, row.logprobs))
    return result


def with_logprobs(logits: NDArray[np.float32], token: int, count: int) -> SampledToken:
    """A token with its log-probability under ``logits``, float32 [vocab], and the ``count`` most likely tokens.

    Log-softmax in float64 of the logits as they are. The most likely come best first, the lower id first among equals,
    without tokens of logit -inf.
    """
    x = logits.astype(np.float64)
    peak = x.max()
    normaliser = float(peak + np.log(np.exp(x - peak).sum()))
    top: tuple[tuple[int, float], ...] = ()
    if count:
        ids = _first_k(x, count)
        ids = ids[x[ids] > -np.inf]
        ids = ids[np.argsort(-x[ids], kind="stable")]
        top = tuple((int(i), float(x[i]) - normaliser) for i in ids)
    return SampledToken(token, float(x[token]) - normaliser, top)


def _check_peak(peak: float, index: int, row: SamplingRow) -> None:
    if np.isfinite(peak):
        return
    what = "NaN" if np.isnan(peak) else "+inf" if peak > 0 else "only -inf"
    raise bad_logits(what, index, row)


def _adjusts(row: SamplingRow) -> bool:
    """Whether the row's logits change before the temperature."""
    changes = row.logit_bias or row.repetition != 1.0 or row.presence or row.frequency
    return bool(changes) or row.allowed is not None


def _sample_row(logits: NDArray[np.float32], index: int, row: SamplingRow) -> int:
    x = logits.astype(np.float64)
    if _adjusts(row):
        _adjust(x, index, row)
    best = int(np.argmax(x))
    peak = float(x[best])
    if peak == -np.inf:
        raise nothing_left(index, row)
    if row.temperature == 0.0:
        return best
    ids: Ids | None = None  # None: all, in order of id
    if 0 < row.top_k < len(x):
        ids = _first_k(x, row.top_k)
    values = x if ids is None else x[ids]
    weights = _weights(values, peak, row.temperature)
    if row.top_p < 1.0:
        kept = _top_p(values, weights, row.top_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    if row.min_p > 0.0:
        kept = np.flatnonzero(weights >= row.min_p)
        ids = kept if ids is None else ids[kept]
        weights = weights[kept]
    cumulative = np.cumsum(weights)
    target = uniform(row.seed, row.position) * cumulative[-1]
    chosen = min(int(np.searchsorted(cumulative, target, side="right")), len(cumulative) - 1)
    return chosen if ids is None else int(ids[chosen])


def _adjust(x: Floats, index: int, row: SamplingRow) -> None:
    """Steps 1 to 3, in place."""
    if row.logit_bias:
        ids = _in_vocabulary("logit_bias", row.logit_bias.keys(), len(x))
        x[ids] += np.fromiter(row.logit_bias.values(), np.float64, len(ids))
    if row.allowed is not None:
        x[~as_flags(ask(row.allowed, index, len(x)), len(x))] = -np.inf
    if row.repetition != 1.0:
        seen = _in_vocabulary("the prompt or output", {*row.prompt_ids, *row.output_ids}, len(x))
        values = x[seen]
        x[seen] = np.where(values > 0.0, values / row.repetition, values * row.repetition)
    if (row.presence or row.frequency) and row.output_ids:
        output = _in_vocabulary("the output", row.output_ids, len(x))
        ids, counts = np.unique(output, return_counts=True)
        x[ids] -= row.presence + row.frequency * counts


def _in_vocabulary(where: str, token_ids: Iterable[int], vocab: int) -> Ids:
    """The ids as an array; a negative one would silently count from the end, so it is refused like one too large."""
    ids = np.fromiter(token_ids, np.intp)
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
        wrong = ids[(ids < 0) | (ids >= vocab)][0]
        raise RequestError(f"token id {wrong} in {where} is not in the vocabulary (0 to {vocab - 1})")
    return ids


def _weights(values: Floats, peak: float, temperature: float) -> Floats:
    """Unnormalised probabilities, 1 for the highest logit. A tiny temperature makes the others 0, never NaN."""
    with np.errstate(over="ignore", under="ignore"):
        scaled = values - peak
        scaled /= temperature
        return np.exp(scaled, out=scaled)


def _first_k(x: Floats, k: int) -> Ids:
    """The first k ids by (value descending, id ascending), returned in order of id.

    Selection instead of a sort: everything above the k-th value, and the lowest ids among those equal to it. In a long
    row only candidates are looked at: split into groups, at least k groups have a highest value that reaches the k-th
    highest of these, so at least k values do.
    """
    if k >= len(x):
        return np.arange(len(x))
    groups = len(x) // _GROUP
    if groups >= k:
        highest = x[: groups * _GROUP].reshape(_GROUP, groups).max(axis=0)
        candidates = np.flatnonzero(x >= np.partition(highest, groups - k)[groups - k])
    else:
        candidates = np.arange(len(x))
    values = x[candidates]
    bound = np.partition(values, len(values) - k)[len(values) - k]
    above = candidates[values > bound]
    equal = candidates[values == bound][: k - len(above)]
    return np.sort(np.concatenate((above, equal)))


def _top_p(values: Floats, weights: Floats, top_p: float) -> Ids:
    """Indices, ascending, of the fewest values in order (value descending, index ascending) that hold top_p of weight.

    Only what lies around the boundary is sorted. First, values whose weight is under ``(1 - top_p) * total / n`` hold
    together less than ``1 - top_p`` of the total, so the answer lies among the others (the factor 0.5 is room for
    rounding). Then, if many are left, they go into buckets of descending value; whole buckets are in or out, but for
    the one in which the sum reaches the target.
    """
    target = top_p * weights.sum()
    candidates = np.flatnonzero(weights >= 0.5 * (1.0 - top_p) * weights.sum() / len(weights))
    inside = candidates[:0]
    if len(candidates) > _BUCKETS:
        drop = values[candidates].max() - values[candidates]
        span = drop.max()
        if (
            span > 1e-300
        ):  # the product is monotonic in drop, so a bucket never holds a higher value than the one before
            bucket = (drop * ((_BUCKETS - 1) / span)).astype(np.intp)
            sums = np.cumsum(np.bincount(bucket, weights[candidates]))
            edge = min(int(np.searchsorted(sums, target, side="left")), len(sums) - 1)
            inside = candidates[bucket < edge]
            candidates = candidates[bucket == edge]
            target -= sums[edge - 1] if edge else 0.0
    order = candidates[np.argsort(-values[candidates], kind="stable")]
    count = int(np.searchsorted(np.cumsum(weights[order]), target, side="left")) + 1
    keep = np.zeros(len(values), np.bool_)
    keep[inside] = True
    keep[order[:count]] = True
    return np.flatnonzero(keep)
