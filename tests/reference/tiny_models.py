"""Tiny random GGUF models, the same bytes on every machine: the weights that the goldens were computed with.

``SPECS`` names them, ``build(name, path)`` writes one. Needs only numpy and the ``gguf`` package's writer, no torch.
Tensor names, metadata keys and layouts are those of llama.cpp's converter (see README.md); the numbers are those of
random_blocks.py. Knows nothing of this project's code.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from random_blocks import LAYOUTS, random_blocks, uniform


@dataclass(frozen=True)
class ModelSpec:
    """One tiny model. Matrices have ``quant``'s type, except those whose name ends as in ``mixed`` says."""

    arch: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context: int
    layers: int = 2
    eps: float = 1e-5
    tied: bool = False
    theta: float | None = None
    rope_dim: int | None = None
    rope_scaling: tuple[tuple[str, str | int | float], ...] = ()
    rope_factors: tuple[float, ...] = ()
    window: int | None = None
    parallel: bool | None = None
    attn_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    quant: str = "F32"
    mixed: tuple[tuple[str, str], ...] = ()
    seed: int = 0

    @property
    def layer_norm(self) -> bool:
        """GPT-2 and GPT-NeoX: LayerNorm with bias, fused QKV, no gate, a bias on every matrix of a block."""
        return self.arch in ("gpt2", "gptneox")


QUANTS = ("F32", "F16", "BF16", *LAYOUTS)
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "BF16": 32,
    "MXFP4": 38,
}

_LLAMA = ModelSpec("llama", 48, 6, 2, 16, 88, 131, 128, theta=10000.0, rope_dim=16)
_WIDE = {"hidden": 256, "heads": 8, "head_dim": 32, "ffn": 512, "vocab": 101, "context": 64}
_WIDE_LLAMA = ModelSpec("llama", **_WIDE, kv_heads=2, layers=1, tied=True, theta=10000.0, rope_dim=32, quant="F32")
_WIDE_GPT2 = ModelSpec("gpt2", **_WIDE, kv_heads=8, layers=1)

# What HF's llama3 scaling gives for theta 100, head_dim 16, factor 8, low 1, high 4, original context 64: frequencies
# are divided by these. Literals, because computing them needs pow().
_LLAMA3_FACTORS = (1.0, 1.0, 1.29397583, 2.76517328, 7.66738513, 8.0, 8.0, 8.0)

SPECS: dict[str, ModelSpec] = {
    "gpt2-tied": ModelSpec("gpt2", 56, 7, 7, 8, 224, 131, 96, tied=True),
    "gpt2-untied": ModelSpec("gpt2", 48, 3, 3, 16, 192, 97, 64, layers=3, eps=1e-3),
    "gptneox-parallel": ModelSpec("gptneox", 48, 3, 3, 16, 120, 131, 96, layers=3, rope_dim=4, parallel=True),
    "gptneox-sequential": ModelSpec("gptneox", 64, 2, 2, 32, 200, 203, 64, eps=1e-3, rope_dim=8, parallel=False),
    "llama-mha": replace(_LLAMA, heads=4, kv_heads=4, head_dim=12, rope_dim=12, ffn=104),
    "llama-gqa": replace(_LLAMA, layers=3, vocab=97, context=64, tied=True, theta=500000.0, eps=3e-3),
    "llama-mqa": replace(_LLAMA, hidden=40, heads=5, kv_heads=1, head_dim=6, rope_dim=6, vocab=203, context=96),
    "llama-bias": replace(_LLAMA, attn_bias=True, out_bias=True, mlp_bias=True),
    "llama-linear": replace(_LLAMA, rope_scaling=(("type", "linear"), ("factor", 4.0))),
    "llama-yarn": replace(
        _LLAMA,
        theta=100.0,
        rope_scaling=(("type", "yarn"), ("factor", 4.0), ("original_context_length", 32)),
    ),
    "llama-yarn-attn": replace(
        _LLAMA,
        theta=1000.0,
        rope_scaling=(
            ("type", "yarn"),
            ("factor", 2.0),
            ("original_context_length", 64),
            ("attn_factor", 0.75),
            ("yarn_beta_fast", 8.0),
            ("yarn_beta_slow", 0.5),
        ),
    ),
    "llama-rope-factors": replace(_LLAMA, theta=100.0, rope_factors=_LLAMA3_FACTORS),
    "mistral-window": replace(_LLAMA, kv_heads=3, window=5),
    "qwen2-tied": replace(
        _LLAMA, arch="qwen2", hidden=56, heads=4, head_dim=14, rope_dim=None, tied=True, attn_bias=True, eps=1e-6
    ),
    "qwen2-head-dim": replace(
        _LLAMA, arch="qwen2", heads=4, kv_heads=1, head_dim=10, rope_dim=None, attn_bias=True, theta=1e6
    ),
    "qwen3": replace(_LLAMA, arch="qwen3", hidden=40, heads=4, rope_dim=None, qk_norm=True, eps=1e-6),
    **{f"llama-{quant.lower()}": replace(_WIDE_LLAMA, quant=quant) for quant in QUANTS},
    **{f"gpt2-{quant.lower()}": replace(_WIDE_GPT2, ffn=1024, quant=quant) for quant in QUANTS},
    # As a "Q4_K_M" file: two K types, and Q5_0 and Q8_0 where a row (here of ffn_down) is no multiple of 256.
    "llama-mixed": replace(
        _WIDE_LLAMA,
        layers=2,
        ffn=288,
        quant="Q4_K",
        mixed=(
            ("token_embd", "Q6_K"),
            ("attn_v", "Q6_K"),
            ("attn_output", "IQ4_XS"),
            ("0.ffn_down", "Q5_0"),
            ("1.ffn_down", "Q8_0"),
        ),
    ),
}


