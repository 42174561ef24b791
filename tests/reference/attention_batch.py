"""Sequences in a paged cache for the tests of attention on the GPU, and what float64 makes of them.

Caches are full of NaN wherever no token was written, block tables are scattered, outputs poisoned: what is read or
written beside its place shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tolerance
from polyhead.arch import Attention, FusedQKV, LayerNorm, Linear, Norm, Rope
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.kv_cache import decode_e4m3
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.ops import attention as op
from polyhead.runtime.cuda.ops.attention_plan import partial_bytes
from polyhead.runtime.cuda.ops.rope import store_kv
from polyhead.runtime.rope import tables

Put = Callable[..., Array]
Get = Callable[[Array], Any]


@dataclass(frozen=True)
class Case:
    """An attention, and how it is stored."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    dtype: str = "f16"
    kv_dtype: str = "f16"
    scale: float | None = None
    rope: Rope | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def __str__(self) -> str:
        turn = f"-{self.rope.pairing}{self.rope.dim}" if self.rope else ""
        kinds = f"{self.dtype}-{self.kv_dtype}{turn}{'-normed' if self.q_norm or self.k_norm else ''}"
        return f"{self.heads}-{self.kv_heads}x{self.dim}-b{self.block_size}-w{self.window}-{kinds}"

    def spec(self) -> Attention:
        return Attention(
            self.heads,
            self.kv_heads,
            self.dim,
            FusedQKV(Linear("a")),
            Linear("b"),
            self.rope,
            self.q_norm,
            self.k_norm,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
        )

    def limit(self) -> float:
        """Probabilities are rounded to the cache's type, or the activations' if that is fp8; so is the result."""
        return tolerance.CUDA_BLOCK * (2 if "bf16" in (self.dtype, self.kv_dtype) else 0.5)


