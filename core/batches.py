"""Batches: scheduled steps as the arrays a runtime takes.

Building an array of all block tables anew would cost more than planning the step, so their rows are kept from step to
step and only what was appended is written.
"""

from __future__ import annotations

import numpy as np

from .engine import Request, ScheduledStep
from .runtime.contract import Batch, SamplingRow

_CERTAIN = 1e30  # a bias above all logits


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


def rows_of(step: ScheduledStep) -> list[SamplingRow]:
    """How each of a step's rows of logits becomes a token: those that choose, then those that are scored."""
    if not step.drafts and not step.scored:
        return [row_of(request) for request in step.sampled]
    return [
        *(row_of(request, ahead) for request, ahead in step.choices()),
        *(scoring_row(request, position) for request, position in step.scored),
    ]


def row_of(request: Request, ahead: int = 0) -> SamplingRow:
    """How a request's next token is chosen, or the one ``ahead`` tokens later."""
    params, guide = request.params, request.guide
    # In the order of the fields: this runs for every token of every sequence.
    return SamplingRow(
        request.seed,
        len(request.prompt_ids) + len(request.output_ids) + ahead,
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.presence_penalty,
        params.frequency_penalty,
        request.logit_bias if params.min_tokens else params.logit_bias,
        request.prompt_ids,
        request.output_ids,
        params.logprobs,
        None if guide is None else guide.allowed,
    )


def scoring_row(request: Request, position: int) -> SamplingRow:
    """A row that takes the prompt's token at ``position``, for its log-probability under the model's own logits.

    Taken by a bias that outdoes all logits but -inf: if another token comes, this one is impossible.
    """
    return SamplingRow(
        seed=0,
        position=position,
        temperature=0.0,
        logit_bias={request.prompt_ids[position]: _CERTAIN},
        logprobs=request.params.prompt_logprobs,
    )
