"""GPT-NeoX (Pythia): partial rotary embedding, LayerNorm with bias, parallel residual, GELU in its erf form."""

from __future__ import annotations

from polyhead.arch import MLP, Attention, Block, Decoder, FusedQKV, Linear, Metadata, read_rope

from . import parts


class GPTNeoX:
    """``general.architecture`` gptneox."""

    name = "gpt_mha"
    gguf_names = ("gptneox",)
    api_version = 1

    def decoder(self, meta: Metadata) -> Decoder:
        return parts.decoder(meta, tuple(self.block(meta, index) for index in range(meta.layers())))

    def block(self, meta: Metadata, index: int) -> Block:
        heads, head_dim = parts.heads_and_dim(meta, index)
        prefix = f"blk.{index}"
        return Block(
            attn_norm=parts.norm(meta, f"{prefix}.attn_norm"),
            attn=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                qkv=FusedQKV(_linear(meta, f"{prefix}.attn_qkv")),
                out=_linear(meta, f"{prefix}.attn_output"),
                rope=read_rope(meta, head_dim, "half"),
            ),
            mlp_norm=parts.norm(meta, f"{prefix}.ffn_norm"),
            mlp=MLP(
                size=meta.layer(int, "feed_forward_length", index, minimum=1),
                up=_linear(meta, f"{prefix}.ffn_up"),
                down=_linear(meta, f"{prefix}.ffn_down"),
                activation="gelu",
            ),
            residual="parallel" if meta.get(bool, "use_parallel_residual", True) else "sequential",
        )


def _linear(meta: Metadata, name: str) -> Linear:
    return Linear(f"{name}.weight", meta.optional(f"{name}.bias"))
