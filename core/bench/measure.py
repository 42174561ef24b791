"""Running cases on a loaded model through the runtime's contract, and what comes out of it.

Knows nothing of files, plugins or printing; prompts are random but the same every time.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..engine import BlockManager
from ..errors import CapacityError, RequestError
from ..runtime.contract import Batch, LoadedModel, Pending, SamplingRow
from .cases import Case
from .machine import Limits
from .work import flops, read_bytes, weight_bytes_per_step


@dataclass(frozen=True, slots=True)
class Result:
    """One case: seconds of each repetition, and the least work that a repetition is.

    ``work`` is bytes read (decode, which memory limits) or float32 operations (prefill, which arithmetic limits).
    """

    case: Case
    seconds: tuple[float, ...]
    work: float

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition, all sequences together."""
        return [self.case.tokens * self.case.batch / each for each in self.seconds]

    @property
    def rate(self) -> float:
        """The median of :attr:`rates`."""
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Half the distance of the slowest and the fastest repetition, tokens per second."""
        return (max(self.rates) - min(self.rates)) / 2

    @property
    def reached(self) -> float:
        """Work per second of the median repetition."""
        return self.work / statistics.median(self.seconds)

    def share(self, limits: Limits) -> float:
        """What part of the machine's limit that is."""
        return self.reached / (limits.read_bytes if self.case.kind == "tg" else limits.flops)


@dataclass(frozen=True, slots=True)
class Report:
    """All results of a model, bytes of weights read per decode step, and the most memory the process has held."""

    results: tuple[Result, ...]
    weight_bytes_per_step: float
    peak_bytes: int


def measure(
    model: LoadedModel,
    cases: Sequence[Case],
    *,
    repeats: int = 5,
    tick: Callable[[int, int, str], None] = lambda done, total, remark: None,
) -> Report:
    """Runs every case ``repeats`` times after runs that are not counted: a prompt twice, and a little decoding.

    Raises RequestError for a case beyond the plan's context or batch, CapacityError where the KV cache is too small.
    """
    if repeats < 1:
        raise RequestError(f"repetitions must be at least 1, got {repeats}")
    for case in cases:
        _check(model, case)
    results = []
    for number, case in enumerate(cases):
        bench = _Bench(model, case)
        bench.warm_up()
        seconds = []
        for repeat in range(repeats):
            tick(number * repeats + repeat, len(cases) * repeats, case.label)
            seconds.append(bench.run())
        work = read_bytes(model.decoder, model.plan, case) if case.kind == "tg" else flops(model.decoder, case)
        results.append(Result(case, tuple(seconds), work))
    return Report(tuple(results), weight_bytes_per_step(model.decoder, model.plan), peak_bytes())


def peak_bytes() -> int:
    """The most memory this process has held at once (peak resident set)."""
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _check(model: LoadedModel, case: Case) -> None:
    plan = model.plan
    if case.context > plan.context:
        raise RequestError(
            f"{case.label} needs a context of {case.context:,} tokens; this model was loaded with {plan.context:,} "
            f"(it was made for {plan.model_context:,})"
        )
    most = min(plan.max_batch, plan.max_logit_rows, plan.max_tokens)
    if case.batch > most:
        raise RequestError(f"{case.label} needs {case.batch} sequences in a step; this model was loaded for {most}")
    blocks = case.batch * -(-case.context // plan.block_size)
    if blocks > plan.num_blocks:
        raise CapacityError(
            f"{case.label} needs {blocks:,} KV blocks, the cache has {plan.num_blocks:,} of {plan.block_size} tokens"
        )


class _Bench:
    """One case with its KV blocks. A run may be repeated: it writes the same positions again."""

    def __init__(self, model: LoadedModel, case: Case) -> None:
        self.model, self.case = model, case
        blocks = BlockManager(model.plan.num_blocks, model.plan.block_size)
        tables: list[list[int]] = []
        for _ in range(case.batch):
            row: list[int] = []
            blocks.extend(row, case.context)
            tables.append(row)
        self.tables = np.array(tables, np.int32)
        self.ids: NDArray[np.int32] = np.random.default_rng(1).integers(
            0, model.decoder.vocab, (case.batch, case.context), dtype=np.int32
        )

    def warm_up(self) -> None:
        """Fills the context up to the depth, and runs a little of the case, or a prompt twice: on a GPU, what is done a
        second time is captured in a graph."""
        self._prefill(0, self.case.depth)
        if self.case.kind == "pp":
            for _ in range(2):
                self._prefill(self.case.depth, self.case.context)
        else:
            self._decode(min(4, self.case.tokens))

    def run(self) -> float:
        """Seconds of the case."""
        start = time.perf_counter()
        if self.case.kind == "pp":
            self._prefill(self.case.depth, self.case.context)
        else:
            self._decode(self.case.tokens)
        return time.perf_counter() - start

    def _prefill(self, first: int, last: int) -> None:
        """Takes in positions first … last − 1 of every sequence, and samples a token at the end of each."""
        for pieces in _packed(self.case.batch, first, last, self.model.plan.max_tokens):
            ends = [row for row, (_, _, end) in enumerate(pieces) if end == last]
            counts = [end - start for _, start, end in pieces]
            starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
            batch = Batch(
                tokens=np.concatenate([self.ids[sequence, start:end] for sequence, start, end in pieces]),
                positions=np.concatenate([np.arange(start, end, dtype=np.int32) for _, start, end in pieces]),
                query_start=starts,
                context_lens=np.array([end for _, _, end in pieces], np.int32),
                block_tables=self.tables[[sequence for sequence, _, _ in pieces]],
                logit_rows=starts[1:][ends] - 1,
            )
            self.model.step(batch, [SamplingRow(seed=1, position=last) for _ in ends])

    def _decode(self, steps: int) -> None:
        """Generates greedily from the depth on: every token is the one that was sampled before.

        As a generation does, the next step is handed over before the tokens of the last are read.
        """
        size = self.case.batch
        rows = np.arange(size, dtype=np.int32)
        starts = np.arange(size + 1, dtype=np.int32)
        tokens = self.ids[:, self.case.depth].copy()
        under_way: Pending | None = None
        for position in range(self.case.depth, self.case.depth + steps):
            batch = Batch(
                tokens=tokens,
                positions=np.full(size, position, np.int32),
                query_start=starts,
                context_lens=np.full(size, position + 1, np.int32),
                block_tables=self.tables,
                logit_rows=rows,
            )
            sampling = [SamplingRow(seed=1, position=position + 1) for _ in rows]
            following = self.model.submit(batch, sampling, after=under_way)
            if under_way is not None:
                under_way.result()
            under_way = following
        if under_way is not None:
            under_way.result()


def _packed(sequences: int, first: int, last: int, most: int) -> Iterator[list[tuple[int, int, int]]]:
    """Steps of up to ``most`` tokens, as (sequence, start, end): sequence after sequence, as a scheduler packs them."""
    pieces: list[tuple[int, int, int]] = []
    room = most
    for sequence in range(sequences):
        start = first
        while start < last:
            end = min(last, start + room)
            pieces.append((sequence, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield pieces
                pieces, room = [], most
    if pieces:
        yield pieces
