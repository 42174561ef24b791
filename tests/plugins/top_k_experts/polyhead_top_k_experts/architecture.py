"""The architecture ``top-k-experts``: multi-query attention and, in place of an MLP, a mixture of experts."""

from __future__ import annotations

from polyhead.arch import Attention, Block, Decoder, Embedding, Linear, Metadata, RMSNorm, SplitQKV, read_rope

from .layer import TopKExperts


class TopKExpertsArchitecture:
    """``general.architecture`` top-k-experts."""

    name = "top_k_experts"
    gguf_names = ("top-k-experts",)
    api_version = 1

    def decoder(self, meta: Metadata) -> Decoder:
        return Decoder(
            hidden=meta.get(int, "embedding_length", minimum=1),
            vocab=meta.vocab(),
            context=meta.context(),
            tokens=Embedding("token_embd.weight"),
            blocks=tuple(self.block(meta, index) for index in range(meta.layers())),
            final_norm=self._norm(meta, "output_norm.weight"),
            head=Linear("output.weight"),
        )

    def block(self, meta: Metadata, index: int) -> Block:
        name = f"blk.{index}.{{}}.weight".format
        head_dim = meta.get(int, "attention.key_length", minimum=2)
        return Block(
            attn_norm=self._norm(meta, name("attn_norm")),
            attn=Attention(
                heads=meta.get(int, "attention.head_count", minimum=1),
                kv_heads=1,
                head_dim=head_dim,
                qkv=SplitQKV(Linear(name("attn_q")), Linear(name("attn_k")), Linear(name("attn_v"))),
                out=Linear(name("attn_output")),
                rope=read_rope(meta, head_dim, "half"),
            ),
            mlp_norm=self._norm(meta, name("ffn_norm")),
            mlp=TopKExperts(
                experts=meta.get(int, "expert_count", minimum=1, maximum=1024),
                used=meta.get(int, "expert_used_count", minimum=1),
                size=meta.get(int, "expert_feed_forward_length", minimum=1),
                router=name("ffn_gate_inp"),
                up=name("ffn_up_exps"),
                down=name("ffn_down_exps"),
            ),
        )

    @staticmethod
    def _norm(meta: Metadata, name: str) -> RMSNorm:
        return RMSNorm(name, meta.get(float, "attention.layer_norm_rms_epsilon"))
