"""Phi-3 and Phi-4: fused QKV, fused gate and up, RoPE on all or the first part of each head, an optional window.

One plugin for multi-head (Phi-3-mini, 32/32) and grouped-query attention (Phi-3-medium and Phi-4, 40/10). Phi-3-small
and the mixtures of experts are other architectures.
"""

from __future__ import annotations

from polyhead import Architecture, hookimpl
from polyhead.arch import (
    MLP,
    Attention,
    Block,
    Decoder,
    Embedding,
    FusedGateUp,
    FusedQKV,
    Linear,
    Metadata,
    RMSNorm,
    Rope,
    YarnScaling,
)
from polyhead.errors import ConfigError, TensorError

SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"


class Phi3:
    """``general.architecture`` phi3."""

    name = "phi3"
    gguf_names = ("phi3",)
    api_version = 1

    def decoder(self, meta: Metadata) -> Decoder:
        head = meta.optional("output.weight")
        return Decoder(
            hidden=meta.get(int, "embedding_length", minimum=1),
            vocab=meta.vocab(),
            context=context(meta),
            tokens=Embedding("token_embd.weight"),
            blocks=tuple(self.block(meta, index) for index in range(meta.layers())),
            final_norm=RMSNorm("output_norm.weight", meta.get(float, "attention.layer_norm_rms_epsilon")),
            head=Linear(head) if head else None,  # None: tied to the token embedding, as in Phi-4-mini
            unused=(LONG,) if has_factors(meta) else (),
        )

    def block(self, meta: Metadata, index: int) -> Block:
        eps = meta.get(float, "attention.layer_norm_rms_epsilon")
        hidden = meta.get(int, "embedding_length", minimum=1)
        heads = meta.get(int, "attention.head_count", minimum=1)
        if hidden % heads:
            raise ConfigError(
                f"phi3.embedding_length is {hidden}, which phi3.attention.head_count ({heads}) does not divide"
            )
        name = f"blk.{index}.{{}}.weight".format
        return Block(
            attn_norm=RMSNorm(name("attn_norm"), eps),
            attn=Attention(
                heads=heads,
                kv_heads=meta.get(int, "attention.head_count_kv", minimum=1),
                head_dim=hidden // heads,
                qkv=FusedQKV(Linear(name("attn_qkv"))),
                out=Linear(name("attn_output")),
                rope=rope(meta, hidden // heads),
                # Always in the file, 0 for none. Files of before August 2024 lack the key although most of their
                # models have a window, so without it nothing is known and nothing is assumed.
                window=meta.get(int, "attention.sliding_window", minimum=0, maximum=2**31 - 1) or None,
            ),
            mlp_norm=RMSNorm(name("ffn_norm"), eps),
            mlp=MLP(
                size=meta.get(int, "feed_forward_length", minimum=1),
                up=FusedGateUp(Linear(name("ffn_up"))),  # gate first, then up
                down=Linear(name("ffn_down")),
                activation="silu",
            ),
        )


def has_factors(meta: Metadata) -> bool:
    """Whether the file is made for LongRoPE: a context stretched by factors on RoPE's frequencies.

    Raises TensorError where one of its two tensors is missing, ConfigError where the metadata says another thing.
    """
    has = meta.has_tensor(SHORT)
    if has != meta.has_tensor(LONG):
        there, absent = (SHORT, LONG) if has else (LONG, SHORT)
        raise TensorError(f"the file has {there} and lacks {absent}; LongRoPE needs both")
    kind = meta.get(str, "rope.scaling.type", "longrope" if has else "none")
    if kind != ("longrope" if has else "none"):
        raise ConfigError(
            f"phi3.rope.scaling.type is {kind!r} in a file {'with' if has else 'without'} {SHORT}; plugin phi3 "
            f"supports 'longrope' with it and 'none' without"
        )
    return has


def context(meta: Metadata) -> int:
    """Positions at which the model is what it was trained to be.

    LongRoPE has two sets of factors: short ones for sequences within the original context, long ones for longer
    sequences, whose first tokens then turn by other angles too. A Decoder has one set. It is the short one here, so a
    longer context is refused: ``runtime.context`` may not exceed this.
    """
    if not has_factors(meta):
        return meta.context()
    return min(meta.context(), original_context(meta))


def original_context(meta: Metadata) -> int:
    return meta.get(int, "rope.scaling.original_context_length", minimum=1)


def rope(meta: Metadata, head_dim: int) -> Rope:
    """Rotation of the first ``rope.dimension_count`` components of a head, in halves."""
    scaling = None
    if has_factors(meta):
        # LongRoPE multiplies cos and sin by attn_factor. YaRN by a factor of 1 keeps every frequency: only its
        # magnitude is left.
        magnitude = meta.get(float, "rope.scaling.attn_factor")
        scaling = YarnScaling(factor=1.0, original_context=original_context(meta), magnitude=magnitude)
    else:
        meta.require(rope__scaling__attn_factor=1.0)
        meta.ignore("rope.scaling.original_context_length")  # says nothing without factors
    return Rope(
        theta=meta.get(float, "rope.freq_base", 10000.0),
        dim=meta.get(int, "rope.dimension_count", head_dim, minimum=2),
        pairing="half",
        scaling=scaling,
        factors=meta.optional(SHORT),
    )


@hookimpl
def polyhead_register_architectures() -> list[Architecture]:
    return [Phi3()]
