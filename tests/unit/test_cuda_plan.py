"""The memory plan of a GPU, without one: how many tokens a step has where nobody says, and what that may cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from polyhead import devices
from polyhead.arch import MLP, Attention, Block, Decoder, Embedding, Linear, RMSNorm, SplitQKV
from polyhead.config import load_config
from polyhead.errors import CapacityError
from polyhead.runtime.contract import MAX_TOKENS, RuntimeOptions
from polyhead.runtime.cpu.plan import plan as plan_cpu
from polyhead.runtime.cuda.plan import plan_program
from polyhead.runtime.memory import MemoryPlan
from polyhead.runtime.program import lower

GIB = 1 << 30
HIDDEN = 1024
AUTO = RuntimeOptions(grow_steps=True, context=4096)


def decoder() -> Decoder:
    attn = Attention(16, 4, 64, SplitQKV(Linear("q"), Linear("k"), Linear("v")), Linear("o"))
    mlp = MLP(4 * HIDDEN, Linear("u"), Linear("d"), "gelu")
    block = Block(RMSNorm("n", 1e-5), attn, RMSNorm("m", 1e-5), mlp)
    return Decoder(HIDDEN, 32_000, 1 << 20, Embedding("e"), (block,) * 4, None)


def plan(options: RuntimeOptions, free: int = 80 * GIB) -> MemoryPlan:
    return plan_program(lower(decoder()), lambda name: "F16", options, "cuda:0", free, free, 132)


def least_free(options: RuntimeOptions) -> int:
    """The fewest bytes of free memory that a plan fits into."""
    low, high = 0, 80 * GIB
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan(options, middle)
            high = middle
        except CapacityError:
            low = middle
    return high


def test_a_step_has_2048_tokens_where_nobody_says_and_memory_is_no_matter():
    made = plan(AUTO)
    assert made.max_tokens == 2048
    assert "steps of up to 2,048 tokens" in made.table()
    assert made == plan(RuntimeOptions(max_tokens=2048, context=4096))


@pytest.mark.parametrize("tokens", [1, 100, 512, 5000])
def test_a_number_that_was_asked_for_is_kept_or_refused(tokens):
    options = RuntimeOptions(max_tokens=tokens, context=4096)
    assert plan(options).max_tokens == tokens
    free = least_free(options)
    assert plan(options, free).max_tokens == tokens
    with pytest.raises(CapacityError, match=rf"steps of up to {tokens:,} tokens"):
        plan(options, free - 1)


@pytest.mark.parametrize("context", [None, 4096])
def test_what_fits_with_512_tokens_always_loads_and_long_steps_cost_a_sixteenth_at_most(context):
    options = replace(AUTO, context=context)
    short = replace(options, grow_steps=False)
    seen = set()
    free = least_free(short)
    with pytest.raises(CapacityError, match=r"steps of up to 512 tokens"):
        plan(options, free - 1)
    while free < 20 * GIB:
        made, least = plan(options, free), plan(short, free)
        seen.add(made.max_tokens)
        assert made.num_blocks >= 15 / 16 * least.num_blocks
        assert made.context >= (15 / 16 * least.context if context is None else context)
        free += free // 50
    assert seen == {512, 1024, 2048}


@pytest.mark.parametrize(
    ("batch", "context", "tokens"), [(1, 512, 512), (1, 513, 1024), (1, 1024, 1024), (1, 1025, 2048), (64, 40, 2048)]
)
def test_a_step_is_not_longer_than_all_sequences_together_fill_by_half(batch, context, tokens):
    assert plan(replace(AUTO, max_batch=batch, context=context)).max_tokens == tokens


def test_the_configuration_says_null_for_what_the_device_decides():
    def options(**runtime: object) -> RuntimeOptions:
        return devices.runtime_options(load_config({"model": "x.gguf", "runtime": runtime}).config)

    assert (options().max_tokens, options().grow_steps) == (MAX_TOKENS, True)
    assert options(max_tokens_per_step=None) == options()
    for asked in (512, 300):
        found = options(max_tokens_per_step=asked)
        assert (found.max_tokens, found.grow_steps) == (asked, False)


def test_on_a_cpu_steps_do_not_grow():
    assert plan_cpu(decoder(), replace(AUTO, context=64)).max_tokens == 512
