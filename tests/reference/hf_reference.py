"""A GGUF file as a Hugging Face transformers model: config from its metadata, weights dequantised by the gguf package.

The independent side of the goldens: knows llama.cpp's file conventions and transformers, nothing of this project.
Used by make_goldens.py only; needs torch, transformers and gguf.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import gguf

Weights = dict[str, np.ndarray]


class GGUFFile:
    """Metadata without the architecture's prefix (``meta["block_count"]``), and every tensor as float32 [out, in]."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        self.arch: str = values["general.architecture"]
        self.meta = {name.removeprefix(self.arch + "."): value for name, value in values.items()}
        self.weights: Weights = {
            tensor.name: np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
            for tensor in reader.tensors
        }

    @property
    def vocab(self) -> int:
        return self.weights["token_embd.weight"].shape[0]

    @property
    def tied(self) -> bool:
        return "output.weight" not in self.weights


class Float64(TorchDispatchMode):
    """Inside it, whatever asks for float32 gets float64: also the casts to float32 inside transformers' modules."""

    def __enter__(self) -> Float64:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        args = [torch.float64 if a is torch.float32 else a for a in args]
        return func(*args, **kwargs)


def _interleaved_to_half(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the converter's permutation of ``llama`` Q and K rows: pairs (2i, 2i+1) become (i, i + head_dim/2)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def half_to_interleaved(x: torch.Tensor) -> torch.Tensor:
    """Channels (last axis) of a rotated q or k in the order of a ``llama`` file's rows."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def _per_head_qkv(fused: np.ndarray, heads: int) -> np.ndarray:
    """[q; k; v] rows to GPT-NeoX's [q0; k0; v0; q1; …]."""
    return fused.reshape(3, heads, -1, *fused.shape[1:]).swapaxes(0, 1).reshape(fused.shape)


# GGUF name in a block -> name in a transformers layer
BLOCK_NAMES = {
    "gpt2": {
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    "gptneox": {
        "attn_norm": "input_layernorm",
        "attn_qkv": "attention.query_key_value",
        "attn_output": "attention.dense",
        "ffn_norm": "post_attention_layernorm",
        "ffn_up": "mlp.dense_h_to_4h",
        "ffn_down": "mlp.dense_4h_to_h",
    },
    "llama": {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
}
TOP_NAMES = {
    "gpt2": {
        "token_embd": "transformer.wte",
        "position_embd": "transformer.wpe",
        "output_norm": "transformer.ln_f",
        "output": "lm_head",
        "blk": "transformer.h",
    },
    "gptneox": {
        "token_embd": "gpt_neox.embed_in",
        "output_norm": "gpt_neox.final_layer_norm",
        "output": "lm_head",
        "blk": "gpt_neox.layers",
    },
    "llama": {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        "blk": "model.layers",
    },
}


def family(arch: str) -> str:
    """Whose layer names an architecture has: ``gpt2``, ``gptneox`` or ``llama``."""
    return arch if arch in BLOCK_NAMES else "llama"


def state_dict(file: GGUFFile) -> dict[str, torch.Tensor]:
    """The weights under transformers' names and in its layouts."""
    kind, heads = family(file.arch), int(file.meta["attention.head_count"])
    state = {}
    for name, array in file.weights.items():
        *block, stem, leaf = name.split(".")
        if name == "rope_freqs.weight":
            continue
        if file.arch == "llama" and stem in ("attn_q", "attn_k"):
            kv_heads = int(file.meta["attention.head_count_kv"])
            array = _interleaved_to_half(array, heads if stem == "attn_q" else kv_heads)
        if kind == "gptneox" and stem == "attn_qkv":
            array = _per_head_qkv(array, heads)
        if kind == "gpt2" and block and array.ndim == 2:
            array = array.T  # Conv1D keeps [in, out]
        path = [TOP_NAMES[kind]["blk"], block[1], BLOCK_NAMES[kind][stem]] if block else [TOP_NAMES[kind][stem]]
        state[".".join([*path, leaf])] = torch.from_numpy(np.ascontiguousarray(array))
    if file.tied:
        state["lm_head.weight"] = state[f"{TOP_NAMES[kind]['token_embd']}.weight"]
    return state


def _rope_parameters(file: GGUFFile, head_dim: int) -> dict[str, object]:
    meta, theta = file.meta, file.meta.get("rope.freq_base", 10000.0)
    kind = meta.get("rope.scaling.type", "default")
    rope: dict[str, object] = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        rope["factor"] = meta["rope.scaling.factor"]
    if kind == "yarn":
        # ggml multiplies its magnitude 1 + 0.1 ln(factor) by attn_factor; transformers' attention_factor replaces it.
        magnitude = 1.0 + 0.1 * math.log(meta["rope.scaling.factor"])
        rope["original_max_position_embeddings"] = meta["rope.scaling.original_context_length"]
        rope["attention_factor"] = magnitude * meta.get("rope.scaling.attn_factor", 1.0)
        rope["beta_fast"] = meta.get("rope.scaling.yarn_beta_fast", 32.0)
        rope["beta_slow"] = meta.get("rope.scaling.yarn_beta_slow", 1.0)
    if "rope_freqs.weight" in file.weights:  # the literals in tiny_models.py are those of this scaling
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 64
    if file.arch == "gptneox":
        rope["partial_rotary_factor"] = meta["rope.dimension_count"] / head_dim
    return rope


def _config(file: GGUFFile) -> tuple[type[PreTrainedModel], object]:
    meta, heads = file.meta, file.meta["attention.head_count"]
    head_dim = meta.get("attention.key_length", meta["embedding_length"] // heads)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    common = {"vocab_size": file.vocab, "tie_word_embeddings": file.tied, "attn_implementation": "eager", **ids}
    if file.arch == "gpt2":
        sizes = {"n_embd": meta["embedding_length"], "n_head": heads, "n_layer": meta["block_count"]}
        sizes |= {"n_positions": meta["context_length"], "n_inner": meta["feed_forward_length"]}
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel, GPT2Config(
            **sizes, **drop, **common, layer_norm_epsilon=meta["attention.layer_norm_epsilon"]
        )
    common |= {
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": heads,
        "max_position_embeddings": meta["context_length"],
        "rope_parameters": _rope_parameters(file, head_dim),
    }
    if file.arch == "gptneox":
        return GPTNeoXForCausalLM, GPTNeoXConfig(
            **common,
            layer_norm_eps=meta["attention.layer_norm_epsilon"],
            use_parallel_residual=meta["use_parallel_residual"],
        )
    common |= {
        "num_key_value_heads": meta["attention.head_count_kv"],
        "head_dim": head_dim,
        "rms_norm_eps": meta["attention.layer_norm_rms_epsilon"],
    }
    if file.arch == "qwen2":
        return Qwen2ForCausalLM, Qwen2Config(**common)
    if file.arch == "qwen3":
        return Qwen3ForCausalLM, Qwen3Config(**common)
    if "attention.sliding_window" in meta:
        return MistralForCausalLM, MistralConfig(**common, sliding_window=meta["attention.sliding_window"])
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
    return LlamaForCausalLM, LlamaConfig(**common, **{k: name in file.weights for k, name in biases.items()})


def load_model(file: GGUFFile) -> PreTrainedModel:
    """The file as a transformers model in evaluation mode, eager attention, float32 (float64 inside ``Float64``)."""
    model_class, config = _config(file)
    model = model_class(config).eval()
    model.load_state_dict({k: v.to(next(model.parameters()).dtype) for k, v in state_dict(file).items()})
    _check_config_was_honoured(file, model)
    return model


def _check_config_was_honoured(file: GGUFFile, model: PreTrainedModel) -> None:
    """transformers drops config keys it does not know without a word; so look at what the modules came out as."""
    assert model.config._attn_implementation == "eager"
    if file.arch == "gpt2":
        assert type(model.transformer.h[0].mlp.act).__name__ == "NewGELUActivation"
        return
    rotary = (model.gpt_neox if file.arch == "gptneox" else model.model).rotary_emb
    heads, meta = file.meta["attention.head_count"], file.meta
    head_dim = meta.get("attention.key_length", meta["embedding_length"] // heads)
    dim = meta.get("rope.dimension_count", head_dim)
    plain = meta.get("rope.freq_base", 10000.0) ** (-np.arange(0, dim, 2) / dim)
    got, kind, scale = rotary.inv_freq.double().numpy(), meta.get("rope.scaling.type"), 1.0
    if kind == "linear":
        plain = plain / meta["rope.scaling.factor"]
    if kind == "yarn":
        factor = meta["rope.scaling.factor"]
        scale = (1.0 + 0.1 * math.log(factor)) * meta.get("rope.scaling.attn_factor", 1.0)
        ratio = plain / got
        assert np.isclose(ratio[0], 1)
        assert np.isclose(ratio[-1], factor)
        assert np.any((ratio > 1.1) & (ratio < 0.9 * factor))
    else:
        np.testing.assert_allclose(got, plain / file.weights.get("rope_freqs.weight", 1.0), rtol=2e-6)
    assert np.isclose(rotary.attention_scaling, scale)
    if file.arch == "gptneox":
        assert type(model.gpt_neox.layers[0].mlp.act).__name__ == "GELUActivation"
        assert model.gpt_neox.layers[0].use_parallel_residual is meta["use_parallel_residual"]
    else:
        attention = model.model.layers[0].self_attn
        assert attention.head_dim == head_dim
        assert (attention.q_proj.bias is not None) == ("blk.0.attn_q.bias" in file.weights)
        assert (attention.o_proj.bias is not None) == ("blk.0.attn_output.bias" in file.weights)
        assert getattr(model.config, "sliding_window", None) == meta.get("attention.sliding_window")
