"""Every combination that the vocabulary can say, on the CPU runtime, against the slow float64 reference."""

from __future__ import annotations

import memory_source
import naive
import numpy as np
import pytest
import random_decoders
import tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polyhead.generation import Generation
from polyhead.runtime.contract import RuntimeOptions
from polyhead.runtime.cpu.model import CpuModel

FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@FEW
@given(decoder=random_decoders.decoders(), seed=st.integers(0, 99), chunk=st.integers(1, 9), length=st.integers(1, 20))
def test_logits_equal_the_naive_reference(decoder, seed, chunk, length):
    weights = memory_source.random_weights(decoder, seed)
    ids = np.random.default_rng(seed).integers(0, decoder.vocab, length).tolist()
    options = RuntimeOptions(max_batch=chunk, max_tokens=chunk, block_size=3)
    model = CpuModel(decoder, memory_source.MemorySource(weights), options)
    found = Generation(model, None).logits(ids)
    assert tolerance.error(found, naive.logits(decoder, weights, ids)) < tolerance.CPU_LOGITS


@FEW
@given(decoder=random_decoders.decoders(), rows=st.integers(1, 40), logit_rows=st.integers(1, 40))
def test_buffers_that_live_at_once_never_share_bytes(decoder, rows, logit_rows):
    from polyhead.runtime.program import lower

    program = lower(decoder)
    workspace = program.workspace(rows, logit_rows)
    placed = [
        (workspace.offsets[name], 4 * buffer.columns * (rows if buffer.rows == "tokens" else logit_rows), first, last)
        for name, (buffer, first, last) in program.buffers().items()
    ]
    for i, (start, size, first, last) in enumerate(placed):
        assert start % 256 == 0
        assert start + size <= workspace.size
        for other, other_size, other_first, other_last in placed[:i]:
            if first <= other_last and other_first <= last:
                assert start + size <= other or other + other_size <= start


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "gelu_quick", "silu", "relu", "relu_squared"])
def test_activations_hold_over_the_whole_range_of_float32(kind):
    from polyhead.runtime.cpu.ops import activate

    x = np.concatenate([np.linspace(-30, 30, 4001), [0.0, -0.0, 1e-30, -1e30 if kind != "relu_squared" else -1.0, 90]])
    x = x.astype(np.float32)
    out = np.empty_like(x)
    with np.errstate(over="raise", invalid="raise"):
        activate(kind, x, out)
    with np.errstate(all="ignore"):
        expected = np.nan_to_num(naive._ACTIVATIONS[kind](x.astype(np.float64)))
    np.testing.assert_allclose(out, expected, rtol=3e-6, atol=3e-7)
