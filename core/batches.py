"""Batches: scheduled steps as the arrays a runtime takes.

Building an array of all block tables anew would cost more than planning the step, so their rows are kept from step to
step and only what was appended is written.
"""

from __future__ import annotations

import numpy as np

from .engine import Request, ScheduledStep
from .runtime.contract import Batch, SamplingRow


class Batches:
    """Makes batches of up to ``max_sequences`` sequences.

    It relies on block tables that only ever grow: a sequence that starts over has a new list.
    """

    def __init__(self, max_sequences: int) -> None:
        # Twice the rows, so that those of ended sequences need to be looked for only now and then.
        self._rows = np.zeros((2 * max_sequences, 16), np.int32)
        self._tables: list[list[int]] = []  # of each row; holding it keeps its id from being used again
        self._filled: list[int] = []
        self._row_of: dict[int, int] = {}

    def of(self, step: ScheduledStep) -> Batch:
        """The batch of a step that is not empty. Its arrays are its own."""
        return Batch(
            tokens=np.array(step.tokens, np.int32),
            positions=np.array(step.positions, np.int32),
            query_start=np.array(step.query_start, np.int32),
            context_lens=np.array(step.context_lens, np.int32),
            block_tables=self._tables_of(step),
            logit_rows=np.array(step.logit_rows, np.int32),
        )

    def _tables_of(self, step: ScheduledStep) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        try:
            return self._block_tables(step.block_tables)
        except BaseException:  # an interrupt: what is known of the rows may contradict itself
            self._tables, self._filled, self._row_of = [], [], {}
            raise

    def _block_tables(self, tables: list[list[int]]) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        width = max(map(len, tables))
        if width > self._rows.shape[1]:
            self._rows = np.pad(self._rows, ((0, 0), (0, 2 * width - self._rows.shape[1])))
        if len(self._tables) + len(tables) > len(self._rows):
            self._forget(tables)
        row_of, filled = self._row_of, self._filled
        rows = []
        for table in tables:
            row = row_of.get(id(table))
            if row is None:
                row = row_of[id(table)] = len(filled)
                filled.append(0)
                self._tables.append(table)
                self._rows[row] = 0  # it may have been another's
            if filled[row] != len(table):
                self._rows[row, filled[row] : len(table)] = table[filled[row] :]
                filled[row] = len(table)
            rows.append(row)
        return self._rows[rows, :width]

    def _forget(self, tables: list[list[int]]) -> None:
        """Keeps the rows of these sequences only."""
        kept = [row for row in (self._row_of.get(id(table)) for table in tables) if row is not None]
        self._rows[: len(kept)] = self._rows[kept]
        self._tables = [self._tables[row] for row in kept]
        self._filled = [self._filled[row] for row in kept]
        self._row_of = {id(table): row for row, table in enumerate(self._tables)}


def row_of(request: Request, ahead: int = 0) -> SamplingRow:
    """How a request's next token is chosen, or the one ``ahead`` tokens later."""
    params = request.params
    return SamplingRow(
        seed=request.seed,
        position=request.num_tokens + ahead,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        logit_bias=request.logit_bias,
        prompt_ids=request.prompt_ids,
        output_ids=request.output_ids,
        logprobs=params.logprobs,
    )
