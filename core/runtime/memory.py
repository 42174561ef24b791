"""The memory plan: what a model will hold on a device, reckoned before anything is allocated."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CapacityError

MIB = 1 << 20
GIB = 1 << 30
AUTO_CONTEXT = 131_072
"""The longest context that is taken unasked: a file may claim any, and position tables take time besides memory."""


def size_text(size: int) -> str:
    """Bytes for a reader: 1.23 GiB, 45.6 MiB, 512 B."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by purpose. ``free`` is what the device had free, ``budget`` the part of it that may be used."""

    device: str
    total: int
    free: int
    budget: int
    weights: int
    workspace: int
    kv_bytes_per_token: int
    kv_dtype: str
    block_size: int
    num_blocks: int
    context: int
    model_context: int
    max_batch: int
    max_tokens: int
    max_logit_rows: int

    @property
    def kv(self) -> int:
        """Bytes of the KV cache."""
        return self.num_blocks * self.block_size * self.kv_bytes_per_token

    @property
    def used(self) -> int:
        """Bytes of everything."""
        return self.weights + self.workspace + self.kv

    @property
    def context_text(self) -> str:
        """The context for a reader, and how it stands to the model's where it is shorter."""
        if self.context >= self.model_context:
            return f"{self.context:,}"
        more = "; runtime.context may ask for more" if self.context == AUTO_CONTEXT else ""
        return f"{self.context:,} of the model's {self.model_context:,}{more}"

    def rows(self) -> list[tuple[str, str, str]]:
        """The table that ``inspect --memory`` and every out-of-memory error print: purpose, size, remark."""
        tokens = self.num_blocks * self.block_size
        return [
            ("weights", size_text(self.weights), f"as {self.device} holds them"),
            (
                "KV cache",
                size_text(self.kv),
                f"{tokens:,} tokens x {size_text(self.kv_bytes_per_token)} ({self.kv_dtype}), "
                f"{self.num_blocks:,} blocks of {self.block_size}",
            ),
            (
                "workspace",
                size_text(self.workspace),
                f"steps of up to {self.max_tokens:,} tokens, a context of {self.context_text}",
            ),
            ("sum", size_text(self.used), ""),
            ("free", size_text(self.free), f"of {size_text(self.total)}; {size_text(self.budget)} may be used"),
        ]

    def table(self) -> str:
        """The rows as aligned text."""
        rows = self.rows()
        wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"  {a:<{wide[0]}}  {b:>{wide[1]}}  {c}".rstrip() for a, b, c in rows)


def plan_memory(
    *,
    device: str,
    total: int,
    free: int,
    memory_fraction: float,
    weights: int,
    workspace: int,
    kv_bytes_per_token: int,
    kv_dtype: str,
    block_size: int,
    context: int | None,
    model_context: int,
    max_batch: int,
    max_tokens: int,
    max_logit_rows: int,
    kv_tokens_cap: int | None = None,
    context_bytes: Callable[[int], int] = lambda context: 0,
) -> MemoryPlan:
    """Decides context and number of KV blocks. ``kv_tokens_cap`` bounds the cache where memory would allow more.

    ``context_bytes`` are the bytes that a context of so many tokens takes beside the KV cache, such as tables of
    positions; they never fall as the context grows, and count as workspace. ``context`` None takes the model's context,
    at most AUTO_CONTEXT, or, if less memory is free, what fits. Raises CapacityError with the table and what would fit.
    """
    budget = int(free * memory_fraction)
    left = budget - weights - workspace
    block_bytes = block_size * kv_bytes_per_token

    def sequence_bytes(tokens: int) -> int:
        """Bytes for one sequence of so many tokens."""
        return context_bytes(tokens) + -(-tokens // block_size) * block_bytes

    most = min(model_context, AUTO_CONTEXT) if context is None else context
    most = min(most, max(0, left) // kv_bytes_per_token)
    fits = bisect_right(range(1, most + 1), left, key=sequence_bytes)
    if context is None:
        context = fits or 1
    needed = -(-context // block_size)
    wanted = max_batch * needed
    if kv_tokens_cap is not None:
        wanted = min(wanted, max(needed, -(-kv_tokens_cap // block_size)))
    fit_blocks = (left - context_bytes(context)) // block_bytes
    plan = MemoryPlan(
        device=device,
        total=total,
        free=free,
        budget=budget,
        weights=weights,
        workspace=workspace + context_bytes(context),
        kv_bytes_per_token=kv_bytes_per_token,
        kv_dtype=kv_dtype,
        block_size=block_size,
        num_blocks=max(needed, min(wanted, fit_blocks)),
        context=context,
        model_context=model_context,
        max_batch=max_batch,
        max_tokens=max_tokens,
        max_logit_rows=max_logit_rows,
    )
    if needed > fit_blocks:
        raise CapacityError(f"{device} has not enough memory for this model.\n{plan.table()}\n{_advice(plan, fits)}")
    return plan


def _advice(plan: MemoryPlan, fits: int) -> str:
    if fits:
        return f"  would fit: runtime.context = {fits:,} with one sequence (asked for {plan.context:,})"
    block = plan.block_size * plan.kv_bytes_per_token
    # The CPU runtime holds every weight as float32, whatever the file's types are.
    smaller = "a smaller model" if plan.device == "cpu" else "a smaller quantisation or model"
    if plan.weights + block > plan.budget:
        short = size_text(plan.weights + block - plan.budget)
        raise_it = ", or raise runtime.memory_fraction" if plan.budget < plan.free else ""
        return f"  would fit: nothing; weights and one KV block alone are {short} over. Use {smaller}{raise_it}"
    return (
        f"  would fit: a workspace of {size_text(plan.budget - plan.weights - block)}; lower "
        f"runtime.max_tokens_per_step ({plan.max_tokens:,}) or runtime.max_batch ({plan.max_batch:,})"
    )
