"""A Decoder lowered to steps: their order, what they read, and buffers that never run into each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import memory_source
import numpy as np
import pytest
import random_decoders
from hypothesis import given, settings
from polyhead.arch import (
    MLP,
    Attention,
    Block,
    Decoder,
    Embedding,
    FusedGateUp,
    FusedQKV,
    LearnedPositions,
    Linear,
    Module,
    RMSNorm,
    SplitQKV,
    TensorSpec,
)
from polyhead.runtime.contract import Batch, RuntimeOptions
from polyhead.runtime.cpu.model import CpuModel
from polyhead.runtime.modules import ModuleKind
from polyhead.runtime.program import (
    Activate,
    Add,
    Apply,
    Attend,
    Buffer,
    Embed,
    Finish,
    Gather,
    Normalise,
    Program,
    Project,
    StoreKV,
    lower,
    touched,
)

SPLIT = SplitQKV(Linear("q"), Linear("k"), Linear("v"))
ATTN = Attention(heads=4, kv_heads=2, head_dim=6, qkv=SPLIT, out=Linear("o"))
GATED = MLP(size=10, up=Linear("up"), gate=Linear("gate"), down=Linear("down"), activation="silu")
BLOCK = Block(attn_norm=RMSNorm("an", 1e-5), attn=ATTN, mlp_norm=RMSNorm("mn", 1e-5), mlp=GATED)
DECODER = Decoder(
    hidden=8, vocab=11, context=16, tokens=Embedding("e"), blocks=(BLOCK,), final_norm=RMSNorm("fn", 1e-5)
)


@dataclass(frozen=True)
class Scaled(Module):
    """A layer of a plugin's own: y = x · weight, with scratch to copy through."""

    weight: str = "w"

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        yield TensorSpec(self.weight, (hidden,))

    def scratch(self, hidden: int) -> Mapping[str, int]:
        return {"branch": 3, "second": hidden}


def of(block: Block = BLOCK, **changes: object) -> Program:
    return lower(dataclasses.replace(DECODER, blocks=(block,), **changes))


def kinds(program: Program) -> list[type]:
    return [type(step) for step in program.steps]


def test_a_sequential_block_adds_each_branch_before_the_next_reads():
    program = of()
    assert kinds(program) == [
        Embed,
        *(Normalise, Project, StoreKV, Attend, Project),
        *(Normalise, Project, Activate, Project),
        *(Gather, Normalise, Project),
    ]
    assert [step.name for step in program.steps] == [
        "embed",
        *("blk.0.attn_norm", "blk.0.attn.qkv", "blk.0.attn.store_kv", "blk.0.attn.attend", "blk.0.attn.out"),
        *("blk.0.mlp_norm", "blk.0.mlp.up", "blk.0.mlp.act", "blk.0.mlp.out"),
        *("gather", "final_norm", "head"),
    ]
    steps = {step.name: step for step in program.steps}
    x = steps["embed"].dst
    assert steps["blk.0.attn.out"].dst == steps["blk.0.mlp.out"].dst == x
    assert steps["blk.0.attn.out"].accumulate
    assert steps["blk.0.mlp.out"].accumulate
    assert steps["blk.0.mlp_norm"].src == x


def test_a_parallel_block_adds_nothing_before_both_branches_have_read():
    parallel = dataclasses.replace(BLOCK, residual="parallel", mlp_norm=None)
    program = of(parallel)
    steps = list(program.steps)
    x = steps[0].dst
    writes = [i for i, step in enumerate(steps) if isinstance(step, Project | Add) and step.dst == x]
    reads = [i for i, step in enumerate(steps) if isinstance(step, Normalise) and step.src == x]
    assert max(reads) < min(writes)
    assert [type(steps[i]) for i in writes] == [Project, Add]
    # Without a norm of its own the MLP shares the attention's.
    up = next(step for step in steps if step.name == "blk.0.mlp.up")
    assert up.src == next(step for step in steps if step.name == "blk.0.attn_norm").dst


def test_weights_that_read_the_same_rows_are_projected_together():
    steps = {step.name: step for step in of().steps}
    assert [weight.weight for weight in steps["blk.0.attn.qkv"].weights] == ["q", "k", "v"]
    assert steps["blk.0.attn.qkv"].rows == (24, 12, 12)
    assert [weight.weight for weight in steps["blk.0.mlp.up"].weights] == ["gate", "up"]
    assert steps["blk.0.mlp.up"].rows == (10, 10)
    fused_mlp = MLP(size=10, up=FusedGateUp(Linear("both")), down=Linear("down"), activation="silu")
    fused_attn = dataclasses.replace(ATTN, qkv=FusedQKV(Linear("qkv")))
    fused = {step.name: step for step in of(dataclasses.replace(BLOCK, attn=fused_attn, mlp=fused_mlp)).steps}
    assert fused["blk.0.attn.qkv"].rows == (48,)
    assert fused["blk.0.mlp.up"].rows == (20,)
    for name in ("blk.0.attn.qkv", "blk.0.mlp.up"):
        assert fused[name].dst == steps[name].dst
    assert fused["blk.0.mlp.act"].gated


def test_a_tied_head_reads_the_embedding():
    head = next(step for step in of().steps if step.name == "head")
    assert head.weights == (Embedding("e"),)
    own = next(step for step in of(head=Linear("h", "h.b")).steps if step.name == "head")
    assert own.weights == (Linear("h", "h.b"),)


