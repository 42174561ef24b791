"""Llama and its relatives: RMSNorm, RoPE, grouped KV heads, gated SiLU.

Qwen2 differs by its QKV biases and by pairing RoPE by halves.
"""

from __future__ import annotations

from polyhead.arch import (
    MLP,
    Attention,
    Block,
    Decoder,
    Embedding,
    Linear,
    Metadata,
    Pairing,
    RMSNorm,
    SplitQKV,
    read_rope,
)
from polyhead.errors import ConfigError

# GGUF permutes the Q and K rows of llama files so that pairs lie side by side; qwen2 files keep halves.
PAIRING: dict[str, Pairing] = {"llama": "interleaved", "qwen2": "half"}


class LlamaGQA:
    """``general.architecture`` llama and qwen2."""

    name = "llama_gqa"
    gguf_names = tuple(PAIRING)
    api_version = 1

    def accepts(self, meta: Metadata) -> bool:
        """Files with experts carry the same name; a plugin for them may be installed."""
        return meta.get(int, "expert_count", 0) == 0

    def decoder(self, meta: Metadata) -> Decoder:
        meta.require(
            attention__causal=True,
            attention__clamp_kqv=0.0,
            attention__max_alibi_bias=0.0,
            expert_count=0,
            expert_used_count=0,
            use_parallel_residual=False,
            tensor_data_layout="Meta AI original pth",
        )
        head = meta.optional("output.weight")
        return Decoder(
            hidden=meta.get(int, "embedding_length", minimum=1),
            vocab=meta.vocab(),
            context=meta.context(),
            tokens=Embedding("token_embd.weight"),
            blocks=tuple(self.block(meta, index) for index in range(meta.layers())),
            final_norm=_norm(meta, "output_norm"),
            head=Linear(head, meta.optional("output.bias")) if head else None,
            unused=("blk.*.attn_rot_embd",),  # inverse frequencies in old files; computed here
        )

    def block(self, meta: Metadata, index: int) -> Block:
        hidden = meta.get(int, "embedding_length", minimum=1)
        heads = meta.layer(int, "attention.head_count", index, minimum=1)
        prefix = f"blk.{index}"
        head_dim = _head_dim(meta, hidden, heads)
        window = meta.layer(int, "attention.sliding_window", index, 0, minimum=0, maximum=2**31 - 1)
        return Block(
            attn_norm=_norm(meta, f"{prefix}.attn_norm"),
            attn=Attention(
                heads=heads,
                kv_heads=meta.layer(int, "attention.head_count_kv", index, heads, minimum=1),
                head_dim=head_dim,
                qkv=SplitQKV(
                    _linear(meta, f"{prefix}.attn_q"),
                    _linear(meta, f"{prefix}.attn_k"),
                    _linear(meta, f"{prefix}.attn_v"),
                ),
                out=_linear(meta, f"{prefix}.attn_output"),
                rope=read_rope(meta, head_dim, PAIRING[meta.architecture]),
                window=window or None,
            ),
            mlp_norm=_norm(meta, f"{prefix}.ffn_norm"),
            mlp=MLP(
                size=meta.layer(int, "feed_forward_length", index, minimum=1),
                gate=_linear(meta, f"{prefix}.ffn_gate"),
                up=_linear(meta, f"{prefix}.ffn_up"),
                down=_linear(meta, f"{prefix}.ffn_down"),
                activation="silu",
            ),
        )


def _head_dim(meta: Metadata, hidden: int, heads: int) -> int:
    if not meta.has("attention.key_length") and hidden % heads:
        raise ConfigError(
            f"{meta.architecture}.embedding_length is {hidden}, which head_count ({heads}) does not divide, "
            "and the file has no attention.key_length"
        )
    head_dim = meta.get(int, "attention.key_length", hidden // heads, minimum=1)
    value_dim = meta.get(int, "attention.value_length", head_dim)
    if value_dim != head_dim:
        raise ConfigError(
            f"{meta.architecture}.attention.value_length is {value_dim}, expected key_length ({head_dim}): "
            "values of another size than keys are not supported"
        )
    return head_dim


def _norm(meta: Metadata, name: str) -> RMSNorm:
    return RMSNorm(f"{name}.weight", meta.get(float, "attention.layer_norm_rms_epsilon"))


def _linear(meta: Metadata, name: str) -> Linear:
    return Linear(f"{name}.weight", meta.optional(f"{name}.bias"))
