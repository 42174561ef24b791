"""A hypothesis strategy for Decoders: every field of the vocabulary in every combination, at tiny odd sizes."""

from __future__ import annotations

from hypothesis import strategies as st
from polyhead.arch import (
    ACTIVATIONS,
    MLP,
    Attention,
    Block,
    Decoder,
    Embedding,
    FusedGateUp,
    FusedQKV,
    LayerNorm,
    LearnedPositions,
    Linear,
    LinearScaling,
    RMSNorm,
    Rope,
    SplitQKV,
    YarnScaling,
)

CONTEXT = 24


@st.composite
def decoders(draw: st.DrawFn) -> Decoder:
    hidden = draw(st.integers(3, 20))
    bias = draw(st.booleans())
    norm_kind = draw(st.sampled_from(["rms", "layer", "layer without bias"]))

    def linear(name: str) -> Linear:
        return Linear(f"{name}.weight", f"{name}.bias" if bias else None)

    def norm(name: str) -> RMSNorm | LayerNorm:
        if norm_kind == "rms":
            return RMSNorm(f"{name}.weight", 1e-5)
        return LayerNorm(f"{name}.weight", f"{name}.bias" if norm_kind == "layer" else None, 1e-5)

    def maybe(value: object) -> object:
        return value if draw(st.booleans()) else None

    def block(index: int) -> Block:
        name = f"blk.{index}.{{}}".format
        kv_heads = draw(st.integers(1, 3))
        head_dim = 2 * draw(st.integers(1, 5))
        scaling = draw(
            st.sampled_from([None, LinearScaling(2.5), YarnScaling(4.0, 32), YarnScaling(2.0, 16, 8.0, 0.5, 1.3)])
        )
        pairing = draw(st.sampled_from(["interleaved", "half"]))
        rope = Rope(100.0, 2 * draw(st.integers(1, head_dim // 2)), pairing, scaling, maybe(name("factors")))
        size = draw(st.integers(2, 17))
        gate = draw(st.sampled_from(["none", "split", "fused"]))
        residual = draw(st.sampled_from(["sequential", "parallel"]))
        return Block(
            attn_norm=maybe(norm(name("attn_norm"))),
            attn=Attention(
                heads=kv_heads * draw(st.integers(1, 3)),
                kv_heads=kv_heads,
                head_dim=head_dim,
                qkv=draw(
                    st.sampled_from(
                        [
                            SplitQKV(linear(name("q")), linear(name("k")), linear(name("v"))),
                            FusedQKV(linear(name("qkv"))),
                        ]
                    )
                ),
                out=linear(name("out")),
                rope=maybe(rope),
                q_norm=maybe(norm(name("q_norm"))),
                k_norm=maybe(norm(name("k_norm"))),
                window=draw(st.sampled_from([None, 1, 3, 7])),
                softcap=draw(st.sampled_from([None, 2.0])),
                scale=draw(st.sampled_from([None, 0.4])),
            ),
            mlp_norm=maybe(norm(name("mlp_norm"))),
            mlp=MLP(
                size=size,
                up=FusedGateUp(linear(name("gate_up"))) if gate == "fused" else linear(name("up")),
                gate=linear(name("gate")) if gate == "split" else None,
                down=linear(name("down")),
                activation=draw(st.sampled_from(ACTIVATIONS)),
            ),
            residual=residual,
            post_attn_norm=maybe(norm(name("post_attn"))),
            post_mlp_norm=maybe(norm(name("post_mlp"))),
            residual_scale=draw(st.sampled_from([1.0, 0.5])),
        )

    return Decoder(
        hidden=hidden,
        vocab=draw(st.integers(2, 31)),
        context=CONTEXT,
        tokens=Embedding("tokens.weight"),
        positions=maybe(LearnedPositions("positions.weight")),
        blocks=tuple(block(index) for index in range(draw(st.integers(1, 2)))),
        final_norm=norm("final_norm"),
        head=maybe(linear("head")),
        embedding_scale=draw(st.sampled_from([1.0, 3.0])),
        embedding_norm=maybe(norm("embedding_norm")),
        logit_scale=draw(st.sampled_from([1.0, 0.25])),
        logit_softcap=draw(st.sampled_from([None, 5.0])),
    )
