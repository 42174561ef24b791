"""A stranger's plugin: Qwen3, which core does not know, from the public names alone, loaded as a package's would be."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from polyhead import Architecture, hookimpl
from polyhead.arch import (
    MLP,
    Attention,
    Block,
    Decoder,
    Embedding,
    Linear,
    Metadata,
    RMSNorm,
    SplitQKV,
    read_rope,
)
from polyhead.plugins import Registry, discover


class Qwen3:
    """Llama's shape with an RMSNorm on each head of Q and K, and head_dim of its own."""

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
            head=Linear(head) if head else None,
        )

    def block(self, meta: Metadata, index: int) -> Block:
        eps = meta.get(float, "attention.layer_norm_rms_epsilon")
        head_dim = meta.get(int, "attention.key_length")
        meta.require(attention__value_length=head_dim)
        name = f"blk.{index}.{{}}.weight".format
        return Block(
            attn_norm=RMSNorm(name("attn_norm"), eps),
            attn=Attention(
                heads=meta.get(int, "attention.head_count"),
                kv_heads=meta.get(int, "attention.head_count_kv"),
                head_dim=head_dim,
                qkv=SplitQKV(Linear(name("attn_q")), Linear(name("attn_k")), Linear(name("attn_v"))),
                out=Linear(name("attn_output")),
                rope=read_rope(meta, head_dim, "half"),
                q_norm=RMSNorm(name("attn_q_norm"), eps),
                k_norm=RMSNorm(name("attn_k_norm"), eps),
            ),
            mlp_norm=RMSNorm(name("ffn_norm"), eps),
            mlp=MLP(
                size=meta.get(int, "feed_forward_length"),
                gate=Linear(name("ffn_gate")),
                up=Linear(name("ffn_up")),
                down=Linear(name("ffn_down")),
                activation="silu",
            ),
        )


@hookimpl
def polyhead_register_architectures() -> list[Architecture]:
    return [Qwen3()]


def registry() -> Registry:
    """The plugins of polyhead itself and this one; not those of other packages, which may claim the same model."""
    mine = EntryPoint("qwen3", "qwen3_plugin", "polyhead")
    own = [
        entry for entry in entry_points(group="polyhead") if entry.dist is not None and entry.dist.name == "polyhead"
    ]
    return discover(entry_points=[*own, mine])
