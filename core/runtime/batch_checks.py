"""check_batch: what every runtime refuses before it computes a step."""

from __future__ import annotations

from ..errors import RequestError
from .contract import Batch
from .memory import MemoryPlan


def check_batch(batch: Batch, plan: MemoryPlan, vocab: int) -> None:
    """Raises RequestError, with both numbers, for a batch beyond the plan, a token outside the vocabulary, or a block
    outside the cache.
    """
    if len(batch.tokens) > plan.max_tokens:
        raise RequestError(f"a step of {len(batch.tokens)} tokens exceeds the plan's {plan.max_tokens}")
    if len(batch.logit_rows) > plan.max_logit_rows:
        raise RequestError(f"{len(batch.logit_rows)} rows of logits exceed the plan's {plan.max_logit_rows}")
    if len(batch.tokens) == 0:
        raise RequestError("a step needs at least one token")
    longest = int(batch.context_lens.max())
    if longest > plan.context:
        raise RequestError(f"context of {longest} tokens exceeds the plan's {plan.context}")
    low, high = int(batch.tokens.min()), int(batch.tokens.max())
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise RequestError(f"token id {wrong} is outside the vocabulary of {vocab} ids")
    reach = batch.block_tables.shape[1] * plan.block_size
    if reach < longest:
        raise RequestError(f"block tables reach {reach} tokens, context is {longest}")
    if int(batch.block_tables.min()) < 0 or int(batch.block_tables.max()) >= plan.num_blocks:
        raise RequestError(f"a block table names a block outside the plan's {plan.num_blocks}")
