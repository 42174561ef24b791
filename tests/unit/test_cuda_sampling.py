"""What a batch's rows need of the device's sampler. The kernels themselves are held against the CPU in tests/gpu."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from polyhead.runtime.contract import SamplingRow
from polyhead.runtime.cuda.ops.sample import scratch_bytes
from polyhead.runtime.cuda.sampler import Needs

VOCAB = 100
ROWS = st.lists(
    st.builds(
        SamplingRow,
        seed=st.just(0),
        position=st.just(0),
        temperature=st.sampled_from([0.0, 1.0]),
        top_k=st.sampled_from([0, 5, VOCAB, 1_000]),
        top_p=st.sampled_from([0.5, 1.0]),
        min_p=st.sampled_from([0.0, 0.1]),
        logprobs=st.sampled_from([None, 0, 5]),
    ),
    max_size=5,
)


def row(**kwargs) -> SamplingRow:
    return SamplingRow(seed=0, position=0, **kwargs)


def test_needs_name_the_fewest_steps() -> None:
    for kwargs, needs in (
        ({}, Needs(False, 0, False)),
        ({"top_k": 5, "top_p": 0.5}, Needs(False, 0, False)),
        ({"logprobs": 0}, Needs(False, 0, True)),
        ({"temperature": 1.0, "min_p": 0.1}, Needs(True, 0, False)),
        ({"temperature": 1.0, "top_k": 5}, Needs(True, 1, False)),
        ({"temperature": 1.0, "top_k": VOCAB}, Needs(True, 0, False)),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.5, "logprobs": 3}, Needs(True, 2, True)),
    ):
        assert Needs.of([row(**kwargs)], VOCAB) == needs, kwargs
    one_each = [row(temperature=1.0, top_k=5), row(temperature=1.0, top_p=0.5)]
    assert Needs.of(one_each, VOCAB) == Needs(True, 1, False), "each row has one filter"


@given(ROWS, ROWS)
def test_the_needs_of_a_batch_cover_those_of_its_rows(first, second) -> None:
    needs = Needs.of(first + second, VOCAB)
    assert needs.covers(Needs.of(first, VOCAB))
    assert needs.covers(Needs.of(second, VOCAB))
    assert needs.covers(needs)
    less = Needs.of(first, VOCAB)
    assert less == needs or not less.covers(needs)


@given(st.integers(1, 256), st.integers(1, 262_144))
def test_scratch_is_small_beside_the_logits_of_a_real_vocabulary(rows, vocab) -> None:
    size = scratch_bytes(rows, vocab)
    assert size == rows * scratch_bytes(1, vocab)
    assert size % 8 == 0
    assert size < rows * (0.1 * vocab * 4 + 40_000)
