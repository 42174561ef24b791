"""Qwen3 in NumPy and float64, from its formulas: what the plugin is compared with. Knows nothing of polyhead."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden.npz"
METADATA = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "feed_forward_length": 56,
    "attention.head_count": 6,
    "attention.head_count_kv": 2,
    "attention.key_length": 8,  # a head's size by itself: 6 · 8 is not 32
    "attention.value_length": 8,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "rope.freq_base": 1000.0,
}
VOCAB = 67
IDS = (5, 17, 2, 60, 33, 33, 9, 61, 4, 12, 66, 0, 41)


def logits(metadata: Mapping[str, Any], weights: Mapping[str, np.ndarray], ids: Sequence[int]) -> np.ndarray:
    """float64 [n, vocabulary] after each of n ids."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    heads, kv_heads = metadata["attention.head_count"], metadata["attention.head_count_kv"]
    size, eps = metadata["attention.key_length"], metadata["attention.layer_norm_rms_epsilon"]
    n = len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[name]

    # Component i of a head turns with component i + size/2, by position · theta^(-2i/size).
    angles = np.outer(np.arange(n), metadata["rope.freq_base"] ** (-np.arange(0, size, 2) / size))
    turns = np.exp(1j * angles)[:, None, :]

    def rotate(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x = w["token_embd.weight"][list(ids)]
    for block in range(metadata["block_count"]):
        name = f"blk.{block}.{{}}.weight".format
        h = norm(x, name("attn_norm"))
        q = rotate(norm((h @ w[name("attn_q")].T).reshape(n, heads, size), name("attn_q_norm")))
        k = rotate(norm((h @ w[name("attn_k")].T).reshape(n, kv_heads, size), name("attn_k_norm")))
        v = (h @ w[name("attn_v")].T).reshape(n, kv_heads, size)
        k, v = (np.repeat(array, heads // kv_heads, axis=1) for array in (k, v))
        scores = np.einsum("ihc,jhc->hij", q, k) / np.sqrt(size)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf  # no look at later tokens
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhc->ihc", shares / shares.sum(-1, keepdims=True), v)
        x = x + mixed.reshape(n, heads * size) @ w[name("attn_output")].T
        h = norm(x, name("ffn_norm"))
        gate, up = h @ w[name("ffn_gate")].T, h @ w[name("ffn_up")].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[name("ffn_down")].T
    head = w.get("output.weight", w["token_embd.weight"])
    return norm(x, "output_norm.weight") @ head.T


def golden_weights() -> dict[str, np.ndarray]:
    """The weights golden.npz was made with: the same float32 on every machine."""
    m = METADATA
    hidden, ffn, size = m["embedding_length"], m["feed_forward_length"], m["attention.key_length"]
    q, kv = m["attention.head_count"] * size, m["attention.head_count_kv"] * size

    def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "token_embd", (VOCAB, hidden)
        for block in range(m["block_count"]):
            for name, shape in {
                "attn_norm": (hidden,),
                "attn_q": (q, hidden),
                "attn_k": (kv, hidden),
                "attn_v": (kv, hidden),
                "attn_q_norm": (size,),
                "attn_k_norm": (size,),
                "attn_output": (hidden, q),
                "ffn_norm": (hidden,),
                "ffn_gate": (ffn, hidden),
                "ffn_up": (ffn, hidden),
                "ffn_down": (hidden, ffn),
            }.items():
                yield f"blk.{block}.{name}", shape
        yield "output_norm", (hidden,)
        yield "output", (VOCAB, hidden)

    return {f"{name}.weight": random(name, shape) for name, shape in shapes()}


def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers: around 1 for a norm; for a matrix of a size that keeps activations where they are."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = (raw >> np.uint64(40)).astype(np.float64).reshape(shape) / 2**23 - 1.0
    values = 1.0 + 0.5 * uniform if len(shape) == 1 else uniform * 2.5 / np.sqrt(shape[1])
    return values.astype(np.float32)