def test_scale_cap_positions_and_norms_appear_only_where_asked_for():
    assert Finish not in kinds(of())
    finish = of(logit_scale=0.5, logit_softcap=30.0).steps[-1]
    assert (finish.scale, finish.softcap) == (0.5, 30.0)
    embed = of(positions=LearnedPositions("p"), embedding_scale=3.0, embedding_norm=RMSNorm("en", 1e-5)).steps[:2]
    assert (embed[0].positions, embed[0].scale, embed[1].name) == (LearnedPositions("p"), 3.0, "embed_norm")
    assert "final_norm" not in [step.name for step in of(final_norm=None).steps]


def test_post_norms_stand_between_a_branch_and_the_residual():
    block = dataclasses.replace(
        BLOCK, post_attn_norm=RMSNorm("pa", 1e-5), post_mlp_norm=RMSNorm("pm", 1e-5), residual_scale=0.5
    )
    steps = {step.name: step for step in of(block).steps}
    x = steps["embed"].dst
    for branch in ("attn", "mlp"):
        assert steps[f"blk.0.{branch}.out"].dst != x
        assert not steps[f"blk.0.{branch}.out"].accumulate
        assert (steps[f"blk.0.{branch}.add"].dst, steps[f"blk.0.{branch}.add"].scale) == (x, 0.5)


@settings(max_examples=40, deadline=None)
@given(decoder=random_decoders.decoders())
def test_names_are_unique_and_nothing_is_read_before_it_is_written(decoder):
    program = lower(decoder)
    names = [step.name for step in program.steps]
    assert len(set(names)) == len(names)
    written: set[str] = set()
    columns: dict[str, Buffer] = {}
    for step in program.steps:
        sources = [step.src] if hasattr(step, "src") else []
        sources += [step.qkv] if isinstance(step, StoreKV | Attend) else []
        sources += [step.dst] if getattr(step, "accumulate", False) or isinstance(step, Add | Finish) else []
        assert {buffer.name for buffer in sources} <= written, step
        written |= {buffer.name for buffer in touched(step)}
        for buffer in touched(step):
            assert columns.setdefault(buffer.name, buffer) == buffer
    assert program.logits.name in written


@settings(max_examples=40, deadline=None)
@given(decoder=random_decoders.decoders())
def test_every_tensor_of_the_tree_is_used_by_a_step(decoder):
    def names(value: object) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, tuple):
            for item in value:
                yield from names(item)
        elif dataclasses.is_dataclass(value) and not isinstance(value, Buffer):
            for field in dataclasses.fields(value):
                yield from names(getattr(value, field.name))

    used = {name for step in lower(decoder).steps for name in names(step)}
    assert {spec.name for spec in decoder.tensors()} <= used


def test_the_workspace_grows_with_rows_and_reuses_bytes_between_layers():
    one = of()
    many = lower(dataclasses.replace(DECODER, blocks=(BLOCK,) * 20))
    small, large = one.workspace(1, 1).size, one.workspace(64, 1).size
    assert small < large
    assert many.workspace(64, 1).size == large
    # Never less than what must exist at once: the residual stream beside the widest pair of neighbours.
    assert large >= 4 * 64 * (8 + 48 + 24)
    # Logits have a row for each that is wanted, not for each token.
    wordy = of(vocab=1000)
    assert wordy.workspace(64, 1).size < wordy.workspace(64, 64).size >= 4 * 64 * 1000


def test_a_module_gets_its_own_output_and_scratch():
    program = of(dataclasses.replace(BLOCK, mlp=Scaled()))
    apply = next(step for step in program.steps if isinstance(step, Apply))
    assert apply.module == Scaled()
    assert [(name, buffer.columns) for name, buffer in apply.scratch] == [("branch", 3), ("second", 8)]
    add = program.steps[program.steps.index(apply) + 1]
    assert isinstance(add, Add)
    assert (add.src, add.dst) == (apply.dst, program.steps[0].dst)
    offsets = program.workspace(5, 5).offsets
    spans = [(offsets[b.name], offsets[b.name] + 20 * b.columns) for b in touched(apply)]
    for i, (start, end) in enumerate(spans):
        assert all(end <= other or other_end <= start for other, other_end in spans[:i])


@pytest.mark.parametrize("residual", ["sequential", "parallel"])
def test_a_module_may_scribble_over_all_of_its_scratch(residual):
    block = dataclasses.replace(BLOCK, mlp=Scaled(), residual=residual)
    decoder = dataclasses.replace(DECODER, blocks=(block,))
    weights = memory_source.random_weights(decoder, 1)

    def kind(scribble: bool) -> ModuleKind:
        def load(spec: Scaled, arrays: Mapping[str, np.ndarray]):
            def run(x: np.ndarray, out: np.ndarray, scratch: Mapping[str, np.ndarray]) -> None:
                assert {name: array.shape for name, array in scratch.items()} == {
                    "branch": (len(x), 3),
                    "second": (len(x), 8),
                }
                for array in scratch.values() if scribble else ():
                    array[...] = np.nan
                np.multiply(x, arrays[spec.weight], out=out)

            return run

        return ModuleKind(Scaled, load)

    ids = np.array([1, 5, 3], np.int32)
    batch = Batch(
        tokens=ids,
        positions=np.arange(3, dtype=np.int32),
        query_start=np.array([0, 3], np.int32),
        context_lens=np.array([3], np.int32),
        block_tables=np.zeros((1, 1), np.int32),
        logit_rows=np.arange(3, dtype=np.int32),
    )
    clean, scribbled = (
        CpuModel(decoder, memory_source.MemorySource(weights), RuntimeOptions(max_batch=4), {Scaled: kind(how)}).logits(
            batch
        )
        for how in (False, True)
    )
    assert np.isfinite(clean).all()
    np.testing.assert_array_equal(clean, scribbled)
