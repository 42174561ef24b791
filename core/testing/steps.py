"""Steps put together by hand: a sequence in chunks, or several side by side, without the engine's policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.contract import Batch, LoadedModel


def logits_of(model: LoadedModel, ids: Sequence[int]) -> NDArray[np.float32]:
    """float32 [n, vocab] of one sequence, in steps of as many tokens as the model takes."""
    plan = model.plan
    size = min(plan.max_tokens, plan.max_logit_rows)
    blocks = -(-len(ids) // plan.block_size)
    steps = [batch_of([(ids[: at + size], at)], blocks, plan.block_size) for at in range(0, len(ids), size)]
    return np.concatenate([model.logits(step) for step in steps])


def batch_of(sequences: Sequence[tuple[Sequence[int], int]], blocks: int, block_size: int) -> Batch:
    """A step with the tokens from ``start`` on of each (ids, start), and the logits of all of them.

    Each sequence owns ``blocks`` blocks of the cache; those of several sequences are interleaved, last one first.
    """
    count = len(sequences)
    rows = [(token, p) for ids, start in sequences for p, token in enumerate(ids) if p >= start]
    sizes = [len(ids) - start for ids, start in sequences]
    return Batch(
        tokens=_ints([token for token, _ in rows]),
        positions=_ints([position for _, position in rows]),
        query_start=_ints([0, *np.cumsum(sizes)]),
        context_lens=_ints([len(ids) for ids, _ in sequences]),
        block_tables=_ints([[(blocks - 1 - block) * count + s for block in range(blocks)] for s in range(count)]),
        logit_rows=np.arange(len(rows), dtype=np.int32),
    )


def _ints(values: Any) -> NDArray[np.int32]:
    return np.array(values, np.int32)
