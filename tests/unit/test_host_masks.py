"""HostMasks around a model that knows no masks gives what a model that knows them gives."""

from __future__ import annotations

import copy
from dataclasses import replace

import memory_source
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyhead.errors import DeviceError, RequestError
from polyhead.model import Model
from polyhead.runtime.contract import Batch, RuntimeOptions, SamplingRow
from polyhead.runtime.cpu.model import CpuModel
from polyhead.runtime.host_masks import HostMasks

OPTIONS = RuntimeOptions(context=12, block_size=4, max_tokens=24, max_batch=12, deterministic=True)
WIDTH = 3  # blocks of a sequence


class Maskless(CpuModel):
    """A runtime that has never heard of masks, and counts the steps it takes."""

    calls: tuple[str, ...] = ()
    extra = "reached"

    def logits(self, batch):
        self.calls += ("logits",)
        return super().logits(batch)

    def submit(self, batch, rows, after=None):
        self.calls += ("submit",)
        return super().submit(batch, rows, after)

    def step(self, batch, rows):
        assert all(row.allowed is None for row in rows)
        if self.calls[-1:] != ("submit",):
            self.calls += ("step",)
        return super().step(batch, rows)


@pytest.fixture(scope="module")
def models(tiny_model, registry):
    with Model(tiny_model("llama-gqa"), registry) as model:
        weights = {spec.name: model.file.dequantise(spec.name) for spec in model.claims.specs}
        source = memory_source.MemorySource(weights)
        bare, inner = (kind(model.decoder, source, OPTIONS) for kind in (CpuModel, Maskless))
        yield bare, inner
        bare.close()
        inner.close()


def mask(vocab: int, token_ids) -> np.ndarray:
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in token_ids:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


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
    allowed=st.none() | st.sets(TOKENS, min_size=1, max_size=9).map(lambda ids: lambda: mask(VOCAB, ids)),
)


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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(sequences(), min_size=1, max_size=6), st.permutations(range(6 * WIDTH)))
def test_any_batch_gives_what_a_model_with_masks_gives(models, items, blocks):
    bare, inner = models
    found = []
    for model in (bare, HostMasks(inner)):
        before, batch, rows = batches(items, blocks)
        if before is not None:
            model.step(before, [])
        found.append((model.step(batch, rows), model.submit(batch, rows).result(), model.logits(batch).tolist()))
        found[-1] += ([model.read_kv(0, [b * 4 for b in blocks[:WIDTH]])[0][0].tolist()],)
    assert found[0] == found[1]
    for token, row in zip(found[0][0], rows, strict=True):
        assert row.allowed is None or row.allowed()[token.id // 32] >> token.id % 32 & 1


def two(first: SamplingRow, second: SamplingRow, tokens=(3, 4)) -> tuple[Batch, list[SamplingRow]]:
    """A step of two sequences that begin."""
    _, batch, rows = batches([([], [tokens[0]], {0: first}), ([], [tokens[1]], {0: second})], list(range(2 * WIDTH)))
    return batch, rows


PLAIN = SamplingRow(seed=1, position=1)
MASKED = replace(PLAIN, allowed=lambda: mask(VOCAB, [7]))


def test_steps_without_masks_pass_through_and_halves_are_computed_once(models):
    _, inner = models
    wrapped = HostMasks(inner)
    for rows, calls in [
        ((PLAIN, PLAIN), ("submit",)),
        ((MASKED, PLAIN), ("step", "logits")),
        ((MASKED, MASKED), ("logits",)),
    ]:
        inner.calls = ()
        wrapped.submit(*two(*rows))
        assert inner.calls == calls


def test_the_step_before_gives_the_tokens_whether_it_or_this_one_had_masks(models):
    bare, inner = models
    for first in (PLAIN, MASKED):
        for second in (PLAIN, MASKED):
            found = []
            for model in (bare, HostMasks(inner)):
                batch, rows = two(first, PLAIN)
                under_way = model.submit(batch, rows)
                following = replace(
                    batch, positions=batch.positions + 1, context_lens=batch.context_lens + 1, tokens=batch.tokens * 0
                )
                found.append((under_way.result(), model.submit(following, [second, PLAIN], under_way).result()))
            assert found[0] == found[1]


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_errors_name_the_row_of_the_whole_batch(models, wrong):
    bare, inner = models
    nothing = [
        replace(PLAIN, logit_bias={VOCAB: 1.0}),  # an error without a row
        replace(PLAIN, logit_bias=dict.fromkeys(range(VOCAB), -np.inf)),
        replace(MASKED, logit_bias={7: -np.inf}),
    ][wrong]
    for order in (1, -1):
        found = []
        for model in (bare, HostMasks(inner)):
            items = [([], [i], {0: row}) for i, row in enumerate([PLAIN, MASKED, PLAIN, MASKED, nothing][::order])]
            _, batch, rows = batches(items, list(range(5 * WIDTH)))
            with pytest.raises(RequestError) as caught:
                model.step(batch, rows)
            found.append((str(caught.value), caught.value.row))
        assert found[0] == found[1]
        assert found[0][1] == (None if wrong == 0 else 4 if order == 1 else 0)


def test_a_batch_beyond_the_plan_is_refused_though_its_halves_are_not(models):
    bare, inner = models
    items = [([], [1] * 4, {0: row}) for row in (MASKED, PLAIN) * 3] + [([], [1], {})]
    _, batch, rows = batches(items, list(range(7 * WIDTH)))
    for model in (bare, HostMasks(inner)):
        with pytest.raises(RequestError, match="a step of 25 tokens exceeds the plan's 24"):
            model.step(batch, rows)
        batch_of_two, _ = two(MASKED, PLAIN)
        with pytest.raises(RequestError, match="1 sampling rows for 2 rows of logits"):
            model.step(batch_of_two, [MASKED])


def test_what_the_inner_model_offers_besides_is_reached(models, tiny_model, registry):
    _, inner = models
    wrapped = HostMasks(inner)
    assert wrapped.extra == "reached"
    assert wrapped.plan is inner.plan
    assert wrapped.decoder is inner.decoder
    assert wrapped.runs_ahead is False
    assert copy.copy(wrapped).inner is inner
    with pytest.raises(AttributeError, match="nonsense"):
        _ = wrapped.nonsense


def test_closing_closes_the_inner_model(tiny_model, registry):
    with Model(tiny_model("llama-gqa"), registry) as model:
        source = memory_source.MemorySource(
            {spec.name: model.file.dequantise(spec.name) for spec in model.claims.specs}
        )
        wrapped = HostMasks(CpuModel(model.decoder, source, OPTIONS))
    wrapped.close()
    wrapped.close()
    with pytest.raises(DeviceError, match="closed"):
        wrapped.step(*two(MASKED, PLAIN))
