"""Sampling on a CUDA device: SamplingRows packed into flat device arrays, kernels launched, tokens read back.

What is computed, and in which order, says cpu/sampler.py; tokens are equal but where a draw or a top-p boundary is
within 1e-6 of a cumulative weight. Knows nothing of requests, batches or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import DeviceError, PolyheadError, RequestError
from ..contract import SampledToken, SamplingRow
from ..masks import mask_words
from ..sampling_errors import bad_logits, nothing_left
from .context import Context
from .memory import Array, HostBuffer, Pool
from .ops.sample import BANNED, INFINITE, NAN, OK, PACK_ROW, ROW, TOP, TOPS, SampleArrays, sample, scratch_bytes
from .sampling_lists import BiasLists, SeenLists
from .sampling_masks import MaskLists

_COLDEST = 1e-300  # below it 1 / temperature is not finite; long before, only the highest logit has any weight
_BIASES = 1_536  # a row's share by default: what a user may give, and the stop tokens that min_tokens bans


@dataclass(frozen=True, slots=True)
class Needs:
    """Which steps the rows of a batch need; a captured graph holds those of its own, so compare before a replay.

    ``draws``: some row has a temperature. ``filters``: how many of top-k and top-p the row with the most has.
    """

    draws: bool
    filters: int
    logprobs: bool

    @classmethod
    def of(cls, rows: Iterable[SamplingRow], vocab: int) -> Needs:
        """What these rows need."""
        draws, filters, logprobs = False, 0, False
        for row in rows:
            if row.temperature > 0.0:
                draws = True
                filters = max(filters, (0 < row.top_k < vocab) + (row.top_p < 1.0))
            logprobs = logprobs or row.logprobs is not None
        return cls(draws, filters, logprobs)

    def covers(self, other: Needs) -> bool:
        """Whether steps launched for these needs serve the other's rows too."""
        return self.draws >= other.draws and self.filters >= other.filters and self.logprobs >= other.logprobs


