"""Perplexity: how well a model predicts a text, by a sliding window.

perplexity = exp(mean of −ln p(token | those before it in its window)); the log-softmax is taken in float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import DeviceError, RequestError

if TYPE_CHECKING:
    from ..llm import LLM

DEFAULT_CONTEXT = 512
_ROWS = 64


@dataclass(frozen=True, slots=True)
class Perplexity:
    """``tokens`` were scored, each once; ``nll`` is their mean negative log-likelihood in nats, ``error`` its standard
    error. ``bos``: whether every window began with the BOS token. ``seconds`` is the time of evaluation."""

    perplexity: float
    nll: float
    error: float
    tokens: int
    text_tokens: int
    windows: int
    context: int
    stride: int
    bos: bool
    seconds: float


def windows(total: int, size: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored) of windows of up to ``size`` tokens that advance by ``stride``.

    Together they score every token from 0 to total − 1 exactly once, and all but the first window's with at least
    ``size − stride`` tokens before them.
    """
    begin = scored = 0
    while scored < total:
        end = min(begin + size, total)
        yield begin, end, scored
        scored = end
        begin += stride


def perplexity(
    llm: LLM,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    tick: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> Perplexity:
    """The perplexity of ``text`` in windows of ``context`` tokens (default 512 or the model's, if less).

    Windows advance by ``stride`` (default half a window). BOS is put before every window where the model was trained
    with it, and takes one place; without it the very first token has nothing before it and is not scored. Names of
    control tokens in the text are text. Raises RequestError for a text or numbers that cannot be used,
    DeviceError where the model's logits are not finite.
    """
    most = llm.plan.context
    context = min(DEFAULT_CONTEXT, most) if context is None else context
    if not 2 <= context <= most:
        raise RequestError(
            f"the window's context must be from 2 to {most:,} tokens (the loaded context), got {context:,}"
        )
    bos = [llm.tokenizer.bos_id] if llm.tokenizer.add_bos and llm.tokenizer.bos_id is not None else []
    size = context - len(bos)
    stride = max(1, size // 2) if stride is None else stride
    most_stride = size if bos else size - 1  # without BOS, windows overlap so that every token has one before it
    if not 1 <= stride <= most_stride:
        raise RequestError(
            f"the stride must be from 1 to {most_stride:,} tokens in a window of {context:,}, got {stride:,}"
        )
    ids = llm.tokenizer.encode(text, bos=False)
    if len(ids) + len(bos) < 2:
        raise RequestError(f"the text has {len(ids)} tokens; at least {2 - len(bos)} are needed to predict one")
    losses: list[NDArray[np.float64]] = []
    count = 0
    start = time.perf_counter()
    for begin, end, scored in windows(len(ids), size, stride):
        if not bos:
            scored = max(scored, begin + 1)
        logits = llm.logits([*bos, *ids[begin:end]])
        # The row before a token predicts it.
        rows = logits[scored - begin + len(bos) - 1 : end - begin + len(bos) - 1]
        losses.append(_nll(rows, ids[scored:end]))
        if not np.isfinite(losses[-1]).all():
            raise DeviceError(
                f"the model's logits for tokens {scored:,} to {end - 1:,} of the text are not finite numbers, so there "
                f"is no perplexity; weights of {llm.model.name} are damaged or overflow"
            )
        count += 1
        so_far = float(np.concatenate(losses).mean())
        tick(end, len(ids), f"tokens, perplexity {_exp(so_far):.4g}")
    each = np.concatenate(losses)
    mean = float(each.mean())
    error = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0
    seconds = time.perf_counter() - start
    return Perplexity(_exp(mean), mean, error, len(each), len(ids), count, context, stride, bool(bos), seconds)


def _nll(logits: NDArray[np.float32], targets: list[int]) -> NDArray[np.float64]:
    """−ln softmax(logits)[target] for each row, in float64, some rows at a time."""
    parts = []
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        highest = rows.max(axis=1)
        with np.errstate(invalid="ignore"):  # logits that are not finite are the caller's to report
            total = np.log(np.exp(rows - highest[:, None]).sum(axis=1)) + highest
        parts.append(total - rows[np.arange(len(rows)), targets[start : start + _ROWS]])
    return np.concatenate(parts) if parts else np.empty(0)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
