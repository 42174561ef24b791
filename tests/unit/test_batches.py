"""Batches: block tables kept from step to step are those of the step, whoever came, grew, started over or left."""

from __future__ import annotations

import sys

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


def test_an_interrupt_at_any_line_leaves_nothing_that_a_later_batch_believes():
    def step(*tables: list[int]) -> ScheduledStep:
        requests = [Request(str(i), [1, 2]) for i in range(len(tables))]
        for request, table in zip(requests, tables, strict=True):
            request.block_table = table
        return ScheduledStep.of([], [(request, 2) for request in requests])

    old, new, later = [[1, 2], [3]], [[4, 5, 6], [7], [8]], [[9], [10, 11], [12], [13]]
    for stop in range(1, 60):
        batches, left = Batches(4), stop
        batches.of(step(*old))

        def trace(frame, event, arg):
            nonlocal left
            if not frame.f_code.co_filename.endswith("batches.py"):
                return None
            left -= event == "line"
            if not left and event == "line":
                raise KeyboardInterrupt
            return trace

        interrupted = step(*new)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            batches.of(interrupted)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        for tables in ([*old, *new], later, [*new, *later[:1]]):
            found = batches.of(step(*tables)).block_tables
            width = max(map(len, tables))
            assert found.tolist() == [table + [0] * (width - len(table)) for table in tables], stop
    assert left > 0, "the last one ran through"
