"""The architectures in NumPy and float64, from their formulas, one row and one expert at a time.

What the plugin is compared with. Knows nothing of polyhead.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOLDENS = Path(__file__).parent / "goldens.npz"
IDS = (5, 17, 2, 60, 33, 33, 9, 61, 4, 12, 66, 0, 41)
VOCAB = 67
_COMMON = {
    "block_count": 2,
    "context_length": 64,
    "embedding_length": 32,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1000.0,
}
METADATA: dict[str, dict[str, Any]] = {
    "llama": {
        **_COMMON,
        "feed_forward_length": 40,
        "rope.dimension_count": 8,
        "expert_count": 5,
        "expert_used_count": 2,
    },
    "qwen2moe": {
        **_COMMON,
        "feed_forward_length": 72,
        "expert_count": 6,
        "expert_used_count": 3,
        "expert_feed_forward_length": 24,
        "expert_shared_feed_forward_length": 56,
    },
    "qwen3moe": {
        **_COMMON,
        "feed_forward_length": 72,
        "attention.key_length": 10,  # a head's size by itself: 4 · 10 is not 32
        "attention.value_length": 10,
        "expert_count": 7,
        "expert_used_count": 4,
        "expert_feed_forward_length": 24,
    },
}


def logits(
    architecture: str, metadata: Mapping[str, Any], weights: Mapping[str, np.ndarray], ids: Sequence[int]
) -> np.ndarray:
    """float64 [n, vocabulary] after each of n ids."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    heads, eps = metadata["attention.head_count"], metadata["attention.layer_norm_rms_epsilon"]
    kv_heads = metadata.get("attention.head_count_kv", heads)
    size = metadata.get("attention.key_length", metadata["embedding_length"] // heads)
    n = len(ids)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[name]

    angles = np.outer(np.arange(n), metadata.get("rope.freq_base", 10000.0) ** (-np.arange(0, size, 2) / size))
    turns = np.exp(1j * angles)[:, None, :]

    def rotate(x: np.ndarray) -> np.ndarray:
        if architecture == "llama":  # pairs lie side by side
            pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turns
            return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)
        pairs = (x[..., : size // 2] + 1j * x[..., size // 2 :]) * turns
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x = w["token_embd.weight"][list(ids)]
    for block in range(metadata["block_count"]):
        prefix = f"blk.{block}."

        def project(h: np.ndarray, name: str, prefix: str = prefix) -> np.ndarray:
            return h @ w[f"{prefix}{name}.weight"].T + w.get(f"{prefix}{name}.bias", 0.0)

        h = norm(x, f"{prefix}attn_norm.weight")
        q, k = project(h, "attn_q").reshape(n, heads, size), project(h, "attn_k").reshape(n, kv_heads, size)
        if architecture == "qwen3moe":
            q, k = norm(q, f"{prefix}attn_q_norm.weight"), norm(k, f"{prefix}attn_k_norm.weight")
        v = project(h, "attn_v").reshape(n, kv_heads, size)
        k, v = (np.repeat(array, heads // kv_heads, axis=1) for array in (rotate(k), v))
        scores = np.einsum("ihc,jhc->hij", rotate(q), k) / np.sqrt(size)
        scores[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf  # no look at later tokens
        window = metadata.get("attention.sliding_window", 0)
        if window:
            scores[:, np.tril(np.ones((n, n), bool), -window)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhc->ihc", shares / shares.sum(-1, keepdims=True), v)
        x = x + project(mixed.reshape(n, heads * size), "attn_output")
        h = norm(x, f"{prefix}ffn_norm.weight")
        x = x + np.array([mixture(architecture, metadata, w, prefix, row) for row in h])
    head = w.get("output.weight", w["token_embd.weight"])
    return norm(x, "output_norm.weight") @ head.T


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1.0 + np.exp(-x))


def mixture(
    architecture: str, metadata: Mapping[str, Any], w: Mapping[str, np.ndarray], prefix: str, row: np.ndarray
) -> np.ndarray:
    """What the experts make of one row."""
    scores = w[f"{prefix}ffn_gate_inp.weight"] @ row
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    best = np.argsort(-shares, kind="stable")[: metadata["expert_used_count"]]
    if metadata.get("expert_weights_norm", architecture != "qwen2moe"):
        shares = shares / shares[best].sum()
    scale = metadata.get("expert_weights_scale", 1.0) or 1.0
    out = np.zeros_like(row)
    for e in best:
        gate, up, down = (w[f"{prefix}ffn_{name}_exps.weight"][e] for name in ("gate", "up", "down"))
        out += scale * shares[e] * (down @ (silu(gate @ row) * (up @ row)))
    if architecture == "qwen2moe":
        gate, up, down = (w[f"{prefix}ffn_{name}_shexp.weight"] for name in ("gate", "up", "down"))
        share = 1.0 / (1.0 + np.exp(-(w[f"{prefix}ffn_gate_inp_shexp.weight"].reshape(-1) @ row)))
        out += share * (down @ (silu(gate @ row) * (up @ row)))
    return out


def golden_weights(architecture: str) -> dict[str, np.ndarray]:
    """The weights that the goldens were made with: the same float32 on every machine."""
    return {name: random(f"{architecture} {name}", shape) for name, shape in shapes(architecture)}


def shapes(architecture: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of a tiny model, rows first."""
    m = METADATA[architecture]
    hidden, heads, experts = m["embedding_length"], m["attention.head_count"], m["expert_count"]
    size = m.get("attention.key_length", hidden // heads)
    q, kv, ffn = heads * size, m["attention.head_count_kv"] * size, m.get("expert_feed_forward_length", 0)
    ffn = ffn or m["feed_forward_length"]
    yield "token_embd.weight", (VOCAB, hidden)
    for block in range(m["block_count"]):
        tensors: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (q, hidden),
            "attn_k.weight": (kv, hidden),
            "attn_v.weight": (kv, hidden),
            "attn_output.weight": (hidden, q),
            "ffn_norm.weight": (hidden,),
            "ffn_gate_inp.weight": (experts, hidden),
            "ffn_gate_exps.weight": (experts, ffn, hidden),
            "ffn_up_exps.weight": (experts, ffn, hidden),
            "ffn_down_exps.weight": (experts, hidden, ffn),
        }
        if architecture == "qwen2moe":
            shared = m["expert_shared_feed_forward_length"]
            tensors |= {
                "attn_q.bias": (q,),
                "attn_k.bias": (kv,),
                "attn_v.bias": (kv,),
                "ffn_gate_inp_shexp.weight": (hidden,),
                "ffn_gate_shexp.weight": (shared, hidden),
                "ffn_up_shexp.weight": (shared, hidden),
                "ffn_down_shexp.weight": (hidden, shared),
            }
        if architecture == "qwen3moe":
            tensors |= {"attn_q_norm.weight": (size,), "attn_k_norm.weight": (size,)}
        for name, shape in tensors.items():
            yield f"blk.{block}.{name}", shape
    yield "output_norm.weight", (hidden,)
    yield "output.weight", (VOCAB, hidden)


def random(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers: around 1 for a norm; for a matrix of a size that keeps activations where they are."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = (raw >> np.uint64(40)).astype(np.float64).reshape(shape) / 2**23 - 1.0
    values = 1.0 + 0.5 * uniform if name.endswith("norm.weight") else uniform * 2.5 / np.sqrt(shape[-1])
    return values.astype(np.float32)
