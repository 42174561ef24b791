"""Qwen3: grouped KV heads, an RMSNorm on each head of Q and K before RoPE, no biases. Dense models only."""

from polyhead import Architecture, hookimpl
from polyhead.arch import MLP, Attention, Block, Decoder, Embedding, Linear, Metadata, RMSNorm, SplitQKV, read_rope


class Qwen3:
    name = "qwen3"
    gguf_names = ("qwen3",)
    api_version = 1

    def decoder(self, meta: Metadata) -> Decoder:
        head = meta.optional("output.weight")
        return Decoder(
            hidden=meta.get(int, "embedding_length"),
            vocab=meta.vocab(),
            context=meta.context(),
            tokens=Embedding("token_embd.weight"),
            blocks=tuple(self.block(meta, index) for index in range(meta.layers())),
            final_norm=RMSNorm("output_norm.weight", meta.get(float, "attention.layer_norm_rms_epsilon")),
            head=Linear(head) if head else None,  # None: tied to the token embedding
        )

    def block(self, meta: Metadata, index: int) -> Block:
        eps = meta.get(float, "attention.layer_norm_rms_epsilon")
        head_dim = meta.get(int, "attention.key_length")
        meta.require(attention__value_length=head_dim)
        t = f"blk.{index}.{{}}.weight".format
        return Block(
            attn_norm=RMSNorm(t("attn_norm"), eps),
            attn=Attention(
                heads=meta.get(int, "attention.head_count"),
                kv_heads=meta.get(int, "attention.head_count_kv"),
                head_dim=head_dim,
                qkv=SplitQKV(Linear(t("attn_q")), Linear(t("attn_k")), Linear(t("attn_v"))),
                out=Linear(t("attn_output")),
                rope=read_rope(meta, head_dim, "half"),
                q_norm=RMSNorm(t("attn_q_norm"), eps),
                k_norm=RMSNorm(t("attn_k_norm"), eps),
            ),
            mlp_norm=RMSNorm(t("ffn_norm"), eps),
            mlp=MLP(
                size=meta.get(int, "feed_forward_length"),
                gate=Linear(t("ffn_gate")),
                up=Linear(t("ffn_up")),
                down=Linear(t("ffn_down")),
                activation="silu",
            ),
        )


@hookimpl
def polyhead_register_architectures() -> list[Architecture]:
    return [Qwen3()]
