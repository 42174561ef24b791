"""Masks in a model's steps on the GPU: any batch, steps under way together, and errors of single rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from polyhead.errors import RequestError
from polyhead.model import Model
from polyhead.runtime.contract import Batch, RuntimeOptions, SamplingRow
from sampling_rows import check, mask

pytestmark = pytest.mark.gpu

OPTIONS = RuntimeOptions(context=12, block_size=4, max_tokens=24, max_batch=12, deterministic=True)
WIDTH = 3  # blocks of a sequence
VOCAB = 97
TOKENS = st.integers(0, VOCAB - 1)
ROWS = st.builds(
    SamplingRow,
    seed=st.integers(0, 99),
    position=st.integers(0, 20),
    temperature=st.sampled_from([0.0, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    logprobs=st.sampled_from([None, 2]),
    repetition=st.sampled_from([1.0, 1.2]),
    output_ids=st.lists(TOKENS, max_size=3),
    allowed=st.none() | st.sets(TOKENS, max_size=9).map(lambda ids: lambda: mask(VOCAB, ids)),
)
PLAIN = SamplingRow(seed=1, position=1)


@pytest.fixture
def model(ctx, tiny_model, registry):
    from polyhead.runtime.cuda.model import CudaModel

    with Model(tiny_model("llama-gqa"), registry) as opened:
        assert opened.decoder.vocab == VOCAB
        made = CudaModel(opened.decoder, opened.file, OPTIONS)
        yield made
        made.close()


@st.composite
def sequences(draw):
    """One sequence's tokens, how many of them are cached, and a row to sample for some of the others."""
    tokens = draw(st.lists(TOKENS, min_size=1, max_size=4))
    rows = draw(st.dictionaries(st.integers(0, len(tokens) - 1), ROWS, max_size=2))
    return draw(st.lists(TOKENS, max_size=4)), tokens, rows


def batches(items, blocks):
    """The step before, which fills the cache, or None; the step, and its sampling rows."""

    def batch(parts, rows):
        lengths = [len(tokens) for _, tokens, _ in parts]
        return Batch(
            tokens=np.array([t for _, tokens, _ in parts for t in tokens], np.int32),
            positions=np.array([p for past, tokens, _ in parts for p in range(past, past + len(tokens))], np.int32),
            query_start=np.concatenate(([0], np.cumsum(lengths))).astype(np.int32),
            context_lens=np.array([past + len(tokens) for past, tokens, _ in parts], np.int32),
            block_tables=np.array([table for _, _, table in parts], np.int32),
            logit_rows=np.array(rows, np.int32),
        )

    tables = [blocks[i * WIDTH : (i + 1) * WIDTH] for i in range(len(items))]
    before = [(0, past, table) for (past, _, _), table in zip(items, tables, strict=True) if past]
    now = [(len(past), tokens, table) for (past, tokens, _), table in zip(items, tables, strict=True)]
    start, at, rows = 0, [], []
    for _, tokens, wanted in items:
        for row in sorted(wanted):
            at.append(start + row)
            rows.append(wanted[row])
        start += len(tokens)
    return (batch(before, []) if before else None), batch(now, at), rows


def beginning(*rows: SamplingRow, first: int = 0) -> tuple[Batch, list[SamplingRow]]:
    """A step of sequences that begin, one token each; ``first``: the first of their blocks."""
    items = [([], [3 + index], {0: row}) for index, row in enumerate(rows)]
    _, batch, found = batches(items, list(range(first, first + len(rows) * WIDTH)))
    return batch, found


def only(*token_ids: int) -> SamplingRow:
    words = mask(VOCAB, token_ids)
    return replace(PLAIN, allowed=lambda: words)


def test_any_batch_gives_what_the_cpu_s_sampler_chooses_from_its_logits(model) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(sequences(), min_size=1, max_size=6), st.permutations(range(6 * WIDTH)))
    def compare(items, blocks):
        before, batch, rows = batches(items, blocks)
        assume(rows)
        if before is not None:
            model.step(before, [])
        logits = model.logits(batch)
        check(logits, rows, lambda _, rows: model.step(batch, rows))
        check(logits, rows, lambda _, rows: model.submit(batch, rows).result())

    compare()


def test_two_steps_under_way_have_a_mask_each(model) -> None:
    for round in range(6):  # launched one by one, captured, replayed
        rows = [[only(round), PLAIN, only(20 + round)], [PLAIN, only(40 + round), only(60 + round)]]
        alone = [model.step(*beginning(*each, first=9 * i)) for i, each in enumerate(rows)]
        pending = [model.submit(*beginning(*each, first=9 * i)) for i, each in enumerate(rows)]
        assert [each.result() for each in pending] == alone
        assert [alone[0][0].id, alone[0][2].id] == [round, 20 + round]
        assert [alone[1][1].id, alone[1][2].id] == [40 + round, 60 + round]


def test_a_step_without_masks_may_follow_one_with_them_before_its_tokens_are_known(model) -> None:
    batch, rows = beginning(only(7), PLAIN)
    for _ in range(4):
        under_way = model.submit(batch, rows)
        later = replace(
            batch, tokens=batch.tokens * 0, positions=batch.positions + 1, context_lens=batch.context_lens + 1
        )
        following = model.submit(later, [PLAIN, PLAIN], under_way)
        chosen = [token.id for token in under_way.result()]
        assert chosen[0] == 7
        found = following.result()
        assert found == model.step(replace(later, tokens=np.array(chosen, np.int32)), [PLAIN, PLAIN])


@pytest.mark.parametrize("wrong", ["nothing left", "a failing grammar"])
def test_an_error_names_its_row_and_the_next_steps_are_sound(model, wrong) -> None:
    def failing():
        raise RequestError("the grammar takes too much work")

    bad = only() if wrong == "nothing left" else replace(PLAIN, allowed=failing)
    good = model.step(*beginning(PLAIN, only(9), PLAIN))
    for _ in range(5):  # more than there are samplers
        batch, rows = beginning(PLAIN, bad, only(9))
        pending = model.submit(batch, rows)
        with pytest.raises(
            RequestError, match="no token is left" if bad.allowed is not failing else "too much"
        ) as error:
            pending.result()
        assert error.value.row == 1
        assert model.step(*beginning(PLAIN, only(9), PLAIN)) == good


def test_a_batch_beyond_the_plan_is_refused_with_its_masks_not_asked_for(model) -> None:
    items = [([], [1] * 4, {0: replace(PLAIN, allowed=pytest.fail)}) for _ in range(6)] + [([], [1], {})]
    _, batch, rows = batches(items, list(range(7 * WIDTH)))
    with pytest.raises(RequestError, match="a step of 25 tokens exceeds the plan's 24"):
        model.step(batch, rows)
    with pytest.raises(RequestError, match="1 sampling rows for 2 rows of logits"):
        model.step(beginning(PLAIN, PLAIN)[0], [replace(PLAIN, allowed=pytest.fail)])


def test_a_sampler_takes_the_memory_that_the_plan_counts(model) -> None:
    from polyhead.runtime.cuda.plan import most_seen, sampler_bytes

    plan = model.plan
    for sampler in model._samplers:
        arrays = sampler._arrays
        distinct = {array.ptr: array.nbytes for array in (getattr(arrays, name) for name in arrays.__slots__)}
        seen = most_seen(plan.max_batch, VOCAB, plan.context)
        assert sum(distinct.values()) == sampler_bytes(plan.max_logit_rows, VOCAB) + 8 * seen
