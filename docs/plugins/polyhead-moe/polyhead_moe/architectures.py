"""The architectures: Llama-style blocks whose MLP is a mixture of experts.

Tensor names, keys and layouts are those of llama.cpp's converter. Mixtral files say ``llama``, as dense Llama files do.
"""

from __future__ import annotations

from polyhead.arch import (
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

from .layer import MOST_EXPERTS, Experts, SharedExpert

_SOFTMAX = 1  # llama.cpp's number for how scores become shares


class _Moe:
    """What the architectures have in common; the class attributes say how they differ."""

    name: str
    gguf_names: tuple[str, ...]
    api_version = 1
    pairing: Pairing = "half"
    normalise = True
    shared = False
    head_norms = False

    def decoder(self, meta: Metadata) -> Decoder:
        meta.require(
            attention__causal=True,
            attention__clamp_kqv=0.0,
            attention__max_alibi_bias=0.0,
            use_parallel_residual=False,
            tensor_data_layout="Meta AI original pth",
            expert_gating_func=_SOFTMAX,
            expert_group_count=0,
            expert_group_used_count=0,
        )
        head = meta.optional("output.weight")
        return Decoder(
            hidden=meta.get(int, "embedding_length", minimum=1),
            vocab=meta.vocab(),
            context=meta.context(),
            tokens=Embedding("token_embd.weight"),
            blocks=tuple(self.block(meta, index) for index in range(meta.layers())),
            final_norm=_norm(meta, "output_norm"),
            head=Linear(head) if head else None,
            unused=("blk.*.attn_rot_embd",),  # inverse frequencies in old files; computed by polyhead
        )

    def block(self, meta: Metadata, index: int) -> Block:
        prefix = f"blk.{index}"
        hidden = meta.get(int, "embedding_length", minimum=1)
        heads = meta.layer(int, "attention.head_count", index, minimum=1)
        if not meta.has("attention.key_length") and hidden % heads:
            raise ConfigError(
                f"{meta.architecture}.embedding_length is {hidden}, which head_count ({heads}) does not divide, "
                "and the file has no attention.key_length"
            )
        head_dim = meta.get(int, "attention.key_length", hidden // heads, minimum=1)
        meta.require(attention__value_length=head_dim)
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
                rope=read_rope(meta, head_dim, self.pairing),
                q_norm=_norm(meta, f"{prefix}.attn_q_norm") if self.head_norms else None,
                k_norm=_norm(meta, f"{prefix}.attn_k_norm") if self.head_norms else None,
                window=window or None,
            ),
            mlp_norm=_norm(meta, f"{prefix}.ffn_norm"),
            mlp=self._experts(meta, prefix),
        )

    def _experts(self, meta: Metadata, prefix: str) -> Experts:
        if meta.has_tensor(f"{prefix}.ffn_gate.0.weight"):
            raise ConfigError(
                f"the file has each expert by itself ({prefix}.ffn_gate.0.weight), as converters wrote it before April "
                f"2024; plugin {self.name} reads {prefix}.ffn_gate_exps.weight. Convert the model anew"
            )
        if meta.has("expert_feed_forward_length"):
            meta.ignore("feed_forward_length")  # then that of dense layers, of which there are none
        size = meta.get(int, "feed_forward_length", None, minimum=1)
        used = meta.get(int, "expert_used_count", minimum=1)
        own = meta.get(int, "expert_feed_forward_length", self._default_size(size, used), minimum=1)
        if own is None:
            raise ConfigError(
                f"the file has neither {meta.architecture}.expert_feed_forward_length nor feed_forward_length, the "
                f"width of an expert, which plugin {self.name} needs"
            )
        scale = meta.get(float, "expert_weights_scale", 1.0)
        return Experts(
            count=meta.get(int, "expert_count", minimum=1, maximum=MOST_EXPERTS),
            used=used,
            size=own,
            router=f"{prefix}.ffn_gate_inp.weight",
            gate=f"{prefix}.ffn_gate_exps.weight",
            up=f"{prefix}.ffn_up_exps.weight",
            down=f"{prefix}.ffn_down_exps.weight",
            normalise=meta.get(bool, "expert_weights_norm", self.normalise),
            scale=scale or 1.0,  # 0 in files stands for none
            shared=self._shared_expert(meta, prefix, size) if self.shared else None,
        )

    def _default_size(self, size: int | None, used: int) -> int | None:
        """Where a file does not say how wide an expert is: feed_forward_length is that of all that a row uses."""
        return size // used if size else None

    def _shared_expert(self, meta: Metadata, prefix: str, size: int | None) -> SharedExpert:
        meta.require(expert_shared_count=1)
        gate_input = f"{prefix}.ffn_gate_inp_shexp.weight"
        return SharedExpert(
            size=meta.get(int, "expert_shared_feed_forward_length", size or 0, minimum=1),
            gate_input=gate_input,
            gate=f"{prefix}.ffn_gate_shexp.weight",
            up=f"{prefix}.ffn_up_shexp.weight",
            down=f"{prefix}.ffn_down_shexp.weight",
            flat=not meta.has_tensor(gate_input) or len(meta.tensor_shape(gate_input)) == 1,
        )


class MixtralMoe(_Moe):
    """Mixtral and other ``llama`` files with experts: the shares of the chosen experts sum to 1."""

    name = "moe_llama"
    gguf_names = ("llama",)
    pairing: Pairing = "interleaved"  # the converter permutes the rows of Q and K of llama files

    def accepts(self, meta: Metadata) -> bool:
        """Whether a ``llama`` file is one of these: the others are dense."""
        return meta.get(int, "expert_count", 0) > 0

    def _default_size(self, size: int | None, used: int) -> int | None:
        return size  # feed_forward_length is one expert's


class Qwen2Moe(_Moe):
    """Qwen1.5-MoE and Qwen2-MoE: biases on Q, K and V, a shared expert, shares that do not sum to 1."""

    name = "moe_qwen2"
    gguf_names = ("qwen2moe",)
    normalise = False
    shared = True


class Qwen3Moe(_Moe):
    """Qwen3-MoE: an RMSNorm on each head of Q and K, many small experts, shares that sum to 1."""

    name = "moe_qwen3"
    gguf_names = ("qwen3moe",)
    head_norms = True


def _norm(meta: Metadata, name: str) -> RMSNorm:
    return RMSNorm(f"{name}.weight", meta.get(float, "attention.layer_norm_rms_epsilon"))


def _linear(meta: Metadata, name: str) -> Linear:
    return Linear(f"{name}.weight", meta.optional(f"{name}.bias"))