def tensors(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...], float, float]]:
    """Yields (GGUF name, shape [out, in], mean, rms of the deviation from it) of every tensor, in file order.

    Weights are large enough for peaked attention and logits with a standard deviation over 1; norms and biases are far
    from 1 and 0, so that one forgotten shows.
    """

    def matrix(name: str, out: int, into: int, gain: float, bias: bool = False) -> Iterator[tuple]:
        yield f"{name}.weight", (out, into), 0.0, gain / math.sqrt(into)
        if bias:
            yield f"{name}.bias", (out,), 0.0, 0.25

    def norm(name: str, size: int) -> Iterator[tuple]:
        yield f"{name}.weight", (size,), 1.0, 0.3
        if spec.layer_norm:
            yield f"{name}.bias", (size,), 0.0, 0.2

    h, query, kv, old = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.layer_norm
    yield "token_embd.weight", (spec.vocab, h), 0.0, 2.0 / math.sqrt(h) if spec.tied else 0.8
    if spec.arch == "gpt2":
        yield "position_embd.weight", (spec.context, h), 0.0, 0.3
    if spec.rope_factors:
        yield "rope_freqs.weight", (len(spec.rope_factors),), 0.0, 0.0
    for i in range(spec.layers):
        yield from norm(f"blk.{i}.attn_norm", h)
        if old:
            yield from matrix(f"blk.{i}.attn_qkv", query + 2 * kv, h, 1.3, True)
        else:
            yield from matrix(f"blk.{i}.attn_q", query, h, 1.4, spec.attn_bias)
            yield from matrix(f"blk.{i}.attn_k", kv, h, 1.4, spec.attn_bias)
            yield from matrix(f"blk.{i}.attn_v", kv, h, 1.1, spec.attn_bias)
        if spec.qk_norm:
            yield f"blk.{i}.attn_q_norm.weight", (spec.head_dim,), 1.3, 0.3
            yield f"blk.{i}.attn_k_norm.weight", (spec.head_dim,), 1.3, 0.3
        yield from matrix(f"blk.{i}.attn_output", h, query, 1.0, old or spec.out_bias)
        yield from norm(f"blk.{i}.ffn_norm", h)
        if not old:
            yield from matrix(f"blk.{i}.ffn_gate", spec.ffn, h, 1.3, spec.mlp_bias)
        yield from matrix(f"blk.{i}.ffn_up", spec.ffn, h, 1.3, old or spec.mlp_bias)
        yield from matrix(f"blk.{i}.ffn_down", h, spec.ffn, 1.3, old or spec.mlp_bias)
    yield from norm("output_norm", h)
    if not spec.tied:
        yield from matrix("output", spec.vocab, h, 2.0)


def tensor_type(spec: ModelSpec, name: str, shape: tuple[int, ...]) -> str:
    """The ggml type of a tensor: vectors and learned positions are always F32, as converters have it."""
    if len(shape) == 1 or name.startswith("position_embd"):
        return "F32"
    stem = name.removesuffix(".weight")
    return next((kind for suffix, kind in spec.mixed if stem.endswith(suffix)), spec.quant)


def tensor_data(spec: ModelSpec, name: str, shape: tuple[int, ...], mean: float, rms: float) -> NDArray:
    """A tensor as the file stores it: float32, float16, or uint8 rows of BF16 or quantised blocks."""
    if name == "rope_freqs.weight":
        return np.array(spec.rope_factors, np.float32)
    stream = np.random.PCG64([spec.seed, zlib.crc32(name.encode())])
    kind = tensor_type(spec, name, shape)
    if kind in LAYOUTS:
        return random_blocks(stream, shape, kind, rms)
    width = np.float32(rms * math.sqrt(3.0))
    values = (uniform(stream, math.prod(shape)) * width + np.float32(mean)).reshape(shape)
    if kind == "F16":
        return values.astype(np.float16)
    if kind == "BF16":  # rounding the low half away from zero at one half; ties to even do not matter here
        return ((values.view(np.uint32) + np.uint32(0x8000)) >> 16).astype("<u2").view(np.uint8)
    return values


