"""What GPT-2 and GPT-NeoX files share: LayerNorm with bias, one fused QKV, as many KV heads as heads."""

from __future__ import annotations

from polyhead.arch import Block, Decoder, Embedding, LayerNorm, LearnedPositions, Linear, Metadata
from polyhead.errors import ConfigError


def decoder(meta: Metadata, blocks: tuple[Block, ...], positions: LearnedPositions | None = None) -> Decoder:
    """The whole model around its blocks."""
    meta.require(attention__causal=True)
    head = meta.optional("output.weight")
    return Decoder(
        hidden=hidden(meta),
        vocab=meta.vocab(),
        context=meta.context(),
        tokens=Embedding("token_embd.weight"),
        positions=positions,
        blocks=blocks,
        final_norm=norm(meta, "output_norm"),
        head=Linear(head) if head else None,
    )


def hidden(meta: Metadata) -> int:
    """The width of the residual stream."""
    return meta.get(int, "embedding_length", minimum=1)


def heads_and_dim(meta: Metadata, index: int) -> tuple[int, int]:
    """Heads of layer ``index`` and their size. Raises ConfigError where heads do not divide the width evenly."""
    heads = meta.layer(int, "attention.head_count", index, minimum=1)
    kv_heads = meta.layer(int, "attention.head_count_kv", index, heads)
    if kv_heads != heads:
        raise ConfigError(f"{meta.architecture}.attention.head_count_kv is {kv_heads}, expected head_count ({heads})")
    if hidden(meta) % heads:
        raise ConfigError(
            f"{meta.architecture}.embedding_length is {hidden(meta)}, which head_count ({heads}) does not divide"
        )
    return heads, hidden(meta) // heads


def norm(meta: Metadata, name: str) -> LayerNorm:
    """The LayerNorm of these tensors."""
    return LayerNorm(f"{name}.weight", f"{name}.bias", meta.get(float, "attention.layer_norm_epsilon"))
