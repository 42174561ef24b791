"""Steps that hold decodes beside chunks of prompts, without a GPU: who is served by which attention, and which rows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.arch import MLP, Attention, Block, Decoder, Embedding, Linear, RMSNorm, SplitQKV
from polyhead.engine import BlockManager, Request, SamplingParams, Scheduler
from polyhead.runtime.contract import Batch
from polyhead.runtime.cuda import inputs as inputs_module
from polyhead.runtime.cuda.inputs import Inputs, leading_singles
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.run import Run
from polyhead.runtime.cuda.steps import Steps
from polyhead.runtime.program import Attend, Program, StoreKV, lower

HEADS, KV_HEADS, DIM, BLOCK_SIZE, SPARE = 4, 2, 16, 8, 99
COLUMNS = (HEADS + 2 * KV_HEADS) * DIM


class FakeDevice:
    """What Inputs and ops ask of a device; remembers what was copied to where."""

    sms, shared_limit, cc = 132, 227 << 10, (9, 0)

    def __init__(self) -> None:
        self.copied: dict[int, np.ndarray] = {}

    def copy_in(self, to: Array, values: np.ndarray) -> None:
        self.copied[to.ptr] = values.reshape(-1).copy()

    def read(self, array: Array) -> np.ndarray:
        """The integers of an array that came with a copy."""
        start = max(ptr for ptr in self.copied if ptr <= array.ptr)
        first = (array.ptr - start) // 4
        return self.copied[start][first : first + array.size].reshape(array.shape)


class FakePool:
    """Addresses without memory."""

    def __init__(self) -> None:
        self.end = 1 << 20

    def array(self, shape: tuple[int, ...] | int, dtype: str, zero: bool = False) -> Array:
        made = Array(self.end, (shape,) if isinstance(shape, int) else shape, dtype)
        self.end += -(-made.nbytes // 256) * 256
        return made


class FakeHost:
    def __init__(self, device: FakeDevice, nbytes: int) -> None:
        pass

    def array(self, dtype: type, *shape: int) -> np.ndarray:
        return np.zeros(shape, dtype)


class FakeContext:
    """Remembers launches: (kernel, grid, arguments)."""

    def __init__(self) -> None:
        self.device = FakeDevice()
        self.launches: list[tuple[str, tuple[int, int, int], tuple]] = []

    def launch(self, file: str, kernel: str, grid: tuple[int, int, int], block: int, *args, **more) -> None:
        self.launches.append((kernel, grid, args))


@pytest.fixture
def ctx(monkeypatch: pytest.MonkeyPatch) -> FakeContext:
    monkeypatch.setattr(inputs_module, "HostBuffer", FakeHost)
    return FakeContext()


def batch_of(pieces: list[tuple[int, int]], logits: list[int] | None = None) -> Batch:
    """Sequences of (new tokens, context), with the logits of each one's last row by default."""
    lengths = [new for new, _ in pieces]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return Batch(
        tokens=np.arange(starts[-1], dtype=np.int32),
        positions=np.concatenate([np.arange(context - new, context) for new, context in pieces]).astype(np.int32),
        query_start=starts,
        context_lens=np.array([context for _, context in pieces], np.int32),
        block_tables=10 * np.arange(1, len(pieces) + 1, dtype=np.int32)[:, None] + np.arange(20, dtype=np.int32),
        logit_rows=starts[1:] - 1 if logits is None else np.array(logits, np.int32),
    )


def load(ctx: FakeContext, batch: Batch, *, decode: bool = False, bucket: int = 0, tile_singles: bool = False):
    room = Inputs(ctx, FakePool(), 256, 16, 16, 32, tile_singles=tile_singles)
    return room.load(batch, decode, bucket, 32, SPARE)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [([1, 1, 5, 1], 2), ([5, 1, 1], 0), ([1], 1), ([1, 1, 1], 3), ([2], 0), ([1, 0, 1], 1)],
)
def test_singles_are_the_sequences_of_one_token_before_the_first_longer_one(lengths, expected):
    assert leading_singles(np.cumsum([0, *lengths]).astype(np.int32)) == expected


def test_a_mixed_step_has_tiles_for_all_but_its_leading_singles(ctx):
    view = load(ctx, batch_of([(1, 30), (1, 9), (70, 70), (1, 140), (3, 20)]))
    assert (view.singles, view.sequences_count, view.count, view.rows, view.decode) == (2, 5, 76, 5, False)
    assert ctx.device.read(view.tiles).tolist() == [[3, 72], [2, 66], [2, 2], [4, 73]]
    assert ctx.device.read(view.query_start).tolist() == [0, 1, 2, 72, 73, 76]
    assert ctx.device.read(view.context_lens).tolist() == [30, 9, 70, 140, 20]
    assert ctx.device.read(view.sequences).tolist() == [0, 1, *[2] * 70, 3, 4, 4, 4]
    assert ctx.device.read(view.logit_rows).tolist() == [0, 1, 71, 72, 75]
    assert ctx.device.read(view.block_tables)[3, :3].tolist() == [40, 41, 42]


def test_a_step_of_prompts_has_no_singles_and_one_of_decodes_no_tiles(ctx):
    assert load(ctx, batch_of([(5, 5), (1, 8)])).singles == 0
    view = load(ctx, batch_of([(1, 30), (1, 9), (1, 1)]), decode=True, bucket=4)
    assert (view.singles, view.sequences_count, view.tiles.shape) == (4, 4, (0, 2))


