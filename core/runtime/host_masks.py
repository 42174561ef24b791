"""HostMasks: a loaded model that cannot restrict what is chosen, made to, with the logits on the host.

The sequences of a step that have a mask are computed apart from the others: their logits come to the host and are
sampled there, as the CPU runtime does. Steps without masks pass through untouched. Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import PolyheadError, RequestError
from .batch_checks import check_batch
from .contract import Batch, LoadedModel, Pending, SampledToken, SamplingRow
from .cpu.sampler import sample


class HostMasks:
    """A LoadedModel that answers to ``SamplingRow.allowed``, around one that does not.

    Whatever else the inner model offers is reached through it.
    """

    def __init__(self, inner: LoadedModel) -> None:
        self.inner = inner
        self.decoder, self.plan, self.runs_ahead = inner.decoder, inner.plan, inner.runs_ahead

    @classmethod
    def around(cls, model: LoadedModel) -> LoadedModel:
        """The model itself if it has ``masks``, and so answers to ``SamplingRow.allowed`` by itself."""
        return model if getattr(model, "masks", False) else cls(model)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """As the inner model's."""
        return self.inner.logits(batch)

    def step(self, batch: Batch, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Runs a step and samples one token for each of ``batch.logit_rows``."""
        return self.submit(batch, rows).result()

    def submit(self, batch: Batch, rows: Sequence[SamplingRow], after: Pending | None = None) -> Pending:
        """As the inner model's where no row has a mask; else the step is done when this returns.

        Errors that concern one row name it by its number in ``rows``.
        """
        if not isinstance(after, _Done) and all(row.allowed is None for row in rows):  # the rule
            return self.inner.submit(batch, rows, after)
        masked = _masked(rows)
        if isinstance(after, _Done) or (after is not None and masked.any()):
            batch, after = replace(batch, tokens=np.array([token.id for token in after.result()], np.int32)), None
        if not masked.any():
            return self.inner.submit(batch, rows, after)
        if len(rows) != len(batch.logit_rows):
            raise RequestError(f"{len(rows)} sampling rows for {len(batch.logit_rows)} rows of logits")
        check_batch(batch, self.plan, self.decoder.vocab)  # of the whole: each half may be within the plan
        owners = np.searchsorted(batch.query_start, batch.logit_rows, side="right") - 1
        apart = np.zeros(len(batch.context_lens), np.bool_)
        apart[owners[masked]] = True
        tokens: dict[int, SampledToken] = {}
        for chosen, run in ((~apart, self.inner.step), (apart, self._sample)):
            if chosen.any():
                half, at = _half(batch, owners, chosen)
                _run(run, half, at, rows, tokens)
        return _Done([tokens[row] for row in range(len(rows))])

    def close(self) -> None:
        """Closes the inner model."""
        self.inner.close()

    def _sample(self, batch: Batch, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        return sample(self.inner.logits(batch), rows)


@dataclass(frozen=True, slots=True)
class _Done:
    """A step that is done."""

    tokens: list[SampledToken]

    def result(self) -> list[SampledToken]:
        return self.tokens


def _masked(rows: Sequence[SamplingRow]) -> NDArray[np.bool_]:
    return np.fromiter((row.allowed is not None for row in rows), np.bool_, len(rows))


def _run(
    run: Callable[[Batch, Sequence[SamplingRow]], list[SampledToken]],
    batch: Batch,
    at: Sequence[int],
    rows: Sequence[SamplingRow],
    tokens: dict[int, SampledToken],
) -> None:
    """Puts the tokens of one half, whose rows are ``at`` of the whole, where they belong."""
    try:
        found = run(batch, [rows[row] for row in at])
    except PolyheadError as error:
        if error.row is not None:
            error.row = at[error.row]
        raise
    tokens.update(zip(at, found, strict=True))


def _half(batch: Batch, owners: NDArray[np.intp], chosen: NDArray[np.bool_]) -> tuple[Batch, list[int]]:
    """The chosen sequences as a batch of their own, and which of the rows of logits are theirs."""
    counts = np.diff(batch.query_start)
    kept = np.repeat(chosen, counts)  # of the tokens
    number = np.cumsum(kept) - 1  # of a kept token, in the half
    rows = np.flatnonzero(chosen[owners])
    half = Batch(
        tokens=batch.tokens[kept],
        positions=batch.positions[kept],
        query_start=np.concatenate(([0], np.cumsum(counts[chosen]))).astype(np.int32),
        context_lens=batch.context_lens[chosen],
        block_tables=batch.block_tables[chosen],
        logit_rows=number[batch.logit_rows[rows]].astype(np.int32),
    )
    return half, rows.tolist()