class Sampler:
    """Turns logits of up to ``max_rows`` rows into tokens. Owns arrays of ``pool`` and page-locked staging memory.

    ``prepare`` uploads rows, ``launch`` may be captured in a graph, ``collect`` waits and reads; ``sample`` is all
    three. The staging memory is one step deep: collect before preparing again. Not thread-safe.
    """

    def __init__(
        self, ctx: Context, pool: Pool, max_rows: int, vocab: int, max_seen: int, max_biases: int | None = None
    ) -> None:
        """``max_seen``: the most distinct tokens of all penalised generations in a step; as many as the KV cache has
        tokens, and max_rows more, always suffice. ``max_biases``: the most logit biases of a step."""
        self.max_rows = max_rows
        self.vocab = vocab
        self._ctx = ctx
        biases = max_rows * min(_BIASES, vocab) if max_biases is None else max_biases
        self._arrays = SampleArrays(
            rows=pool.array((max_rows, ROW.itemsize), "u8"),
            seen_ids=pool.array(max_seen, "i32"),
            seen_counts=pool.array(max_seen, "i32"),
            bias_ids=pool.array(biases, "i32"),
            bias_values=pool.array(biases, "i64"),
            masks=pool.array((max_rows, mask_words(vocab)), "u32"),
            recent=(tokens := pool.array(max_rows, "i32", zero=True)),
            tokens=tokens,
            results=pool.array((max_rows, 2), "i32", zero=True),
            tops=pool.array((max_rows, TOPS), "i32", zero=True),
            scratch=pool.array(scratch_bytes(max_rows, vocab), "u8", zero=True),
        )
        self._buffers: list[HostBuffer] = []
        self._rows = self._staging(ROW, max_rows)
        self._row_bytes: Any = self._rows.view(np.uint8)
        self._results = self._staging(np.int32, max_rows, 2)
        self._tops = self._staging(np.int32, max_rows, TOPS)
        arrays = self._arrays
        self._biases = BiasLists(ctx.device, self._staging, arrays.bias_ids, arrays.bias_values, vocab)
        self._seen = SeenLists(ctx.device, self._staging, arrays.seen_ids, arrays.seen_counts, vocab)
        self._masks = MaskLists(ctx.device, self._staging, arrays.masks, vocab)

    @property
    def tokens(self) -> Array:
        """i32 [max_rows] on the device: the tokens of the last launch, valid ids even for rows in error."""
        return self._arrays.tokens

    def sample(self, logits: Array, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """One token for each row of ``logits``, f32 [M, vocab], as the M ``rows`` say. Errors as ``collect``."""
        if logits.shape != (len(rows), self.vocab):
            raise DeviceError(f"{logits} does not go with {len(rows)} rows and a vocabulary of {self.vocab:,}")
        if not rows:
            return []
        self.launch(logits, self.prepare(rows))
        return self.collect(rows)

    def prepare(self, rows: Sequence[SamplingRow], *, recent: bool = False) -> Needs:
        """Uploads what the rows say, in stream order and without waiting, and returns what they need.

        ``recent``: the rows are those of the last launch, and their ``output_ids`` lack the token it chose, which the
        host may not know yet; the device counts it. A row's ``output_ids`` may grow between calls, or be another
        object; other content in the same object is not noticed. Masks are asked for here, while the device computes
        the logits. Raises RequestError for a token id outside the vocabulary or more log-probabilities than the
        kernels report, CapacityError for lists that are too long, ValueError for a mask of another type or shape.
        """
        if len(rows) > self.max_rows:
            raise DeviceError(f"{len(rows)} rows to sample exceed the sampler's {self.max_rows}")
        biases = self._biases.update(rows)
        seen = self._seen.update(rows)
        masks = self._masks.update(rows)
        places = zip(rows, masks, seen, biases, strict=True)
        for start, (row, mask, (seen_start, seen_count), (bias_start, bias_count)) in zip(
            range(0, self.max_rows * ROW.itemsize, ROW.itemsize), places, strict=False
        ):
            PACK_ROW.pack_into(
                self._row_bytes,
                start,
                1.0 / max(row.temperature, _COLDEST) if row.temperature > 0.0 else 0.0,
                row.top_p,
                row.min_p,
                row.repetition,
                row.presence,
                row.frequency,
                row.seed,
                mask,
                row.position,
                recent,
                min(row.top_k, self.vocab),
                -1 if row.logprobs is None else _logprobs(row.logprobs),
                seen_start,
                seen_count,
                bias_start,
                bias_count,
            )
        host = self._rows[: len(rows)]
        self._ctx.device.copy_in(self._arrays.rows.slice_rows(0, len(rows)), host)
        return Needs.of(rows, self.vocab)

    def launch(self, logits: Array, needs: Needs) -> None:
        """Enqueues sampling from ``logits``, f32 [M, vocab], and the copy to the host. Uploads nothing, waits for
        nothing: it may be captured, and replayed after another ``prepare`` of M rows whose needs are covered."""
        count = logits.shape[0]
        sample(
            self._ctx,
            logits,
            self._arrays,
            draws=needs.draws,
            filters=needs.filters,
            logprobs=needs.logprobs,
        )
        device = self._ctx.device
        device.copy_out(self._arrays.results.slice_rows(0, count), self._results[:count])
        if needs.logprobs:
            device.copy_out(self._arrays.tops.slice_rows(0, count), self._tops[:count])

    def collect(self, rows: Sequence[SamplingRow], *, waited: bool = False) -> list[SampledToken]:
        """Waits for the launch, unless the caller has ``waited`` for it, and returns the tokens of its rows.

        Raises DeviceError for a row with NaN, +inf or nothing but -inf, RequestError if bias and mask ban every token,
        and what a row's ``allowed`` raised, with ``row`` set.
        """
        if not waited:
            self._ctx.device.synchronize()
        ids, statuses = self._results[: len(rows)].T.tolist()
        if any(statuses) or self._masks.errors:
            _raise_first(statuses, self._masks.errors, rows)
        return [
            SampledToken(ids[index]) if row.logprobs is None else _with_logprobs(ids[index], self._tops[index])
            for index, row in enumerate(rows)
        ]

    def close(self) -> None:
        """Returns the page-locked memory; the pool owns the rest. Closing twice is harmless."""
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def _staging(self, kind: Any, *shape: int) -> NDArray[Any]:
        dtype = np.dtype(kind)
        buffer = HostBuffer(self._ctx.device, math.prod(shape) * dtype.itemsize)
        self._buffers.append(buffer)
        return buffer.array(dtype, *shape)


def _logprobs(count: int) -> int:
    if count > TOP:
        raise RequestError(f"logprobs must be at most {TOP} on this device, got {count}")
    return count


def _with_logprobs(token: int, words: NDArray[np.int32]) -> SampledToken:
    normaliser = float(words[:2].view(np.float64)[0])
    logits = words.view(np.float32)
    count = int(words[3])
    values = logits[4 + TOP : 4 + TOP + count].tolist()
    top = tuple((id, value - normaliser) for id, value in zip(words[4 : 4 + count].tolist(), values, strict=True))
    return SampledToken(token, float(logits[2]) - normaliser, top)


def _raise_first(statuses: Sequence[int], masks: Mapping[int, PolyheadError], rows: Sequence[SamplingRow]) -> None:
    """Raises what the CPU's sampler would: bad logits of any row come before what bans all of a row's tokens."""
    for index, status in enumerate(statuses):
        if status not in (OK, BANNED):
            raise bad_logits({NAN: "NaN", INFINITE: "+inf"}.get(status, "only -inf"), index, rows[index])
    for index, status in enumerate(statuses):
        if index in masks:
            raise masks[index]
        if status == BANNED:
            raise nothing_left(index, rows[index])
