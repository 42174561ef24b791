"""GPT-2: learned positions, LayerNorm with bias, one fused QKV matrix, GELU in its tanh form."""

from __future__ import annotations

from polyhead.arch import MLP, Attention, Block, Decoder, FusedQKV, LearnedPositions, Linear, Metadata

from . import parts


class GPT2:
    """``general.architecture`` gpt2."""

    name = "gpt_mha"
    gguf_names = ("gpt2",)
    api_version = 1

    def decoder(self, meta: Metadata) -> Decoder:
        blocks = tuple(self.block(meta, index) for index in range(meta.layers()))
        return parts.decoder(meta, blocks, LearnedPositions("position_embd.weight"))

    def block(self, meta: Metadata, index: int) -> Block:
        heads, head_dim = parts.heads_and_dim(meta, index)
        prefix = f"blk.{index}"
        return Block(
            attn_norm=parts.norm(meta, f"{prefix}.attn_norm"),
            attn=Attention(
                heads=heads,
                kv_heads=heads,
                head_dim=head_dim,
                qkv=FusedQKV(_linear(f"{prefix}.attn_qkv")),
                out=_linear(f"{prefix}.attn_output"),
            ),
            mlp_norm=parts.norm(meta, f"{prefix}.ffn_norm"),
            mlp=MLP(
                size=meta.layer(int, "feed_forward_length", index, minimum=1),
                up=_linear(f"{prefix}.ffn_up"),
                down=_linear(f"{prefix}.ffn_down"),
                activation="gelu_tanh",
            ),
        )


def _linear(name: str) -> Linear:
    return Linear(f"{name}.weight", f"{name}.bias")
