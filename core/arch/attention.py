"""Attention: heads, where Q, K and V come from, and everything that may differ from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .fields import check_fields
from .linear import Linear
from .norm import Norm
from .position import Rope
from .tensors import MOST_POSITIONS, TensorSpec, check, check_positive, within


@dataclass(frozen=True, slots=True)
class SplitQKV:
    """Three matrices: q [heads·head_dim, hidden], k and v [kv_heads·head_dim, hidden]."""

    q: Linear
    k: Linear
    v: Linear

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class FusedQKV:
    """One matrix whose rows are all of Q, then all of K, then all of V."""

    proj: Linear

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Attention:
    """Causal attention. MHA is ``kv_heads == heads``, GQA fewer, MQA one.

    ``head_dim`` stands by itself: it need not be hidden / heads. ``q_norm`` and ``k_norm`` act on each head's
    [head_dim] before RoPE, with one weight for all heads. ``window``: a query at position p sees keys at
    p − window + 1 … p. ``softcap``: scores become softcap · tanh(score / softcap). ``scale`` multiplies q·k; None means
    head_dim^(−1/2).
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv: SplitQKV | FusedQKV
    out: Linear
    rope: Rope | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive("Attention", heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        check(
            self.heads % self.kv_heads == 0,
            f"Attention: heads is {self.heads}, expected a multiple of kv_heads ({self.kv_heads})",
        )
        if self.rope is not None:
            check(
                self.rope.dim <= self.head_dim,
                f"Attention: rope.dim is {self.rope.dim}, expected at most head_dim ({self.head_dim})",
            )
        if self.window is not None:
            check_positive("Attention", window=self.window)
            check(
                self.window <= MOST_POSITIONS,
                f"Attention: window is {self.window}, expected at most {MOST_POSITIONS}",
            )
        for name, value in (("softcap", self.softcap), ("scale", self.scale)):
            check(
                value is None or (math.isfinite(value) and value > 0),
                f"Attention: {name} is {value!r}, expected a number above 0",
            )

    @property
    def q_size(self) -> int:
        """Components of all query heads."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Components of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        if isinstance(self.qkv, FusedQKV):
            rows = self.q_size + 2 * self.kv_size
            yield from within("qkv.proj", self.qkv.proj.tensors(rows, hidden))
        else:
            yield from within("qkv.q", self.qkv.q.tensors(self.q_size, hidden))
            yield from within("qkv.k", self.qkv.k.tensors(self.kv_size, hidden))
            yield from within("qkv.v", self.qkv.v.tensors(self.kv_size, hidden))
        if self.rope is not None:
            yield from within("rope", self.rope.tensors())
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if norm is not None:
                yield from within(name, norm.tensors(self.head_dim))
        yield from within("out", self.out.tensors(hidden, self.q_size))
