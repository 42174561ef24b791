"""Writes golden.npz: what transformers computes, in float32, for the weights of qwen3_reference.golden_weights().

    pip install torch transformers numpy
    python tests/make_golden.py

Not needed to run the tests.
"""

from __future__ import annotations

import numpy as np
import torch
from qwen3_reference import GOLDEN, IDS, METADATA, VOCAB, golden_weights
from transformers import Qwen3Config, Qwen3ForCausalLM

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def state() -> dict[str, torch.Tensor]:
    """The weights under transformers' names."""
    found = {}
    for name, array in golden_weights().items():
        *block, leaf, _ = name.split(".")
        prefix = f"model.layers.{block[1]}." if block else ""
        found[f"{prefix}{NAMES[leaf]}.weight"] = torch.from_numpy(array)
    return found


@torch.no_grad()
def main() -> None:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=METADATA["embedding_length"],
        intermediate_size=METADATA["feed_forward_length"],
        num_hidden_layers=METADATA["block_count"],
        num_attention_heads=METADATA["attention.head_count"],
        num_key_value_heads=METADATA["attention.head_count_kv"],
        head_dim=METADATA["attention.key_length"],
        rms_norm_eps=METADATA["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=METADATA["context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": METADATA["rope.freq_base"]},
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(config).eval()
    model.load_state_dict(state())
    np.savez_compressed(GOLDEN, logits=model(torch.tensor([IDS])).logits[0].numpy())


if __name__ == "__main__":
    main()