def test_where_results_may_not_depend_on_the_batch_every_sequence_has_tiles(ctx):
    view = load(ctx, batch_of([(1, 30), (70, 70)]), tile_singles=True)
    assert view.singles == 0
    assert sorted(ctx.device.read(view.tiles).tolist()) == [[0, 0], [1, 1], [1, 65]]
    view = load(ctx, batch_of([(1, 30), (1, 9)]), decode=True, bucket=2, tile_singles=True)
    assert (view.singles, view.tiles.shape) == (0, (2, 2))


def attention_alone() -> Program:
    """A program of nothing but one layer's StoreKV and Attend."""
    attn = Attention(HEADS, KV_HEADS, DIM, SplitQKV(Linear("q"), Linear("k"), Linear("v")), Linear("o"))
    block = Block(RMSNorm("n", 1e-5), attn, RMSNorm("m", 1e-5), MLP(64, Linear("u"), Linear("d"), "gelu"))
    whole = lower(Decoder(HEADS * DIM, 40, 256, Embedding("e"), (block,), None))
    return Program(whole.decoder, tuple(s for s in whole.steps if isinstance(s, StoreKV | Attend)), whole.logits)


def run(ctx: FakeContext, batch: Batch, *, deterministic: bool = False, **how) -> dict[str, tuple]:
    """Runs a step and returns what each kernel was launched with, in order."""
    program, pool = attention_alone(), FakePool()
    cache = (200, KV_HEADS, BLOCK_SIZE, DIM)
    kv = SimpleNamespace(layers=[(pool.array(cache, "f16"), pool.array(cache, "f16"))], scales=[None])
    room = (pool.array(1 << 20, "u8"), pool.array(16 * KV_HEADS, "i32"))
    nothing = SimpleNamespace()
    steps = Steps(ctx, program, nothing, nothing, {}, kv, nothing, room, "f16", deterministic)
    view = load(ctx, batch, tile_singles=deterministic, **how)
    qkv = next(step for step in program.steps if isinstance(step, StoreKV)).qkv
    out = next(step for step in program.steps if isinstance(step, Attend)).dst
    rows = Run(view, pool.array(1 << 20, "u8"), {qkv.name: 0, out.name: 1 << 19}, "f16")
    steps.run(rows)
    assert len({kernel for kernel, _, _ in ctx.launches}) == len(ctx.launches)
    found = {kernel: (grid, args) for kernel, grid, args in ctx.launches}
    return found | {"qkv": rows[qkv], "out": rows[out], "view": view}


def test_a_mixed_step_decodes_its_singles_and_stores_and_tiles_the_others(ctx):
    found = run(ctx, batch_of([(1, 30), (1, 9), (70, 70), (3, 20)]))
    assert [kernel for kernel, _, _ in ctx.launches] == ["ph_attend_decode", "ph_store_kv", "ph_attend_prefill"]
    view, qkv, out = found["view"], found["qkv"], found["out"]

    grid, args = found["ph_attend_decode"]
    assert grid[:2] == (KV_HEADS, 2)
    assert (args[0], args[3]) == (Array(qkv.ptr, (2, COLUMNS), "f16"), Array(out.ptr, (2, HEADS * DIM), "f16"))
    assert [array.shape[0] for array in args[4:7]] == [2, 2, 2]
    assert [array.ptr for array in args[4:7]] == [view.positions.ptr, view.context_lens.ptr, view.block_tables.ptr]

    grid, args = found["ph_store_kv"]
    assert grid[0] == 73
    assert args[0] == Array(qkv.ptr + 2 * 2 * COLUMNS, (73, COLUMNS), "f16")
    positions, sequences, tables = args[3:6]
    assert ctx.device.read(positions)[[0, 69, 70, 72]].tolist() == [0, 69, 17, 19]
    assert ctx.device.read(sequences)[[0, 69, 70, 72]].tolist() == [2, 2, 3, 3]
    assert tables == view.block_tables  # whole: sequences are numbered from the step's first one

    grid, args = found["ph_attend_prefill"]
    assert grid == (HEADS, 3, 1)
    assert (args[0], args[3]) == (qkv, out)  # whole: tiles name rows of the step
    assert args[4:8] == (view.tiles, view.query_start, view.context_lens, view.block_tables)


def test_other_steps_launch_what_they_need_and_no_more(ctx):
    kernels = {
        "of prompts": (batch_of([(5, 5), (1, 9)]), {}, ["ph_store_kv", "ph_attend_prefill"]),
        "of decodes": (batch_of([(1, 5), (1, 9)]), {"decode": True, "bucket": 2}, ["ph_attend_decode"]),
        "of singles": (batch_of([(1, 5), (1, 9)], logits=[1]), {}, ["ph_attend_decode"]),
        "deterministic": (
            batch_of([(1, 5), (7, 9)]), {"deterministic": True}, ["ph_store_kv", "ph_attend_prefill"],
        ),
    }  # fmt: skip
    for name, (batch, how, expected) in kernels.items():
        ctx.launches.clear()
        run(ctx, batch, **how)
        assert [kernel for kernel, _, _ in ctx.launches] == expected, name


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6)), min_size=1, max_size=8), st.integers(8, 40))
def test_the_decodes_of_a_scheduled_step_lead_it(requests, most):
    scheduler = Scheduler(BlockManager(200, 4), most, 8, 64)
    for number, (prompt, length) in enumerate(requests):
        params = SamplingParams(max_tokens=length, ignore_eos=True)
        scheduler.add(Request(f"r{number}", [1 + number] * prompt, params))
    while scheduler.has_work:
        step = scheduler.schedule()
        starts = np.array(step.query_start, np.int32)
        assert leading_singles(starts) >= step.decodes
        assert step.logit_rows[: step.decodes] == list(range(step.decodes))
        scheduler.postprocess(step, [1] * step.num_choices)
