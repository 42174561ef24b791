"""Writes goldens.npz: what transformers computes, in float32, for the weights of moe_reference.golden_weights().

    pip install torch transformers numpy
    python tests/make_goldens.py

Not needed to run the tests.
"""

from __future__ import annotations

import numpy as np
import torch
from moe_reference import GOLDENS, IDS, METADATA, VOCAB, golden_weights
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

LEAVES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of Q or K from pairs side by side, as llama files have them, back to halves."""
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def state(architecture: str, head_dim: int) -> dict[str, torch.Tensor]:
    """The weights under transformers' names."""
    weights = golden_weights(architecture)
    found = {}
    for full, array in weights.items():
        name, _, kind = full.rpartition(".")
        prefix = ""
        if name.startswith("blk."):
            _, block, name = name.split(".", 2)
            prefix = f"model.layers.{block}."
        if name == "ffn_up_exps":
            continue
        if name == "ffn_gate_exps":  # transformers keeps gate and up of an expert in one matrix
            both = np.concatenate([array, weights[full.replace("gate", "up")]], axis=1)
            found[f"{prefix}mlp.experts.gate_up_proj"] = torch.from_numpy(both)
            continue
        if architecture == "llama" and name in ("attn_q", "attn_k"):
            array = unpermute(array, head_dim)
        if name == "ffn_gate_inp_shexp":
            array = array[None]
        suffix = "" if name == "ffn_down_exps" else f".{kind}"
        found[f"{prefix}{LEAVES[name]}{suffix}"] = torch.from_numpy(np.ascontiguousarray(array))
    return found


@torch.no_grad()
def logits(architecture: str) -> np.ndarray:
    m = METADATA[architecture]
    common = {
        "vocab_size": VOCAB,
        "hidden_size": m["embedding_length"],
        "intermediate_size": m["feed_forward_length"],
        "num_hidden_layers": m["block_count"],
        "num_attention_heads": m["attention.head_count"],
        "num_key_value_heads": m["attention.head_count_kv"],
        "num_experts_per_tok": m["expert_used_count"],
        "rms_norm_eps": m["attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": m["context_length"],
        "rope_parameters": {"rope_type": "default", "rope_theta": m["rope.freq_base"]},
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    head_dim = m.get("attention.key_length", m["embedding_length"] // m["attention.head_count"])
    if architecture == "llama":
        model = MixtralForCausalLM(MixtralConfig(**common, num_local_experts=m["expert_count"], sliding_window=None))
    elif architecture == "qwen2moe":
        model = Qwen2MoeForCausalLM(
            Qwen2MoeConfig(
                **common,
                num_experts=m["expert_count"],
                moe_intermediate_size=m["expert_feed_forward_length"],
                shared_expert_intermediate_size=m["expert_shared_feed_forward_length"],
                norm_topk_prob=False,
            )
        )
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                num_experts=m["expert_count"],
                moe_intermediate_size=m["expert_feed_forward_length"],
                head_dim=head_dim,
                norm_topk_prob=True,
            )
        )
    model.eval().load_state_dict(state(architecture, head_dim))
    return model(torch.tensor([IDS])).logits[0].numpy()


if __name__ == "__main__":
    np.savez_compressed(GOLDENS, **{name: logits(name) for name in METADATA})
