"""What of the GPU's KV cache can be told on the host: the values of e4m3 codes, its types and sizes."""

from __future__ import annotations

import numpy as np
import pytest
from polyhead.arch import MLP, Attention, Block, Decoder, Embedding, FusedQKV, Linear, RMSNorm
from polyhead.errors import ConfigError
from polyhead.runtime.contract import RuntimeOptions
from polyhead.runtime.cpu.kv_cache import storage_dtype
from polyhead.runtime.cuda.kv_cache import decode_e4m3
from polyhead.runtime.cuda.plan import kv_bytes_per_token, kv_dtype


def test_e4m3_codes_are_what_the_format_says() -> None:
    values = decode_e4m3(np.arange(256, dtype=np.uint8))
    assert np.isnan(values[[0x7F, 0xFF]]).all()
    positive = values[:0x7F]
    assert (np.diff(positive) > 0).all()
    assert positive[[0, 1, 7, 8, 0x38, 0x39, 0x7E]].tolist() == [0, 2**-9, 7 * 2**-9, 2**-6, 1, 1.125, 448]
    assert np.array_equal(values[0x80:0xFF], -positive)
    assert np.signbit(values[0x80])


def test_the_cache_is_as_asked_for_or_the_activations_type() -> None:
    for asked, act, stored in (("auto", "auto", "f16"), ("auto", "bf16", "bf16"), ("bf16", "bf16", "bf16")):
        assert kv_dtype(RuntimeOptions(kv_dtype=asked, activation_dtype=act)) == stored
    for act in ("auto", "f16", "bf16"):
        assert kv_dtype(RuntimeOptions(kv_dtype="fp8", activation_dtype=act)) == "fp8"
    for asked, act in (("f32", "auto"), ("bf16", "auto"), ("f16", "bf16")):
        with pytest.raises(ConfigError, match=rf"'{asked}'.*or fp8"):
            kv_dtype(RuntimeOptions(kv_dtype=asked, activation_dtype=act))


def test_fp8_takes_a_byte_per_value_and_two_scales_per_head() -> None:
    def block(kv_heads: int, dim: int) -> Block:
        attn = Attention(4, kv_heads, dim, FusedQKV(Linear("a")), Linear("b"))
        return Block(RMSNorm("n", 1e-5), attn, None, MLP(4, Linear("u"), Linear("d"), "relu"))

    decoder = Decoder(8, 5, 16, Embedding("e"), (block(2, 64), block(1, 128)), None)
    assert kv_bytes_per_token(decoder, "f16") == kv_bytes_per_token(decoder, "bf16") == 2 * 512
    assert kv_bytes_per_token(decoder, "fp8") == 512 + 8 * 3


def test_the_cpu_runtime_refuses_fp8_and_says_what_it_stores() -> None:
    with pytest.raises(ConfigError, match="'fp8'; the CPU runtime stores"):
        storage_dtype("fp8")
