"""Phi-3 in NumPy and float64, from its formulas: what the plugin is compared with. Knows nothing of polyhead."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden.npz"
VOCAB = 67
IDS = (5, 17, 2, 60, 33, 33, 9, 61, 4, 12, 66, 0, 41, 8, 8, 30, 1)

# Phi-3-mini-4k: as many K/V heads as heads, and a window, here shorter than the ids above.
MINI = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 4,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.sliding_window": 6,
    "rope.dimension_count": 8,
    "rope.freq_base": 1000.0,
    "rope.scaling.original_context_length": 64,
}
# Phi-4: fewer K/V heads, no window.
PHI4 = MINI | {"attention.head_count_kv": 2, "attention.sliding_window": 0}
# Phi-4-mini: three quarters of each head rotated, LongRoPE, the head tied to the token embedding.
PHI4_MINI = MINI | {
    "embedding_length": 48,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.sliding_window": 1000,
    "rope.dimension_count": 6,
    "rope.scaling.original_context_length": 20,
    "rope.scaling.attn_factor": float(np.sqrt(1 + np.log(64 / 20) / np.log(20))),
}
FACTORS = {"short": (1.0, 1.5, 2.75), "long": (1.0, 3.0, 7.5)}
CASES = {"mini": MINI, "phi4": PHI4, "phi4-mini": PHI4_MINI}


def logits(metadata: Mapping[str, Any], weights: Mapping[str, np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """float64 [n, vocabulary] after each of n ids; n is at most the original context."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    hidden, n = metadata["embedding_length"], len(ids)
    heads, kv_heads = metadata["attention.head_count"], metadata["attention.head_count_kv"]
    size, turned = hidden // heads, metadata["rope.dimension_count"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        eps = metadata["attention.layer_norm_rms_epsilon"]
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[name]

    # Component i turns with component i + turned/2, by position · theta^(-2i/turned) / factor; the rest stays.
    frequencies = metadata["rope.freq_base"] ** (-np.arange(0, turned, 2) / turned)
    frequencies = frequencies / w.get("rope_factors_short.weight", 1.0)
    turns = np.exp(1j * np.outer(np.arange(n), frequencies))[:, None, :]
    turns = turns * metadata.get("rope.scaling.attn_factor", 1.0)

    def rotate(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., : turned // 2] + 1j * x[..., turned // 2 : turned]) * turns
        return np.concatenate([pairs.real, pairs.imag, x[..., turned:]], axis=-1)

    distance = np.subtract.outer(np.arange(n), np.arange(n))
    hidden_keys = (distance < 0) | (distance >= (metadata["attention.sliding_window"] or n))
    x = w["token_embd.weight"][list(ids)]
    for block in range(metadata["block_count"]):
        name = f"blk.{block}.{{}}.weight".format
        qkv = norm(x, name("attn_norm")) @ w[name("attn_qkv")].T
        q, k, v = np.split(qkv, [heads * size, (heads + kv_heads) * size], axis=1)
        q = rotate(q.reshape(n, heads, size))
        k = np.repeat(rotate(k.reshape(n, kv_heads, size)), heads // kv_heads, axis=1)
        v = np.repeat(v.reshape(n, kv_heads, size), heads // kv_heads, axis=1)
        scores = np.einsum("ihc,jhc->hij", q, k) / np.sqrt(size)
        scores[:, hidden_keys] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhc->ihc", shares / shares.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(n, hidden) @ w[name("attn_output")].T
        gate, up = np.split(norm(x, name("ffn_norm")) @ w[name("ffn_up")].T, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[name("ffn_down")].T
    return norm(x, "output_norm.weight") @ w.get("output.weight", w["token_embd.weight"]).T


def golden_weights(metadata: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The weights golden.npz was made with: the same float32 on every machine."""
    hidden, ffn = metadata["embedding_length"], metadata["feed_forward_length"]
    size = hidden // metadata["attention.head_count"]

    def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "token_embd", (VOCAB, hidden)
        for block in range(metadata["block_count"]):
            yield f"blk.{block}.attn_norm", (hidden,)
            yield f"blk.{block}.attn_qkv", (hidden + 2 * metadata["attention.head_count_kv"] * size, hidden)
            yield f"blk.{block}.attn_output", (hidden, hidden)
            yield f"blk.{block}.ffn_norm", (hidden,)
            yield f"blk.{block}.ffn_up", (2 * ffn, hidden)
            yield f"blk.{block}.ffn_down", (hidden, ffn)
        yield "output_norm", (hidden,)
        if not has_factors(metadata):  # Phi-4-mini's head is its token embedding
            yield "output", (VOCAB, hidden)

    weights = {f"{name}.weight": random(name, shape) for name, shape in shapes()}
    if has_factors(metadata):
        weights |= {f"rope_factors_{name}.weight": np.array(values, np.float32) for name, values in FACTORS.items()}
    return weights


def has_factors(metadata: Mapping[str, Any]) -> bool:
    """Whether the model is made with LongRoPE."""
    return "rope.scaling.attn_factor" in metadata


def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers: around 1 for a norm; for a matrix of a size that keeps activations where they are."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = (raw >> np.uint64(40)).astype(np.float64).reshape(shape) / 2**23 - 1.0
    values = 1.0 + 0.5 * uniform if len(shape) == 1 else uniform * 2.5 / np.sqrt(shape[1])
    return values.astype(np.float32)
