"""Claims: every tensor of a file is claimed once or listed as unused, and one error says all that is wrong."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import random_decoders
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import Info
from polyhead.arch import MLP, Attention, Block, Decoder, Embedding, FusedQKV, Linear, RMSNorm, Rope
from polyhead.errors import TensorError
from polyhead.weights import claim

ROPE = Rope(100.0, 4, "half", factors="rope_freqs")


def block(index: int, rope: Rope | None = ROPE) -> Block:
    qkv, out, up, down = (Linear(f"blk.{index}.{name}") for name in ("qkv", "out", "up", "down"))
    return Block(
        attn_norm=RMSNorm(f"blk.{index}.norm", 1e-5),
        attn=Attention(heads=2, kv_heads=1, head_dim=4, qkv=FusedQKV(qkv), out=out, rope=rope),
        mlp_norm=None,
        mlp=MLP(size=6, up=up, down=down, activation="relu"),
    )


DECODER = Decoder(
    hidden=8,
    vocab=10,
    context=16,
    tokens=Embedding("embed"),
    blocks=(block(0), block(1)),
    final_norm=RMSNorm("norm", 1e-5),
    unused=("blk.*.rot", "old"),
)


def infos(decoder: Decoder = DECODER) -> dict[str, Info]:
    return {spec.name: Info(spec.shape) for spec in decoder.tensors()}


def problems(decoder: Decoder, tensors: dict[str, Info]) -> list[str]:
    with pytest.raises(TensorError) as error:
        claim(decoder, tensors)
    first, *lines = str(error.value).split("\n")
    assert first == "the file's tensors do not fit the architecture:"
    return [line.strip() for line in lines]


def test_claims_follow_the_tree_and_share_only_what_says_so():
    claims = claim(DECODER, infos())
    assert claims.specs == tuple(DECODER.tensors())
    assert claims.unused == ()
    assert [spec.owner for spec in claims.specs if spec.name == "rope_freqs"] == [
        "blocks[0].attn.rope.factors",
        "blocks[1].attn.rope.factors",
    ]


@settings(max_examples=30, deadline=None)
@given(decoder=random_decoders.decoders(), data=st.data())
def test_any_decoder_fits_its_own_tensors_and_misses_any_that_is_taken_away(decoder, data):
    whole = infos(decoder)
    assert claim(decoder, whole).specs == tuple(decoder.tensors())
    gone = data.draw(st.sampled_from(sorted(whole)))
    lines = problems(decoder, {name: info for name, info in whole.items() if name != gone})
    assert len(lines) == 1
    assert lines[0].startswith(f"missing: {gone} [")


def test_a_missing_tensor_is_named_with_shape_and_reader():
    tensors = infos()
    del tensors["blk.1.up"]
    assert problems(DECODER, tensors) == ["missing: blk.1.up [6, 8], which blocks[1].mlp.up reads"]


def test_a_missing_tensor_that_goes_by_a_similar_name_is_recognised():
    tensors = infos()
    tensors["blk.1.ups"] = tensors.pop("blk.1.up")
    assert problems(DECODER, tensors) == [
        "missing: blk.1.up [6, 8], which blocks[1].mlp.up reads; the file has blk.1.ups",
        "not claimed: blk.1.ups [6, 8], which nothing in this architecture reads",
    ]


def test_a_norm_over_all_heads_is_told_apart_from_one_on_each():
    norms = {"q_norm": RMSNorm("q_norm", 1e-5), "k_norm": RMSNorm("k_norm", 1e-5)}
    first, second = DECODER.blocks
    normed = dataclasses.replace(first, attn=dataclasses.replace(first.attn, **norms))
    decoder = dataclasses.replace(DECODER, blocks=(normed, second))
    assert problems(decoder, {**infos(decoder), "q_norm": Info((8,)), "k_norm": Info((2, 4))}) == [
        "wrong shape: q_norm is [8] in the file, blocks[0].attn.q_norm needs [4]",
        "wrong shape: k_norm is [2, 4] in the file, blocks[0].attn.k_norm needs [4]",
        "q_norm and k_norm act on each head by itself, with one weight [head_dim] for all heads; a norm over all heads "
        "at once, or with weights for each head, is not in the vocabulary",
    ]
    others = problems(decoder, {**infos(decoder), "norm": Info((4,))})
    assert others == ["wrong shape: norm is [4] in the file, final_norm needs [8]"]


def test_a_tensor_that_nobody_reads_is_refused_unless_the_architecture_lists_it():
    tensors = infos() | {"blk.0.rot": Info((4,)), "old": Info((1,))}
    assert claim(DECODER, tensors).unused == ("blk.0.rot", "old")
    # A pattern matches whole names, and case counts.
    for name in ("blk.0.rots", "older", "OLD", "blk.0.rot.bias"):
        assert problems(DECODER, {**tensors, name: Info((2, 3))}) == [
            f"not claimed: {name} [2, 3], which nothing in this architecture reads"
        ]


def test_a_pattern_never_hides_a_tensor_that_is_read():
    greedy = dataclasses.replace(DECODER, unused=("*",))
    assert claim(greedy, infos()).unused == ()
    assert claim(greedy, infos() | {"anything": Info((1,))}).unused == ("anything",)
    tensors = infos()
    del tensors["norm"]
    assert problems(greedy, tensors) == ["missing: norm [8], which final_norm reads"]


@pytest.mark.parametrize("shape", [(8, 6), (6, 9), (6,), (6, 8, 1), (48,)])
def test_a_wrong_shape_shows_both(shape):
    shown = ", ".join(map(str, shape))
    assert problems(DECODER, infos() | {"blk.0.up": Info(shape)}) == [
        f"wrong shape: blk.0.up is [{shown}] in the file, blocks[0].mlp.up needs [6, 8]"
    ]


def test_a_tensor_of_two_leaves_names_both():
    twice = dataclasses.replace(DECODER, head=Linear("embed"))
    assert problems(twice, infos()) == ["claimed twice: embed, by tokens and by head"]


def test_shared_factors_must_agree_in_shape_and_both_say_shared():
    wider = dataclasses.replace(block(1).attn, head_dim=8, rope=dataclasses.replace(ROPE, dim=8))
    uneven = dataclasses.replace(DECODER, blocks=(block(0), dataclasses.replace(block(1), attn=wider)))
    tensors = infos(uneven)
    tensors["rope_freqs"] = Info((2,))
    assert problems(uneven, tensors) == [
        "claimed twice: rope_freqs, by blocks[0].attn.rope.factors and by blocks[1].attn.rope.factors"
    ]
    stolen = dataclasses.replace(DECODER, final_norm=RMSNorm("rope_freqs", 1e-5))
    assert any(
        "claimed twice: rope_freqs, by blocks[0].attn.rope.factors and by final_norm" in line
        for line in problems(stolen, infos())
    )


def test_everything_wrong_is_in_one_error():
    tensors = infos() | {"extra": Info((1,)), "norm": Info((9,))}
    del tensors["blk.0.out"]
    lines = problems(dataclasses.replace(DECODER, head=Linear("embed")), tensors)
    assert sorted(line.split(":")[0] for line in lines) == ["claimed twice", "missing", "not claimed", "wrong shape"]


def test_many_problems_are_counted_and_not_all_listed():
    tensors = infos() | {f"extra.{i}": Info((1,)) for i in range(500)}
    lines = problems(DECODER, tensors)
    assert len(lines) == 21
    assert lines[-1] == "and 480 more"


def test_a_file_of_very_many_names_is_refused_quickly():
    blocks = tuple(block(index) for index in range(2000))
    decoder = dataclasses.replace(DECODER, blocks=blocks)
    tensors = {f"blk.{i}.upp": Info((1,)) for i in range(50_000)} | {f"blk.{i}.rot": Info((1,)) for i in range(50_000)}
    start = time.perf_counter()
    lines = problems(decoder, tensors)
    assert time.perf_counter() - start < 10
    assert lines[-1].endswith("more")


def test_values_are_never_read():
    class Untouchable(Info):
        @property
        def nbytes(self) -> int:
            raise AssertionError("claim asked for bytes")

    claim(DECODER, {name: Untouchable(info.shape) for name, info in infos().items()})
    assert claim(DECODER, {n: Info(tuple(map(np.int64, i.shape))) for n, i in infos().items()})
