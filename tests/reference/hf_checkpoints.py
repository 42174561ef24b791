"""Looks into one block of a transformers model during a forward pass: the goldens' checkpoints.

Used by make_goldens.py only; needs torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from hf_reference import BLOCK_NAMES, TOP_NAMES, GGUFFile, family, half_to_interleaved
from transformers import PreTrainedModel


@dataclass
class _Layer:
    """The modules of one block that a checkpoint looks at."""

    block: torch.nn.Module
    attn_norm: torch.nn.Module
    attn_output: torch.nn.Module
    mlp_norm: torch.nn.Module
    mlp: torch.nn.Module


def _layer(file: GGUFFile, model: PreTrainedModel, index: int) -> _Layer:
    kind = family(file.arch)
    block = model.get_submodule(f"{TOP_NAMES[kind]['blk']}.{index}")
    name = BLOCK_NAMES[kind]
    parts = [block.get_submodule(name[key]) for key in ("attn_norm", "attn_output", "ffn_norm")]
    return _Layer(block, *parts, block.mlp)


@contextmanager
def checkpoints(file: GGUFFile, model: PreTrainedModel, index: int) -> Iterator[dict[str, np.ndarray]]:
    """A dict that a forward pass of one sequence inside fills with block ``index``'s checkpoints (see README.md)."""
    found: dict[str, np.ndarray] = {}
    layer, hooks = _layer(file, model, index), []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            found[name] = tensor.reshape(-1, tensor.shape[-1]).detach().numpy().copy()

        return hook

    for name, module in (
        *(("attn_norm", layer.attn_norm), ("attn_out", layer.attn_output), ("mlp_norm", layer.mlp_norm)),
        *(("mlp_out", layer.mlp), ("block_out", layer.block)),
    ):
        hooks.append(module.register_forward_hook(keep(name)))
    hooks.append(layer.attn_output.register_forward_pre_hook(lambda m, args: keep("attn")(m, (), args[0])))
    module_name = type(model).__module__
    eager = __import__(module_name, fromlist=["eager_attention_forward"]).eager_attention_forward

    def recording(module, query, key, value, *args, **kwargs):  # type: ignore[no-untyped-def]
        if module.layer_idx == index:
            if file.arch == "llama":
                found["q"], found["k"] = half_to_interleaved(query), half_to_interleaved(key)
            else:
                found["q"], found["k"] = query, key
            found["v"] = value
            for name in "qkv":  # [1, heads, n, head_dim] -> [n, heads, head_dim]
                found[name] = found[name][0].transpose(0, 1).contiguous().numpy().copy()
        return eager(module, query, key, value, *args, **kwargs)

    with mock.patch(f"{module_name}.eager_attention_forward", recording):
        yield found
    for hook in hooks:
        hook.remove()
