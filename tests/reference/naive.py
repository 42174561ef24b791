"""A decoder computed the slow, obvious way: float64, one sequence, one query at a time, no cache, no batching.

Written from the formulas in the vocabulary's docstrings and sharing no code with a runtime, so that it can judge one
where no outside reference exists (soft caps, scales, post-norms, odd combinations).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from polyhead.arch import (
    MLP,
    Attention,
    Block,
    Decoder,
    FusedGateUp,
    FusedQKV,
    LayerNorm,
    Linear,
    LinearScaling,
    Norm,
    Rope,
    YarnScaling,
)

F64 = NDArray[np.float64]


def logits(decoder: Decoder, weights: Mapping[str, NDArray], ids: Sequence[int]) -> F64:
    """float64 [n, vocab]."""
    w = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    rows = []
    for position, token in enumerate(ids):
        x = w[decoder.tokens.weight][token] * decoder.embedding_scale
        if decoder.positions:
            x = x + w[decoder.positions.weight][position]
        rows.append(_norm(decoder.embedding_norm, x, w))
    x = np.array(rows)
    for block in decoder.blocks:
        x = _block(block, x, w)
    out = []
    for row in x:
        row = _norm(decoder.final_norm, row, w)
        y = _linear(decoder.head, row, w) if decoder.head else w[decoder.tokens.weight] @ row
        y = y * decoder.logit_scale
        out.append(_cap(y, decoder.logit_softcap))
    return np.array(out)


def _block(block: Block, x: F64, w: Mapping[str, F64]) -> F64:
    def attend(rows: F64) -> F64:
        normed = np.array([_norm(block.attn_norm, row, w) for row in rows])
        mixed = _attention(block.attn, normed, w)
        return np.array([_norm(block.post_attn_norm, row, w) for row in mixed]) * block.residual_scale

    def mlp(rows: F64) -> F64:
        shared = block.residual == "parallel" and block.mlp_norm is None
        norm = block.attn_norm if shared else block.mlp_norm
        out = [_norm(block.post_mlp_norm, _mlp(block.mlp, _norm(norm, row, w), w), w) for row in rows]
        return np.array(out) * block.residual_scale

    if block.residual == "parallel":
        return x + attend(x) + mlp(x)
    x = x + attend(x)
    return x + mlp(x)


def _attention(spec: Attention, x: F64, w: Mapping[str, F64]) -> F64:
    group = spec.heads // spec.kv_heads
    keys: list[list[F64]] = []
    values: list[list[F64]] = []
    out = []
    for position, row in enumerate(x):
        q, k, v = _qkv(spec, row, w)
        q = [_rope(spec.rope, _norm(spec.q_norm, head, w), position, w) for head in q]
        k = [_rope(spec.rope, _norm(spec.k_norm, head, w), position, w) for head in k]
        keys.append(k)
        values.append(v)
        mixed = []
        for head in range(spec.heads):
            first = 0 if spec.window is None else max(0, position - spec.window + 1)
            scale = spec.scale if spec.scale is not None else 1.0 / math.sqrt(spec.head_dim)
            scores = np.array([q[head] @ keys[at][head // group] * scale for at in range(first, position + 1)])
            scores = _cap(scores, spec.softcap)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            mixed.append(sum(s * values[first + i][head // group] for i, s in enumerate(shares)))
        out.append(_linear(spec.out, np.concatenate(mixed), w))
    return np.array(out)


def _qkv(spec: Attention, x: F64, w: Mapping[str, F64]) -> tuple[list[F64], list[F64], list[F64]]:
    q_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    if isinstance(spec.qkv, FusedQKV):
        both = _linear(spec.qkv.proj, x, w)
    else:
        both = np.concatenate([_linear(part, x, w) for part in (spec.qkv.q, spec.qkv.k, spec.qkv.v)])
    q, k, v = both[:q_size], both[q_size : q_size + kv_size], both[q_size + kv_size :]
    return tuple(list(part.reshape(-1, spec.head_dim)) for part in (q, k, v))  # type: ignore[return-value]


def _rope(rope: Rope | None, x: F64, position: int, w: Mapping[str, F64]) -> F64:
    if rope is None:
        return x
    out = x.copy()
    for pair in range(rope.dim // 2):
        frequency, magnitude = _frequency(rope, pair)
        if rope.factors:
            # Factors apply before a scaling, which is linear in the frequency or ramps by the pair's index alone.
            frequency /= w[rope.factors][pair]
        a, b = (2 * pair, 2 * pair + 1) if rope.pairing == "interleaved" else (pair, pair + rope.dim // 2)
        cos, sin = math.cos(position * frequency) * magnitude, math.sin(position * frequency) * magnitude
        out[a], out[b] = x[a] * cos - x[b] * sin, x[a] * sin + x[b] * cos
    return out


def _frequency(rope: Rope, pair: int) -> tuple[float, float]:
    frequency = 1.0 / rope.theta ** (2 * pair / rope.dim)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return frequency / scaling.factor, 1.0
    if isinstance(scaling, YarnScaling):
        period = 2 * math.pi
        bounds = [
            rope.dim * math.log(scaling.original_context / (beta * period)) / (2 * math.log(rope.theta))
            for beta in (scaling.beta_fast, scaling.beta_slow)
        ]
        low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), rope.dim - 1)
        ramp = min(max((pair - low) / max(high - low, 0.001), 0.0), 1.0)
        magnitude = scaling.magnitude or 0.1 * math.log(scaling.factor) + 1.0
        return frequency * (1 - ramp) + frequency / scaling.factor * ramp, magnitude
    return frequency, 1.0


def _mlp(mlp: MLP, x: F64, w: Mapping[str, F64]) -> F64:
    act = _ACTIVATIONS[mlp.activation]
    if isinstance(mlp.up, FusedGateUp):
        both = _linear(mlp.up.proj, x, w)
        inner = act(both[: mlp.size]) * both[mlp.size :]
    elif mlp.gate is not None:
        inner = act(_linear(mlp.gate, x, w)) * _linear(mlp.up, x, w)
    else:
        inner = act(_linear(mlp.up, x, w))
    return _linear(mlp.down, inner, w)


def _linear(linear: Linear, x: F64, w: Mapping[str, F64]) -> F64:
    y = w[linear.weight] @ x
    return y + w[linear.bias] if linear.bias else y


def _norm(norm: Norm | None, x: F64, w: Mapping[str, F64]) -> F64:
    if norm is None:
        return x
    if isinstance(norm, LayerNorm):
        y = (x - x.mean()) / math.sqrt(x.var() + norm.eps) * w[norm.weight]
        return y + w[norm.bias] if norm.bias else y
    return x / math.sqrt((x * x).mean() + norm.eps) * w[norm.weight]


def _cap(x: F64, cap: float | None) -> F64:
    return x if cap is None else cap * np.tanh(x / cap)


_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: np.array([0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_quick": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu_squared": lambda x: np.maximum(x, 0) ** 2,
}
