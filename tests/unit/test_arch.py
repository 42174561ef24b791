"""The vocabulary: what it refuses, always by field and value, and which tensors and shapes a tree names."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
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
    Module,
    RMSNorm,
    Rope,
    SplitQKV,
    TensorSpec,
    YarnScaling,
)
from polyhead.errors import ConfigError, PluginError

X = Linear("x")
GOOD: dict[type, Any] = {
    RMSNorm: RMSNorm("norm", 1e-5),
    LayerNorm: LayerNorm("norm", "norm.bias", 1e-5),
    LinearScaling: LinearScaling(2.0),
    YarnScaling: YarnScaling(4.0, 32),
    Rope: Rope(10000.0, 8, "half"),
    Attention: Attention(heads=6, kv_heads=2, head_dim=8, qkv=FusedQKV(X), out=X, rope=Rope(10000.0, 8, "half")),
    MLP: MLP(size=4, up=X, down=X, activation="silu"),
}
GOOD[Block] = Block(attn_norm=None, attn=GOOD[Attention], mlp_norm=None, mlp=GOOD[MLP])
GOOD[Decoder] = Decoder(
    hidden=8, vocab=10, context=16, tokens=Embedding("e"), blocks=(GOOD[Block],), final_norm=GOOD[RMSNorm]
)
NAN, INF = math.nan, math.inf
WRONG: dict[type, dict[str, tuple[Any, ...]]] = {
    RMSNorm: {"eps": (0.0, 1.0, -1e-5, NAN, INF)},
    LayerNorm: {"eps": (0.0, 1.0, -1e-5, NAN, INF)},
    LinearScaling: {"factor": (0.0, -2.0, NAN, INF)},
    YarnScaling: {
        "factor": (0.99, NAN, INF),
        "original_context": (0, 1.5, True),
        "beta_fast": (1.0, 0.5, NAN, INF),
        "beta_slow": (0.0, -1.0, 32.0, NAN),
        "magnitude": (0.0, -1.0, NAN, INF),
    },
    Rope: {"theta": (1.0, 0.0, -5.0, NAN, INF), "dim": (0, 1, 3, -2, 4.0), "pairing": ("halves", None)},
    Attention: {
        "heads": (0, -2, 5, 1.0, True),
        "kv_heads": (0, 4, 12, 2.0),
        "head_dim": (0, 6, None),
        "window": (0, -1, 2.5, 2**31),
        "softcap": (0.0, -1.0, NAN, INF),
        "scale": (0.0, -0.5, NAN, INF),
    },
    MLP: {"size": (0, -1, 2.0, True), "activation": ("swish", "", None)},
    Block: {"residual": ("serial", None), "residual_scale": (NAN, INF)},
    Decoder: {
        "hidden": (0, True, 8.0),
        "vocab": (0, -1),
        "context": (0, 1e5, 2**31),
        "blocks": ((),),
        "embedding_scale": (0.0, NAN, INF),
        "logit_scale": (0.0, NAN, -INF),
        "logit_softcap": (0.0, -30.0, NAN, INF),
        "unused": ("blk.*",),
    },
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(kind, field, value) for kind, fields in WRONG.items() for field, values in fields.items() for value in values],
)
def test_a_field_out_of_range_is_refused_by_name_and_value(kind, field, value):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(GOOD[kind], **{field: value})
    message = str(error.value)
    assert message.startswith(kind.__name__)
    assert field in message or (kind is Attention and field == "head_dim" and "rope.dim" in message)
    assert (repr(value) in message) or value == ()


MISTYPED: dict[type, dict[str, tuple[Any, ...]]] = {
    Linear: {"weight": (None, 7, X), "bias": (("b",), 0)},
    Embedding: {"weight": (None,)},
    LearnedPositions: {"weight": (3,)},
    RMSNorm: {"weight": (X,), "eps": ("1e-5", None, True)},
    LayerNorm: {"bias": (X,)},
    LinearScaling: {"factor": ("2",)},
    YarnScaling: {"beta_fast": ("32",), "magnitude": (1j,)},
    Rope: {"theta": ("1e4",), "scaling": (2, "linear"), "factors": (5,)},
    FusedQKV: {"proj": ("qkv",)},
    SplitQKV: {"q": ("q",), "v": (None,)},
    Attention: {"qkv": ((X, X, X), X), "out": ("out",), "rope": (1e4,), "q_norm": ("norm",), "scale": ("3", 1j)},
    FusedGateUp: {"proj": (None,)},
    MLP: {"up": ("up",), "down": (None,), "gate": (FusedGateUp(X),)},
    Block: {"attn": (None,), "mlp": (X, MLP), "mlp_norm": (X,), "residual_scale": ("1",)},
    Decoder: {
        "tokens": ("e", X),
        "blocks": ("abc", None, (None,), {1}),
        "head": ("h", Embedding("h")),
        "positions": (Embedding("p"),),
        "logit_scale": ("1",),
        "unused": (None, (5,), {"x"}),
    },
}


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [(kind, field, value) for kind, each in MISTYPED.items() for field, values in each.items() for value in values],
)
def test_a_value_of_another_type_is_the_plugin_s_mistake_and_named(kind, field, value):
    good = GOOD.get(kind) or {SplitQKV: SplitQKV(X, X, X)}.get(kind) or kind("x" if "weight" in kind.__slots__ else X)
    with pytest.raises(PluginError, match=rf"^{kind.__name__}: {field} is .*, expected (a |[A-Z])"):
        dataclasses.replace(good, **{field: value})


def test_lists_become_tuples_and_numbers_of_numpy_are_numbers():
    decoder = dataclasses.replace(GOOD[Decoder], blocks=[GOOD[Block]], unused=["a", "b"])
    assert decoder.blocks == (GOOD[Block],)
    assert decoder.unused == ("a", "b")
    assert RMSNorm("norm", np.float32(1e-5)).eps == np.float32(1e-5)
    assert TensorSpec("t", (np.int64(3),)).shape == (3,)


def test_a_tensor_without_a_positive_size_may_be_the_file_s_fault():
    with pytest.raises(ConfigError, match=r"TensorSpec\(t\): shape is \[3, 0\], expected sizes above 0"):
        TensorSpec("t", (3, 0))


def test_contradictions_name_both_sides():
    with pytest.raises(ConfigError, match=r"heads is 6, expected a multiple of kv_heads \(4\)"):
        dataclasses.replace(GOOD[Attention], kv_heads=4)
    with pytest.raises(ConfigError, match=r"rope\.dim is 8, expected at most head_dim \(6\)"):
        dataclasses.replace(GOOD[Attention], head_dim=6)
    with pytest.raises(ConfigError, match=r"beta_slow is 40\.0 and beta_fast 32\.0"):
        YarnScaling(4.0, 32, beta_slow=40.0)
    with pytest.raises(ConfigError, match="gate is given beside a FusedGateUp"):
        MLP(size=4, up=FusedGateUp(X), gate=X, down=X, activation="silu")


def test_the_error_for_an_activation_lists_those_there_are():
    with pytest.raises(ConfigError) as error:
        MLP(size=4, up=X, down=X, activation="swish")  # type: ignore[arg-type]
    assert all(name in str(error.value) for name in ACTIVATIONS)


@pytest.mark.parametrize("kind", GOOD)
def test_descriptions_are_frozen_comparable_and_travel_between_processes(kind):
    value = GOOD[kind]
    assert pickle.loads(pickle.dumps(value)) == value
    assert hash(value) == hash(dataclasses.replace(value))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, dataclasses.fields(value)[0].name, None)


def shapes(specs: Any) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in specs}


def test_head_dim_stands_by_itself():
    split = SplitQKV(Linear("q", "q.b"), Linear("k", "k.b"), Linear("v", "v.b"))
    attn = Attention(heads=6, kv_heads=2, head_dim=5, qkv=split, out=Linear("o", "o.b"), q_norm=RMSNorm("qn", 1e-5))
    assert (attn.q_size, attn.kv_size) == (30, 10)
    assert shapes(attn.tensors(7)) == {
        "q": (30, 7),
        "q.b": (30,),
        "k": (10, 7),
        "k.b": (10,),
        "v": (10, 7),
        "v.b": (10,),
        "qn": (5,),
        "o": (7, 30),
        "o.b": (7,),
    }
    fused = dataclasses.replace(attn, qkv=FusedQKV(Linear("qkv")), q_norm=None)
    assert shapes(fused.tensors(7)) == {"qkv": (50, 7), "o": (7, 30), "o.b": (7,)}


def test_an_mlp_names_what_its_form_needs():
    up, down, gate = Linear("up"), Linear("down"), Linear("gate")
    plain = MLP(size=4, up=up, down=down, activation="relu")
    assert shapes(plain.tensors(3)) == {"up": (4, 3), "down": (3, 4)}
    assert not plain.gated
    gated = MLP(size=4, up=up, gate=gate, down=down, activation="silu")
    assert shapes(gated.tensors(3)) == {"gate": (4, 3), "up": (4, 3), "down": (3, 4)}
    fused = MLP(size=4, up=FusedGateUp(Linear("both")), down=down, activation="silu")
    assert shapes(fused.tensors(3)) == {"both": (8, 3), "down": (3, 4)}
    assert gated.gated
    assert fused.gated


def test_a_decoder_names_every_tensor_once_with_its_place_in_the_tree():
    rope = Rope(100.0, 4, "half", factors="factors")
    block = Block(
        attn_norm=LayerNorm("an", "an.b", 1e-5),
        attn=Attention(heads=2, kv_heads=1, head_dim=4, qkv=FusedQKV(Linear("qkv")), out=Linear("o"), rope=rope),
        mlp_norm=RMSNorm("mn", 1e-5),
        mlp=MLP(size=6, up=Linear("up"), down=Linear("down"), activation="relu"),
        post_attn_norm=RMSNorm("pan", 1e-5),
        post_mlp_norm=RMSNorm("pmn", 1e-5),
    )
    decoder = Decoder(
        hidden=8,
        vocab=10,
        context=16,
        tokens=Embedding("e"),
        positions=LearnedPositions("p"),
        embedding_norm=RMSNorm("en", 1e-5),
        blocks=(block,),
        final_norm=LayerNorm("fn", None, 1e-5),
        head=Linear("h", "h.b"),
    )
    assert list(decoder.tensors()) == [
        TensorSpec("e", (10, 8), "tokens"),
        TensorSpec("p", (16, 8), "positions"),
        TensorSpec("en", (8,), "embedding_norm"),
        TensorSpec("an", (8,), "blocks[0].attn_norm"),
        TensorSpec("an.b", (8,), "blocks[0].attn_norm"),
        TensorSpec("mn", (8,), "blocks[0].mlp_norm"),
        TensorSpec("qkv", (16, 8), "blocks[0].attn.qkv.proj"),
        TensorSpec("factors", (2,), "blocks[0].attn.rope.factors", shared=True),
        TensorSpec("o", (8, 8), "blocks[0].attn.out"),
        TensorSpec("up", (6, 8), "blocks[0].mlp.up"),
        TensorSpec("down", (8, 6), "blocks[0].mlp.down"),
        TensorSpec("pan", (8,), "blocks[0].post_attn_norm"),
        TensorSpec("pmn", (8,), "blocks[0].post_mlp_norm"),
        TensorSpec("fn", (8,), "final_norm"),
        TensorSpec("h", (10, 8), "head"),
        TensorSpec("h.b", (10,), "head"),
    ]
    tied = dataclasses.replace(decoder, head=None)
    assert [spec for spec in decoder.tensors() if spec.owner != "head"] == list(tied.tensors())


def test_kv_per_token_counts_layers_of_different_width():
    narrow = dataclasses.replace(GOOD[Attention], kv_heads=1)
    blocks = (GOOD[Block], dataclasses.replace(GOOD[Block], attn=narrow))
    decoder = dataclasses.replace(GOOD[Decoder], blocks=blocks)
    assert decoder.kv_values_per_token() == 2 * 2 * 8 + 2 * 1 * 8


def test_the_saving_of_gqa_is_heads_over_kv_heads():
    mha = dataclasses.replace(GOOD[Attention], heads=32, kv_heads=32)
    gqa = dataclasses.replace(mha, kv_heads=4)
    whole, grouped = (
        dataclasses.replace(GOOD[Decoder], blocks=(dataclasses.replace(GOOD[Block], attn=attn),)) for attn in (mha, gqa)
    )
    assert whole.kv_values_per_token() == 8 * grouped.kv_values_per_token()


def test_a_module_that_says_nothing_needs_no_scratch_and_admits_to_no_tensors():
    assert dict(Module().scratch(8)) == {}
    with pytest.raises(NotImplementedError, match="Module does not say which tensors it reads"):
        Module().tensors(8)


def test_every_class_of_the_tree_checks_its_fields():
    import polyhead.arch

    leaves = {thing for thing in vars(polyhead.arch).values() if dataclasses.is_dataclass(thing)}
    assert leaves - {Module, TensorSpec} == set(MISTYPED)
