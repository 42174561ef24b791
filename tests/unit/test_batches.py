"""Batches: block tables kept from step to step are those of the step, whoever came, grew, started over or left."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead.batches import Batches
from polyhead.engine import Request, ScheduledStep


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(
        st.lists(st.tuples(st.integers(0, 7), st.integers(0, 5), st.booleans()), min_size=1, max_size=4), max_size=20
    )
)
def test_block_tables_are_padded_with_0_whatever_was_there_before(steps):
    batches = Batches(4)
    requests = [Request(str(i), [1, 2]) for i in range(8)]
    blocks = iter(range(1, 10_000))
    for step in steps:
        chosen = {}
        for which, grow, anew in step:
            request = requests[which]
            if anew or not request.block_table:
                request.block_table = [next(blocks)]
            request.block_table += [next(blocks) for _ in range(grow * 5)]
            chosen[which] = request
        tables = [request.block_table for request in chosen.values()]
        batch = batches.of(ScheduledStep.of([], [(request, 2) for request in chosen.values()]))
        width = max(map(len, tables))
        expected = np.array([table + [0] * (width - len(table)) for table in tables], np.int32)
        assert batch.block_tables.dtype == np.int32
        np.testing.assert_array_equal(batch.block_tables, expected)
        batch.block_tables[:] = -1  # its arrays are its own
        assert batch.context_lens.tolist() == [2] * len(tables)
        assert batch.logit_rows.tolist() == [2 * i + 1 for i in range(len(tables))]
