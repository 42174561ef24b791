"""The memory plan: the numbers add up, what fits is used, and what does not is refused with what would fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead import LLM
from polyhead.errors import CapacityError
from polyhead.runtime.memory import AUTO_CONTEXT, MemoryPlan, plan_memory, size_text

MIB = 1 << 20
BASE: dict[str, Any] = {
    "device": "cuda:0",
    "total": 200 * MIB,
    "free": 100 * MIB,
    "memory_fraction": 0.9,
    "weights": 50 * MIB,
    "workspace": 10 * MIB,
    "kv_bytes_per_token": 1024,
    "kv_dtype": "f16",
    "block_size": 16,
    "context": None,
    "model_context": 2048,
    "max_batch": 4,
    "max_tokens": 512,
    "max_logit_rows": 4,
}


def plan(**changes: Any) -> MemoryPlan:
    return plan_memory(**{**BASE, **changes})


def refused(**changes: Any) -> str:
    with pytest.raises(CapacityError) as error:
        plan(**changes)
    return str(error.value)


@given(
    free=st.integers(1, 10**6),
    fraction=st.floats(0.01, 1.0),
    weights=st.integers(0, 10**5),
    workspace=st.integers(0, 10**5),
    per_token=st.integers(1, 500),
    block=st.integers(1, 64),
    context=st.none() | st.integers(1, 3000),
    model_context=st.integers(1, 3000),
    batch=st.integers(1, 9),
    cap=st.none() | st.integers(1, 5000),
    turns=st.integers(0, 100),
)
def test_a_plan_adds_up_stays_in_its_budget_and_holds_a_whole_context(
    free, fraction, weights, workspace, per_token, block, context, model_context, batch, cap, turns
):
    sizes = {"free": free, "memory_fraction": fraction, "weights": weights, "workspace": workspace}
    cache = {"kv_bytes_per_token": per_token, "block_size": block, "max_batch": batch, "kv_tokens_cap": cap}
    sizes |= cache | {
        "context": context,
        "model_context": model_context,
        "context_bytes": lambda tokens: turns * tokens,
    }
    # Refused only if not even one sequence of the context, or of one token, fits.
    least = -(-(context or 1) // block) * block * per_token + turns * (context or 1)
    if weights + workspace + least > int(free * fraction):
        assert "would fit" in refused(**sizes)
        return
    made = plan(**sizes)
    assert made.workspace == workspace + turns * made.context
    assert made.used == made.weights + made.workspace + made.kv
    assert made.kv == made.num_blocks * block * per_token
    assert made.used <= made.budget == int(free * fraction) <= free
    assert made.num_blocks * block >= made.context
    assert made.context == context if context else made.context <= model_context
    # Never more than all sequences can use, nor than the cap unless one context needs it.
    assert made.num_blocks <= batch * -(-made.context // block)
    if cap is not None:
        assert made.num_blocks <= max(-(-made.context // block), -(-cap // block))


def test_without_a_context_the_model_s_own_is_taken():
    made = plan()
    assert made.context == 2048
    assert made.num_blocks == 4 * 2048 // 16


def test_without_a_context_what_fits_is_taken_when_memory_is_short():
    made = plan(free=70 * MIB, model_context=10**6)  # 63 MiB budget, 3 MiB left for the cache
    assert made.context == 3 * MIB // 1024
    assert made.num_blocks * 16 == made.context


def test_a_cache_that_does_not_fit_says_which_context_would():
    message = refused(context=40_000)
    tokens = int(
        re.search(r"runtime\.context = ([\d,]+) with one sequence \(asked for 40,000\)", message)[1].replace(",", "")
    )
    assert plan(context=tokens).context == tokens
    with pytest.raises(CapacityError):
        plan(context=tokens + 16)


def test_what_a_context_takes_beside_the_cache_is_solved_for_and_blamed_on_the_context():
    turns = {"context_bytes": lambda tokens: 4096 * tokens, "model_context": 1 << 27}
    made = plan(**turns)  # 30 MiB for tokens of 5 KiB
    assert made.context == 30 * MIB // 5120 // 16 * 16
    message = refused(**turns, context=1 << 27)
    assert f"runtime.context = {made.context:,} with one sequence (asked for 134,217,728)" in message


def test_a_context_that_only_a_header_asks_for_is_capped_and_the_table_says_so():
    roomy = {"free": 1 << 40, "model_context": 1 << 64}
    made = plan(**roomy)
    assert made.context == AUTO_CONTEXT
    assert "131,072 of the model's 18,446,744,073,709,551,616; runtime.context may ask for more" in made.table()
    assert plan(**roomy, context=200_000).context == 200_000


def test_the_error_holds_the_same_table_as_the_plan():
    message = refused(context=40_000)
    assert message.startswith("cuda:0 has not enough memory for this model.\n")
    for purpose, size in [("weights", "50.00 MiB"), ("workspace", "10.00 MiB"), ("KV cache", "39.06 MiB")]:
        assert re.search(rf"^ +{purpose} +{re.escape(size)}", message, re.MULTILINE), message
    assert re.search(r"^ +sum +99\.06 MiB", message, re.MULTILINE)
    assert "100.00 MiB  of 200.00 MiB; 90.00 MiB may be used" in message


def test_weights_that_do_not_fit_say_by_how_much_and_what_helps():
    message = refused(weights=120 * MIB)
    assert "weights and one KV block alone are 30.02 MiB over" in message
    assert "Use a smaller quantisation or model, or raise runtime.memory_fraction" in message
    # Nothing to raise where all may be used; and quantisation saves nothing where weights are float32 in memory.
    assert "memory_fraction" not in refused(weights=120 * MIB, memory_fraction=1.0)
    on_cpu = refused(weights=120 * MIB, device="cpu")
    assert "Use a smaller model" in on_cpu
    assert "quantisation" not in on_cpu


def test_a_workspace_that_does_not_fit_is_not_blamed_on_the_weights():
    message = refused(workspace=60 * MIB, max_tokens=65_536)
    assert "would fit: a workspace of 39.98 MiB" in message
    assert "runtime.max_tokens_per_step (65,536) or runtime.max_batch (4)" in message
    assert "quantisation" not in message


def test_exactly_enough_is_enough():
    exact = {"memory_fraction": 1.0, "free": 60 * MIB + 16 * 1024}
    assert plan(**exact, context=16).num_blocks == 1
    assert "would fit" in refused(**{**exact, "free": exact["free"] - 1}, context=16)


def test_rows_and_table_say_the_same():
    made = plan()
    lines = made.table().splitlines()
    assert len(lines) == len(made.rows())
    for line, cells in zip(lines, made.rows(), strict=True):
        assert all(cell in line for cell in cells)
    assert "8,192 tokens x 1.00 KiB (f16), 512 blocks of 16" in made.table()


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * MIB // 2, "1.50 MiB"),
        (5 << 30, "5.00 GiB"),
        (5 << 40, "5,120.00 GiB"),
    ],
)
def test_sizes_are_written_for_readers(size, text):
    assert size_text(size) == text


def test_a_model_that_does_not_fit_is_refused_before_its_weights_are_read(tiny_model):
    runtime = {"memory_fraction": 1e-9}
    with pytest.raises(CapacityError, match=r"cpu has not enough memory(.|\n)*would fit: nothing; weights"):
        LLM({"model": str(tiny_model("llama-gqa")), "device": "cpu", "runtime": runtime}, progress=pytest.fail)


def test_the_plan_of_a_loaded_model_is_what_it_allocated(tiny_model):
    runtime = {"context": 40, "max_batch": 3, "block_size": 8, "kv_dtype": "f32", "max_tokens_per_step": 32}
    with LLM({"model": str(tiny_model("llama-gqa")), "device": "cpu", "runtime": runtime}) as llm:
        made = llm.plan
        per_token = 4 * llm.model.decoder.kv_values_per_token()
        assert (made.context, made.num_blocks, made.kv_bytes_per_token) == (40, 3 * 5, per_token)
        values = sum(spec_size(spec.shape) for spec in {s.name: s for s in llm.model.claims.specs}.values())
        assert made.weights >= 4 * values
        assert made.used <= made.budget <= made.free <= made.total


def spec_size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
