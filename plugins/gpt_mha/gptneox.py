"""GPT-NeoX (Pythia): partial rotary embedding, LayerNorm with bias, parallel residual, GELU in its erf form."""

from __future__ import annotations

from polyhead.arch import (
    MLP,
    Attention,
    Block,
    Decoder,
    Embedding,
    FusedQKV,
    LayerNorm,
    Linear,
    Metadata,
    read_rope,
)
from polyhead.errors import ConfigError


class GPTNeoX:
    """``general.architecture`` gptneox."""

    name = "gpt_mha"
    gguf_names = ("gptneox",)
    api_version = 1

    def decoder(self, meta: Metadata) -> Decoder:
        meta.require(attention__causal=True)
        meta.ignore("vocab_size")  # the embedding's rows say it, padding included
        head = meta.optional("output.weight")
        return Decoder(
            hidden=meta.get(int, "embedding_length", minimum=1),
            vocab=meta.vocab(),
            context=meta.context(),
            tokens=Embedding("token_embd.weight"),
            blocks=tuple(self.block(meta, index) for index in range(meta.layers())),
            final_norm=self._norm(meta, "output_norm"),
            head=Linear(head) if head else None,
        )

    def block(self, meta: Metadata, index: int) -> Block:
        hidden = meta.get(int, "embedding_length", minimum=1)
        heads = meta.layer(int, "attention.head_count", index, minimum=1)
        kv_heads = meta.layer(int, "attention.head_count_kv", index, heads)
        if kv_heads != heads:
            raise ConfigError(f"gptneox.attention.head_count_kv is {kv_heads}, expected head_count ({heads})")
        if hidden % heads:
            raise ConfigError(f"gptneox.embedding_length is {hidden}, which head_count ({heads}) does not divide")
        head_dim = hidden // heads
        prefix = f"blk.{index}"
        return Block(
            attn_norm=self._norm(meta, f"{prefix}.attn_norm"),
            attn=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                qkv=FusedQKV(_linear(meta, f"{prefix}.attn_qkv")),
                out=_linear(meta, f"{prefix}.attn_output"),
                rope=read_rope(meta, head_dim, "half"),
            ),
            mlp_norm=self._norm(meta, f"{prefix}.ffn_norm"),
            mlp=MLP(
                size=meta.layer(int, "feed_forward_length", index, minimum=1),
                up=_linear(meta, f"{prefix}.ffn_up"),
                down=_linear(meta, f"{prefix}.ffn_down"),
                activation="gelu",
            ),
            residual="parallel" if meta.get(bool, "use_parallel_residual", True) else "sequential",
        )

    @staticmethod
    def _norm(meta: Metadata, name: str) -> LayerNorm:
        return LayerNorm(f"{name}.weight", f"{name}.bias", meta.get(float, "attention.layer_norm_epsilon"))


def _linear(meta: Metadata, name: str) -> Linear:
    return Linear(f"{name}.weight", meta.optional(f"{name}.bias"))