class Batched:
    """Sequences of given (new rows, context) in a scattered cache, on the host and on the device."""

    def __init__(self, case: Case, chunks: Sequence[tuple[int, int]], put: Put, seed: int = 0, spare: int = 0) -> None:
        self.case, self.chunks, self.spec = case, chunks, case.spec()
        rng = np.random.default_rng(seed)
        size, heads, dim = case.block_size, case.kv_heads, case.dim
        width = max(-(-context // size) for _, context in chunks) + spare
        blocks = len(chunks) * width + 3
        self.tables = rng.permutation(blocks)[: len(chunks) * width].reshape(len(chunks), width).astype(np.int32)
        self.lens = np.array([context for _, context in chunks], np.int32)
        self.starts = np.concatenate([[0], np.cumsum([rows for rows, _ in chunks])]).astype(np.int32)
        k, v = (np.full((blocks, heads, size, dim), np.nan, np.float32) for _ in range(2))
        for table, context in zip(self.tables, self.lens, strict=True):
            at = np.arange(context)
            for cache in (k, v):
                cache[table[at // size], :, at % size] = rng.standard_normal((context, heads, dim))
        # In fp8 each row of the cache has a scale between 2^-13 and 1; where no token was written it is NaN.
        self.scales: Any = None
        if case.kv_dtype == "u8":
            written = np.isfinite(k[..., 0])
            k, v = (rng.integers(0, 256, k.shape).astype(np.uint8) for _ in range(2))
            for codes in (k, v):
                codes[codes & 0x7F == 0x7F] = 0  # NaN, which is never stored
            factors = [2.0 ** rng.uniform(-13, 0, written.shape) for _ in range(2)]
            factors[0] /= 64  # codes have a standard deviation of 100
            self.scales = tuple(put(np.where(written, of, np.nan).astype(np.float32)) for of in factors)
        self.k, self.v = put(k, case.kv_dtype), put(v, case.kv_dtype)
        rows = int(self.starts[-1])
        self.qkv = put(rng.standard_normal((rows, (case.heads + 2 * heads) * dim)) * 1.5, case.dtype)
        #: q as attention takes it: ``qkv`` itself, or what store_kv made of it in the last decode
        self.queries = self.qkv
        self.positions = np.concatenate([np.arange(c - n, c) for n, c in chunks]).astype(np.int32)
        self.device = {
            name: put(array)
            for name, array in (
                ("tables", self.tables),
                ("lens", self.lens),
                ("starts", self.starts),
                ("positions", self.positions),
                ("sequences", np.repeat(np.arange(len(chunks)), [n for n, _ in chunks]).astype(np.int32)),
            )
        }
        self.turn: Any = None if case.rope is None else tuple(map(put, tables(case.rope, int(self.lens.max()))))
        self.norms: list[Any] = []
        for norm in (case.q_norm, case.k_norm):
            weight, bias = (put(rng.uniform(0.5, 1.5, dim).astype(np.float32)) for _ in range(2))
            has_bias = isinstance(norm, LayerNorm) and norm.bias is not None
            self.norms.append(None if norm is None else (norm, weight, bias if has_bias else None))

    @property
    def rows(self) -> int:
        return int(self.starts[-1])

    def values(self, get: Get) -> tuple[Any, Any]:
        """What the caches stand for, float64."""
        k, v = (get(cache) for cache in (self.k, self.v))
        if self.scales is not None:
            k, v = (
                decode_e4m3(codes).astype(np.float64) * get(of)[..., None]
                for codes, of in zip((k, v), self.scales, strict=True)
            )
        return k.astype(np.float64), v.astype(np.float64)

    def expected(self, get: Get) -> Any:
        """Float64, written straightforwardly: a query at a time."""
        case, spec = self.case, self.spec
        q = get(self.queries).astype(np.float64)[:, : spec.q_size].reshape(self.rows, case.heads, case.dim)
        k, v = self.values(get)
        out = np.empty_like(q)
        group, scale = case.heads // case.kv_heads, spec.scale or 1 / math.sqrt(case.dim)
        for s, (rows, context) in enumerate(self.chunks):
            for i in range(rows):
                row, position = self.starts[s] + i, context - rows + i
                first = 0 if case.window is None else max(0, position - case.window + 1)
                at = np.arange(first, position + 1)
                block, offset = self.tables[s][at // case.block_size], at % case.block_size
                keys = np.repeat(k[block, :, offset], group, axis=1)
                scores = np.einsum("hd,khd->hk", q[row], keys) * scale
                if case.softcap is not None:
                    scores = case.softcap * np.tanh(scores / case.softcap)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                out[row] = np.einsum("hk,khd->hd", weights, np.repeat(v[block, :, offset], group, axis=1))
        return out.reshape(self.rows, -1)

    def prefill(self, ctx: Context, put: Put, poisoned: Put, get: Get) -> Any:
        """The result [rows, heads * dim], after checking that the row behind it was left alone."""
        out = poisoned((self.rows + 1, self.spec.q_size), self.case.dtype)
        work = put(op.prefill_work(self.starts, self.lens))
        d = self.device
        result = out.slice_rows(0, self.rows)
        op.attend_prefill(
            ctx, self.queries, self.k, self.v, result, d["starts"], d["lens"], d["tables"], work, self.spec,
            scales=self.scales,
        )  # fmt: skip
        found = get(out)
        assert np.isnan(found[-1]).all()
        return found[:-1]

    def decode(self, ctx: Context, put: Put, poisoned: Put, get: Get, **more: Any) -> Any:
        """As prefill, for chunks of one row, whose K and V come out of qkv.

        Checks that the caches are then, bit by bit, what store_kv makes of them, that qkv is as it was, the counters
        are zero again, and nothing was written behind the partial results.
        """
        rows, d = len(self.chunks), self.device
        self._forget_newest(ctx, get)
        before = [get(array) for array in self._stored]
        values = get(self.qkv)
        self.queries = put(values, self.case.dtype)
        norms, places = self.norms, (d["positions"], d["sequences"], d["tables"])
        store_kv(ctx, self.queries, self.spec, self.turn, norms, *places, self.k, self.v, self.scales)
        stored = [get(array) for array in self._stored]
        for array, old in zip(self._stored, before, strict=True):
            ctx.device.upload(array, old)

        out = poisoned((rows + 1, self.spec.q_size), self.case.dtype)
        size = op.scratch_bytes(self.spec, rows, ctx.device.sms, fixed=more.get("fixed_split", False))
        if "plan" in more:
            reach = self.tables.shape[1] * self.case.block_size
            size = op.counters(self.spec, rows) * more["plan"].splits(self.spec, reach) * partial_bytes(self.spec)
        scratch = poisoned(size + 256, "u8")
        counters = put(np.zeros(op.counters(self.spec, rows) + 1, np.int32))
        for _ in range(2):  # the second finds what the first left behind
            op.attend_decode(
                ctx, self.qkv, self.k, self.v, out.slice_rows(0, rows), d["lens"], d["tables"], self.spec,
                scratch.slice_rows(0, size), counters, turn=self.turn, norms=norms, positions=d["positions"],
                scales=self.scales, **more,
            )  # fmt: skip
        for array, expected in zip(self._stored, stored, strict=True):
            assert np.array_equal(get(array), expected, equal_nan=True), "the cache is not what store_kv makes of it"
        assert np.array_equal(get(self.qkv), values, equal_nan=True)
        assert not get(counters).any()
        assert (get(scratch)[size:] == 0xFF).all()
        found = get(out)
        assert np.isnan(found[-1]).all()
        return found[:-1]

    @property
    def _stored(self) -> list[Array]:
        return [self.k, self.v, *(self.scales or ())]

    def _forget_newest(self, ctx: Context, get: Get) -> None:
        """Puts NaN where the newest keys and values belong: nobody may take them from there."""
        size = self.case.block_size
        for array in self._stored:
            values = get(array)
            for table, position in zip(self.tables, self.positions, strict=True):
                if position >= 0:
                    values[table[position // size], :, position % size] = 0x7F if array.dtype == "u8" else np.nan
            ctx.device.upload(array, values)
