"""Real models' shapes and the types their files mix, so that speed can be measured without a file.

A shape is metadata and tensor sizes, as a model file would give them; the installed plugins build the Decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

# Which tensors of a "Q4_K_M" file hold Q6_K: the head, and V and the down projection of about half of the layers,
# those at both ends and every third between (llama.cpp's rule for this mix).
_MORE_BITS = ("attn_v", "ffn_down")


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes. ``tied``: the head is the token embedding."""

    name: str
    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    tied: bool = False
    rope_theta: float = 500000.0


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-8b", "llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072),
        Shape("llama-1b", "llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, tied=True),
        Shape("smollm2-135m", "llama", 30, 576, 9, 3, 64, 1536, 49152, 8192, tied=True, rope_theta=100000.0),
        Shape("gpt2-xl", "gpt2", 48, 1600, 25, 25, 64, 6400, 50257, 1024, tied=True),
        Shape("gpt-6144", "gpt2", 8, 6144, 64, 64, 96, 24576, 50257, 2048, tied=True),
    )
}


def metadata(shape: Shape) -> dict[str, Any]:
    """The metadata a file of this shape has."""
    arch = shape.architecture
    keys: dict[str, Any] = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.hidden,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
    }
    if arch == "llama":
        keys |= {
            "attention.head_count_kv": shape.kv_heads,
            "attention.key_length": shape.head_dim,
            "attention.value_length": shape.head_dim,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": shape.rope_theta,
        }
    else:
        keys |= {"attention.layer_norm_epsilon": 1e-5}
    return {"general.architecture": arch, "general.name": shape.name} | {f"{arch}.{k}": v for k, v in keys.items()}


def tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file of this shape, in NumPy order."""
    hidden, ffn = shape.hidden, shape.ffn
    sizes: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocab, hidden)}

    def linear(name: str, out: int, inner: int) -> None:
        sizes[f"{name}.weight"] = (out, inner)
        if shape.architecture == "gpt2":
            sizes[f"{name}.bias"] = (out,)

    def norm(name: str) -> None:
        sizes[f"{name}.weight"] = (hidden,)
        if shape.architecture == "gpt2":
            sizes[f"{name}.bias"] = (hidden,)

    if shape.architecture == "gpt2":
        sizes["position_embd.weight"] = (shape.context, hidden)
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for index in range(shape.layers):
        block = f"blk.{index}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        linear(f"{block}.attn_output", hidden, q)
        linear(f"{block}.ffn_down", hidden, ffn)
        linear(f"{block}.ffn_up", ffn, hidden)
        if shape.architecture == "gpt2":
            linear(f"{block}.attn_qkv", q + 2 * kv, hidden)
        else:
            linear(f"{block}.ffn_gate", ffn, hidden)
            for part, out in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{block}.attn_{part}", out, hidden)
    norm("output_norm")
    if not shape.tied:
        sizes["output.weight"] = (shape.vocab, hidden)
    return sizes


def types(quant: str, sizes: Mapping[str, tuple[int, ...]], layers: int) -> dict[str, str]:
    """The type each tensor has in a file called ``quant``: F16, Q8_0, Q4_K_M and so on. Vectors stay F32."""
    rule = _MIXES.get(quant.upper())
    if rule is None:
        raise ConfigError(f"quantisation {quant!r} is unknown; known: {', '.join(_MIXES)}")
    tied = "output.weight" not in sizes
    chosen = {}
    for name, size in sizes.items():
        # A tied embedding is the head, and is stored as one.
        kind = rule("output.weight" if name == "token_embd.weight" and tied else name, layers)
        if len(size) == 1 or name.startswith("position_embd"):
            kind = "F32"
        elif kind.endswith("_K") and size[1] % 256:
            kind = "Q8_0" if kind == "Q6_K" else "Q5_0"  # what converters fall back to for such rows
        chosen[name] = kind
    return chosen


def _q4_k_m(name: str, layers: int) -> str:
    if name == "output.weight":
        return "Q6_K"
    if name.startswith("blk.") and name.split(".")[2] in _MORE_BITS:
        index = int(name.split(".")[1])
        if index < layers // 8 or index >= 7 * layers // 8 or (index - layers // 8) % 3 == 2:
            return "Q6_K"
    return "Q4_K"


def _same(kind: str) -> Callable[[str, int], str]:
    return lambda name, layers: kind


_MIXES: dict[str, Callable[[str, int], str]] = {
    kind: _same(kind)
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
} | {"Q4_K_M": _q4_k_m}