_MERGES = "Ġ t|h e|i n|Ġ a|e r|o n|Ġt he|r e|a t|e n|Ġ s|n d|o r|in g|e s|Ġ w|Ġ c|Ġa nd|i s|o u|l l|Ġ f|i t|Ġ p"


def vocabulary(size: int) -> tuple[list[str], list[int], list[str]]:
    """(tokens, token types, merges) of a byte-level BPE for printable ASCII.

    The end-of-text token follows the merged ones; after it, unused tokens fill the vocabulary up to ``size``, as
    converters do. Bytes outside printable ASCII have no token (newline has one where ``size`` > 97), as happens in
    published vocabularies.
    """
    tokens = [chr(c) for c in range(ord("!"), ord("~") + 1)] + ["Ġ"] + (["Ċ"] if size > 97 else [])
    merges = _MERGES.split("|")[: max(1, min(size - len(tokens) - 2, 24))]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    padding = [f"[PAD{i}]" for i in range(len(tokens), size)]
    return tokens + padding, [1] * (len(tokens) - 1) + [3] + [5] * len(padding), merges


def metadata(name: str, spec: ModelSpec) -> Iterator[tuple[str, str, object]]:
    """Yields (method of ``gguf.GGUFWriter``, key, value) of the model's metadata."""

    def key(*parts: str) -> str:
        return ".".join((spec.arch, *parts))

    yield "add_string", "general.type", "model"
    yield "add_string", "general.name", name
    yield "add_uint32", "general.file_type", FILE_TYPES[spec.quant]
    yield "add_uint32", "general.quantization_version", 2
    yield "add_uint32", key("block_count"), spec.layers
    yield "add_uint32", key("context_length"), spec.context
    yield "add_uint32", key("embedding_length"), spec.hidden
    yield "add_uint32", key("feed_forward_length"), spec.ffn
    yield "add_uint32", key("attention.head_count"), spec.heads
    if spec.layer_norm:
        yield "add_float32", key("attention.layer_norm_epsilon"), spec.eps
    else:
        yield "add_uint32", key("attention.head_count_kv"), spec.kv_heads
        yield "add_float32", key("attention.layer_norm_rms_epsilon"), spec.eps
    if spec.head_dim * spec.heads != spec.hidden:
        yield "add_uint32", key("attention.key_length"), spec.head_dim
        yield "add_uint32", key("attention.value_length"), spec.head_dim
    if spec.window is not None:
        yield "add_uint32", key("attention.sliding_window"), spec.window
    if spec.parallel is not None:
        yield "add_bool", key("use_parallel_residual"), spec.parallel
    if spec.rope_dim is not None:
        yield "add_uint32", key("rope.dimension_count"), spec.rope_dim
    if spec.theta is not None:
        yield "add_float32", key("rope.freq_base"), spec.theta
    methods = {str: "add_string", int: "add_uint32", float: "add_float32"}
    for field, value in spec.rope_scaling:
        yield methods[type(value)], key("rope.scaling", field), value
    if spec.arch == "llama":
        yield "add_uint32", key("vocab_size"), spec.vocab
    tokens, types, merges = vocabulary(spec.vocab)
    yield "add_string", "tokenizer.ggml.model", "gpt2"
    yield "add_string", "tokenizer.ggml.pre", "gpt-2"
    yield "add_array", "tokenizer.ggml.tokens", tokens
    yield "add_array", "tokenizer.ggml.token_type", types
    yield "add_array", "tokenizer.ggml.merges", merges
    yield "add_uint32", "tokenizer.ggml.bos_token_id", tokens.index("<|endoftext|>")
    yield "add_uint32", "tokenizer.ggml.eos_token_id", tokens.index("<|endoftext|>")
    yield "add_bool", "tokenizer.ggml.add_bos_token", False


def build(name: str, path: str | os.PathLike[str]) -> None:
    """Writes the GGUF file of ``SPECS[name]`` to ``path``. KeyError for a name that is not there."""
    import gguf  # slow to import, and not needed to read SPECS

    spec = SPECS[name]
    writer = gguf.GGUFWriter(path, spec.arch)
    for method, key, value in metadata(name, spec):
        getattr(writer, method)(key, value)
    for tensor, shape, mean, rms in tensors(spec):
        kind = gguf.GGMLQuantizationType[tensor_type(spec, tensor, shape)]
        writer.add_tensor(tensor, tensor_data(spec, tensor, shape, mean, rms), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
