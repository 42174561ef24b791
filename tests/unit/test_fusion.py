"""Steps joined for one row of tokens: which are, which must not be, and that what they read is not overwritten."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from polyhead.arch import MLP, Attention, Block, Decoder, Embedding, FusedGateUp, LayerNorm, Linear, RMSNorm, SplitQKV
from polyhead.runtime.cuda.fusion import (
    FusedAttend,
    FusedProject,
    JoinedStep,
    fuse_activation,
    fuse_attention,
    fuse_row,
)
from polyhead.runtime.program import Buffer, Embed, Normalise, Program, Project, lower, touched

SPLIT = SplitQKV(Linear("q"), Linear("k"), Linear("v"))
ATTN = Attention(heads=4, kv_heads=2, head_dim=6, qkv=SPLIT, out=Linear("o"))
GATED = MLP(size=10, up=Linear("up"), gate=Linear("gate"), down=Linear("down"), activation="silu")
PLAIN = MLP(size=10, up=Linear("up", "ub"), down=Linear("down", "db"), activation="gelu")
BLOCK = Block(attn_norm=RMSNorm("an", 1e-5), attn=ATTN, mlp_norm=RMSNorm("mn", 1e-5), mlp=GATED)
DECODER = Decoder(
    hidden=8, vocab=11, context=16, tokens=Embedding("e"), blocks=(BLOCK,), final_norm=RMSNorm("fn", 1e-5)
)
GPT = dataclasses.replace(BLOCK, attn_norm=LayerNorm("an", "ab", 1e-5), mlp_norm=LayerNorm("mn", "mb", 1e-5), mlp=PLAIN)
PARALLEL = dataclasses.replace(BLOCK, residual="parallel")
SHARED = dataclasses.replace(PARALLEL, mlp_norm=None)
POST = dataclasses.replace(BLOCK, post_attn_norm=RMSNorm("pa", 1e-5), post_mlp_norm=RMSNorm("pm", 1e-5))
BARE = dataclasses.replace(BLOCK, attn_norm=None, mlp_norm=None)
GATE_UP = dataclasses.replace(
    BLOCK, mlp=MLP(size=10, up=FusedGateUp(Linear("gu")), down=Linear("d"), activation="silu")
)


def of(*blocks: Block, **changes: object) -> Program:
    return lower(dataclasses.replace(DECODER, blocks=blocks, **changes))  # type: ignore[arg-type]


def joined(program: Program, fits: bool = True, norms: bool = True) -> list[JoinedStep]:
    return list(fuse_attention(fuse_row(program, lambda step, normed, gated: fits and (norms or not normed))))


def names(steps: Sequence[JoinedStep]) -> list[str]:
    return [step.name for step in steps]


@pytest.mark.parametrize("block", [BLOCK, GPT, GATE_UP])
def test_a_layer_of_one_row_is_five_steps(block: Block) -> None:
    steps = joined(of(block, block))
    layer = ["attn.qkv", "attn.attend", "attn.out", "mlp.act", "mlp.out"]
    expected = [f"blk.{index}.{name}" for index in range(2) for name in layer]
    assert names(steps) == ["embed", *expected, "head"]
    assert [type(step) for step in steps[1:6]] == [FusedProject, FusedAttend, *[FusedProject] * 3]
    head = steps[-1]
    assert isinstance(head, FusedProject)
    assert (head.norm is not None, head.src.name, head.dst.name) == (True, "x", "logits")


def test_a_norm_that_two_projections_read_is_done_by_both() -> None:
    steps = joined(of(SHARED))
    normed = [step for step in steps if isinstance(step, FusedProject) and step.norm is not None]
    assert names(normed) == ["blk.0.attn.qkv", "blk.0.mlp.act", "head"]
    assert normed[0].norm == normed[1].norm


def test_norms_of_branches_stay() -> None:
    kept = [step for step in joined(of(POST)) if isinstance(step, Normalise)]
    assert names(kept) == ["blk.0.attn.post_norm", "blk.0.mlp.post_norm"]


def test_a_projection_of_the_residual_stream_itself_is_left_as_it_is() -> None:
    steps = joined(of(BARE, final_norm=None))
    plain = [step for step in steps if isinstance(step, Project)]
    assert names(plain) == ["blk.0.attn.qkv", "blk.0.mlp.up", "head"]


def test_what_does_not_fit_is_left_as_it_is() -> None:
    program = of(BLOCK)
    steps = joined(program, fits=False)
    assert not any(isinstance(step, FusedProject) for step in steps)
    assert [step for step in program.steps if isinstance(step, Normalise | Project)][:-2] == [
        step for step in steps if isinstance(step, Normalise | Project)
    ][:-2]


def test_a_gate_that_does_not_fit_keeps_the_norm_and_leaves_the_activation() -> None:
    steps = fuse_row(of(BLOCK), lambda step, normed, gated: not gated)
    assert [step.name for step in steps if step.name.startswith("blk.0.mlp")] == [
        "blk.0.mlp.up",
        "blk.0.mlp.act",
        "blk.0.mlp.out",
    ]
    up = next(step for step in steps if step.name == "blk.0.mlp.up")
    assert isinstance(up, FusedProject)
    assert up.norm is not None


def test_a_norm_whose_source_changes_before_the_projection_stays() -> None:
    program = of(BLOCK)
    norm = next(step for step in program.steps if step.name == "blk.0.attn_norm")
    assert isinstance(norm, Normalise)
    again = Embed("again", norm.src, DECODER.tokens, None, 1.0)
    at = program.steps.index(norm) + 1
    changed = Program(program.decoder, (*program.steps[:at], again, *program.steps[at:]), program.logits)
    assert "blk.0.attn_norm" in names(joined(changed))


@pytest.mark.parametrize("block", [BLOCK, GPT, PARALLEL, SHARED, POST, BARE, GATE_UP])
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("norms", [True, False])
def test_what_a_joined_step_reads_shares_no_bytes_with_what_it_writes(block: Block, rows: int, norms: bool) -> None:
    program = of(block, block)
    space = program.workspace(rows, rows, narrow_bytes=2)

    def span(buffer: Buffer) -> range:
        start = space.offsets[buffer.name]
        return range(start, start + buffer.columns * (4 if buffer.wide else 2))

    alive = {step.name: step for step in program.steps}
    for step in joined(program, norms=norms):
        if isinstance(step, FusedProject) and step.src != step.dst:
            one, other = span(step.src), span(step.dst)
            assert max(one.start, other.start) >= min(one.stop, other.stop), step.name
        if isinstance(step, FusedAttend):
            one, other = span(step.store.qkv), span(step.dst)
            assert max(one.start, other.start) >= min(one.stop, other.stop), step.name
    # and what a later step still reads is not overwritten: the lives cover every joined step
    lives = program.buffers()
    order = {name: index for index, name in enumerate(alive)}
    for step in joined(program, norms=norms):
        for buffer in (
            (step.src, step.dst)
            if isinstance(step, FusedProject)
            else touched(step)
            if not isinstance(step, FusedAttend)
            else ()
        ):
            _, first, last = lives[buffer.name]
            assert first <= order[step.name] <= last


@pytest.mark.parametrize("block", [BLOCK, PARALLEL, SHARED, POST])
def test_what_a_norm_reads_lives_as_long_as_its_result(block: Block) -> None:
    program = of(block, block)
    lives = program.buffers()
    for step in program.steps:
        if isinstance(step, Normalise):
            assert lives[step.src.name][2] >= lives[step.dst.name][2], step.name


@pytest.mark.parametrize("block", [BLOCK, GPT, GATE_UP, PARALLEL, SHARED, POST, BARE])
def test_of_many_rows_a_projection_and_its_activation_are_one_step(block: Block) -> None:
    program = of(block, block)
    steps = fuse_activation(program.steps)
    fused = [step for step in steps if isinstance(step, FusedProject)]
    assert [step.name for step in fused] == ["blk.0.mlp.act", "blk.1.mlp.act"]
    assert len(steps) == len(program.steps) - 2
    lives = program.buffers()
    for step in fused:
        assert step.norm is None
        assert step.activate is not None
        at = program.steps.index(step.activate)
        assert lives[step.src.name][2] >= at, "what it reads while it writes must not be given away"


def test_an_activation_whose_input_is_read_again_stays_alone() -> None:
    program = of(BLOCK)
    up = next(step for step in program.steps if isinstance(step, Project) and step.name == "blk.0.mlp.up")
    reader = dataclasses.replace(program.steps[-1], name="reader", src=up.dst)
    assert any(isinstance(step, FusedProject) for step in fuse_activation(program.steps))
    assert not any(isinstance(step, FusedProject) for step in fuse_activation((*program.steps, reader)))
    scaled = tuple(dataclasses.replace(step, scale=2.0) if step is up else step for step in program.steps)
    assert not any(isinstance(step, FusedProject) for step in fuse_activation(scaled))


def test_factors_are_floats_whatever_was_written() -> None:
    """A kernel takes the bits of an int for those of a float."""
    block = dataclasses.replace(BLOCK, residual_scale=2)
    post = dataclasses.replace(POST, residual_scale=2)
    program = of(block, post, embedding_scale=3, logit_scale=4, logit_softcap=30)
    found = [getattr(step, name) for step in program.steps for name in ("scale", "softcap") if hasattr(step, name)]
    assert {2.0, 3.0, 4.0, 30.0} <= set(found)
    assert all(type(value) is float for value in found if value is not None)
