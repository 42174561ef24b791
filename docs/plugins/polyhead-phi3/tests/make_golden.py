"""Writes golden.npz: what transformers computes, in float32, for the models of phi3_reference.CASES.

    pip install torch transformers numpy
    python tests/make_golden.py

Not needed to run the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from phi3_reference import CASES, FACTORS, GOLDEN, IDS, VOCAB, golden_weights, has_factors
from transformers import Phi3Config, Phi3ForCausalLM

NAMES = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def config(metadata: Mapping[str, Any]) -> Phi3Config:
    size = metadata["embedding_length"] // metadata["attention.head_count"]
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": metadata["rope.freq_base"]}
    if has_factors(metadata):  # transformers computes attn_factor by itself
        rope |= {"rope_type": "longrope"} | {f"{name}_factor": list(values) for name, values in FACTORS.items()}
        rope |= {"original_max_position_embeddings": metadata["rope.scaling.original_context_length"]}
    return Phi3Config(
        vocab_size=VOCAB,
        hidden_size=metadata["embedding_length"],
        intermediate_size=metadata["feed_forward_length"],
        num_hidden_layers=metadata["block_count"],
        num_attention_heads=metadata["attention.head_count"],
        num_key_value_heads=metadata["attention.head_count_kv"],
        rms_norm_eps=metadata["attention.layer_norm_rms_epsilon"],
        sliding_window=metadata["attention.sliding_window"] or None,
        max_position_embeddings=metadata["context_length"],
        original_max_position_embeddings=metadata["rope.scaling.original_context_length"],
        rope_parameters=rope | {"partial_rotary_factor": metadata["rope.dimension_count"] / size},
        tie_word_embeddings=has_factors(metadata),
        pad_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )


def state(metadata: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights under transformers' names."""
    found = {}
    for name, array in golden_weights(metadata).items():
        *block, leaf, _ = name.split(".")
        if leaf in NAMES:
            prefix = f"model.layers.{block[1]}." if block else ""
            found[f"{prefix}{NAMES[leaf]}.weight"] = torch.from_numpy(array)
    found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
    return found


@torch.no_grad()
def main() -> None:
    outputs = {}
    for name, metadata in CASES.items():
        model = Phi3ForCausalLM(config(metadata)).eval()
        model.load_state_dict(state(metadata))
        outputs[name] = model(torch.tensor([IDS])).logits[0].numpy()
    np.savez_compressed(GOLDEN, **outputs)


if __name__ == "__main__":
    main()
