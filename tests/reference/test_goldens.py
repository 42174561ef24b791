"""Tiny random models against HF transformers in float32: logits, greedy tokens, and one block's checkpoints."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import tolerance
from polyhead import LLM, SamplingParams
from polyhead.batches import Batches
from polyhead.engine import BlockManager, Request, Scheduler

NAMES = golden.names()


@pytest.fixture(scope="module")
def open_tiny(tiny_model, registry):
    def open_(name: str, **runtime: object) -> LLM:
        path = tiny_model(name)
        assert golden.sha256(path) == golden.load(name).sha256, "the builder drifted from the golden"
        settings = {"max_tokens_per_step": 32, "block_size": 8, "max_batch": 32, **runtime}
        return LLM({"model": str(path), "device": "cpu", "runtime": settings}, registry=registry)

    return open_


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_reference(name, open_tiny):
    expected = golden.load(name)
    with open_tiny(name) as llm:
        for sequence in expected.sequences:
            logits = llm.logits(sequence.ids)[sequence.positions]
            assert tolerance.error(logits, sequence.logits) < tolerance.CPU_LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_equal_the_reference(name, open_tiny):
    expected = golden.load(name).greedy
    with open_tiny(name) as llm:
        params = SamplingParams(max_tokens=len(expected.tokens), temperature=0.0, ignore_eos=True)
        assert list(llm.generate([expected.prompt], params)[0].token_ids) == expected.tokens


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token_equals_the_reference(name, open_tiny):
    sequence = golden.load(name).sequences[-1]
    with open_tiny(name, max_tokens_per_step=1) as llm:
        logits = llm.logits(sequence.ids)[sequence.positions]
        assert tolerance.error(logits, sequence.logits) < tolerance.CPU_LOGITS


@pytest.mark.parametrize("name", [name for name in NAMES if golden.load(name).checkpoints])
def test_checkpoints_of_a_block_equal_the_reference(name, open_tiny):
    expected = golden.load(name)
    with open_tiny(name) as llm:
        model = llm._generation.model
        scheduler = Scheduler(BlockManager(8, 8), 32, 1, 64)
        scheduler.add(Request("a", expected.sequences[0].ids))
        seen = model.trace(Batches(1).of(scheduler.schedule()))
        prefix = f"blk.{expected.layer}"
        spec = model.decoder.blocks[expected.layer].attn
        qkv = seen[f"{prefix}.attn.store_kv"]
        q, k, v = np.split(qkv, [spec.q_size, spec.q_size + spec.kv_size], axis=1)
        found = {
            "attn_norm": seen[f"{prefix}.attn_norm"],
            "q": q,
            "k": k,
            "v": v,
            "attn": seen[f"{prefix}.attn.attend"],
        }
        if f"{prefix}.mlp_norm" in seen:
            found["mlp_norm"] = seen[f"{prefix}.mlp_norm"]
        for key, value in found.items():
            wanted = expected.checkpoints[key]
            limit = tolerance.CPU_NORM if key == "attn_norm" else tolerance.CPU_BLOCK
            assert tolerance.error(value.reshape(wanted.shape), wanted) < limit, key
