"""CudaModel: a program carried out on a GPU. A step of a shape that was seen before replays a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...arch import Decoder, Module, Rope
from ...errors import DeviceError, RequestError
from ..batch_checks import check_batch
from ..contract import Batch, Pending, RuntimeOptions, SampledToken, SamplingRow, WeightSource
from ..modules import ModuleKind
from ..program import (
    lower,
)
from ..rope import tables
from .blas import Blas
from .context import Context
from .graphs import Graphs
from .inputs import Inputs, View
from .kv_cache import KVCache
from .memory import Array, Pool
from .modules import Modules, kinds_of
from .ops import attention, rope
from .plan import BLAS_WORKSPACE, activation_dtype, most_seen, plan_program, ropes, scratch_bytes
from .run import Run, Submitted
from .sampler import Sampler
from .staging import Progress
from .steps import Steps
from .weights import CudaWeights

# Decodes come in buckets, of which there are few; other steps seldom repeat, but for chunks of long prompts.
_MOST_DECODES, _MOST_OTHERS = 256, 32
_LEAST_BLOCKS = 16  # of a block table's row in a graph; more come in powers of two


class CudaModel:
    """A model on one GPU: packed weights, workspace and paged KV cache. Not thread-safe.

    Raises DeviceError for a GPU that is absent or too old, PluginError for a module without CUDA code, CapacityError,
    before anything is allocated, if the plan does not fit.
    """

    runs_ahead = True

    def __init__(
        self,
        decoder: Decoder,
        source: WeightSource,
        options: RuntimeOptions,
        progress: Progress | None = None,
        *,
        index: int = 0,
        kinds: Mapping[type[Module], ModuleKind] | None = None,
    ) -> None:
        self.decoder = decoder
        self.program = lower(decoder)
        found = kinds_of(self.program, kinds or {})
        self._ctx = ctx = Context.open(index)
        try:
            device = ctx.device
            types = lambda name: source.tensors[name].type  # noqa: E731
            self.plan = plan_program(self.program, types, options, str(device), device.total, device.free(), device.sms)
            options = replace(options, max_tokens=self.plan.max_tokens)  # it may have grown
            self._act = activation_dtype(options)
            self._deterministic = options.deterministic
            self._weights_pool, self._kv_pool, self._work_pool = (
                Pool(device, name) for name in ("weights", "KV cache", "workspace")
            )
            self._weights = CudaWeights(ctx, self._weights_pool, self.program, source, self._act, progress)
            self._allocate(types, options)
            blas = Blas(ctx, BLAS_WORKSPACE)
            modules = Modules(ctx, blas, self._scratch, found, self._weights.named, self._act, options.deterministic)
            turns = self._rope_tables()
            room = (self._scratch, self._counters)
            self._steps = Steps(
                ctx, self.program, blas, self._weights, turns, self._kv, modules, room, self._act, options.deterministic
            )
            count, seen = self.plan.max_logit_rows, most_seen(self.plan.max_batch, decoder.vocab, self.plan.context)
            self._samplers = [Sampler(ctx, self._work_pool, count, decoder.vocab, seen) for _ in range(2)]
            device.synchronize()
        except BaseException:
            ctx.close()
            raise
        self._decodes, self._others = Graphs(ctx, _MOST_DECODES), Graphs(ctx, _MOST_OTHERS)

    @property
    def decode_graphs(self) -> int:
        """How many graphs of steps in which all sequences decode there are."""
        return len(self._decodes)

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """Runs a step: float32 [M, vocab]. Raises RequestError for a batch beyond the plan."""
        view = self._forward(batch)
        out: NDArray[np.float32] = self._ctx.device.download(self._logits(view))
        return out[: len(batch.logit_rows)]

    def step(self, batch: Batch, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Runs a step and samples a token for each of ``batch.logit_rows``."""
        return self.submit(batch, rows).result()

    def submit(self, batch: Batch, rows: Sequence[SamplingRow], after: Pending | None = None) -> Pending:
        """Enqueues a step and its sampling without waiting; the tokens of ``after`` never leave the device."""
        if len(rows) != len(batch.logit_rows):
            raise RequestError(f"{len(rows)} sampling rows for {len(batch.logit_rows)} rows of logits")
        self._samplers.reverse()  # the other one's page-locked memory is the step before's
        sampler = self._samplers[0]
        view = self._forward(batch, after)
        if rows:
            logits = self._logits(view).slice_rows(0, len(rows))
            sampler.launch(logits, sampler.prepare(rows))
        return Submitted(self._ctx, sampler, tuple(rows), self._ctx.device.stream.record())

    def trace(self, batch: Batch) -> dict[str, NDArray[np.float32]]:
        """Runs a step without a graph and returns what each step of the program left in its destination."""
        seen: dict[str, NDArray[np.float32]] = {}

        def observe(name: str, array: Array) -> None:
            seen[name] = np.asarray(self._ctx.device.download(array), np.float32)

        self._ctx.device.activate()
        check_batch(batch, self.plan, self.decoder.vocab)
        view = self._load(batch)
        self._run(view, observe)
        return seen

    def read_kv(self, layer: int, slots: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """K and V [len(slots), kv_heads, head_dim] of a layer as cached; slot = block · block_size + offset."""
        return self._kv.read(self._ctx.device, layer, slots)

    def close(self) -> None:
        """Returns all memory of the device. Safe to call twice."""
        if not self._ctx.device.closed:
            self._ctx.device.activate()
        self._decodes.clear()
        self._others.clear()
        self._ctx.close()

    def _allocate(self, types: Callable[[str], str], options: RuntimeOptions) -> None:
        plan, pool = self.plan, self._work_pool
        self._workspace = self.program.workspace(plan.max_tokens, plan.max_logit_rows, narrow_bytes=2)
        self._memory = pool.array(self._workspace.size, "u8", zero=True)
        self._scratch = pool.array(scratch_bytes(self.program, types, options, self._ctx.device.sms), "u8", zero=True)
        counts = max(attention.counters(block.attn, plan.max_batch) for block in self.decoder.blocks)
        self._counters = pool.array(counts, "i32", zero=True)
        blocks = plan.num_blocks + 1  # the last one takes what padding sequences write
        self._kv = KVCache(self._kv_pool, self.decoder, blocks, plan.block_size, plan.kv_dtype)
        table = _width(-(-plan.context // plan.block_size))
        self._inputs = Inputs(
            self._ctx,
            pool,
            plan.max_tokens,
            plan.max_batch,
            plan.max_logit_rows,
            table,
            tile_singles=self._deterministic,
        )

    def _rope_tables(self) -> dict[Rope, rope.Turn]:
        device = self._ctx.device
        found: dict[Rope, rope.Turn] = {}
        for spec in ropes(self.decoder):
            factors = self._weights.vector(spec.factors)
            host = tables(spec, self.plan.context, None if factors is None else device.download(factors))
            arrays = [self._weights_pool.array(part.shape, "f32") for part in host]
            for array, part in zip(arrays, host, strict=True):
                device.upload(array, part)
            found[spec] = (arrays[0], arrays[1])
        return found

    def _load(self, batch: Batch) -> View:
        plan = self.plan
        sequences = len(batch.context_lens)
        width = _width(-(-int(batch.context_lens.max()) // plan.block_size))
        bucket = min(_bucket(sequences), plan.max_batch, plan.max_tokens)
        # A step in which every sequence has one token and samples the next: it has a graph.
        decode = np.array_equal(batch.logit_rows, np.arange(sequences)) and len(batch.tokens) == sequences
        return self._inputs.load(batch, decode, bucket, width, plan.num_blocks)

    def _forward(self, batch: Batch, after: Pending | None = None) -> View:
        if self._ctx.device.closed:
            raise DeviceError("the model is closed")
        self._ctx.device.activate()  # the caller may be another thread than the last
        check_batch(batch, self.plan, self.decoder.vocab)
        view = self._load(batch)
        if isinstance(after, Submitted):
            if len(after.rows) != len(batch.tokens):
                raise RequestError(f"{len(batch.tokens)} sequences cannot follow {len(after.rows)}")
            count = len(after.rows)
            self._ctx.device.copy(after.sampler.tokens.slice_rows(0, count), view.tokens.slice_rows(0, count))
        width = view.block_tables.shape[1]
        if view.decode:
            key: tuple[int, ...] = (view.sequences_count, width)
            self._decodes.run(key, f"decode graph for {view.sequences_count} sequences", lambda: self._run(view))
        elif self._deterministic:
            self._run(view)  # a launch for every 32 rows: a graph of them would be large
        else:
            key = (view.count, view.sequences_count, view.rows, width, view.tiles.shape[0], view.singles)
            self._others.run(key, f"graph of {view.count} tokens", lambda: self._run(view), optional=True)
        return view

    def _run(self, view: View, observe: Callable[[str, Array], None] | None = None) -> None:
        self._steps.run(Run(view, self._memory, self._workspace.offsets, self._act), observe)

    def _logits(self, view: View) -> Array:
        return Run(view, self._memory, self._workspace.offsets, self._act)[self.program.logits]


def _bucket(sequences: int) -> int:
    """The sequences a graph is captured for: up to 16 a power of two, up to 32 a multiple of 8, then of 16."""
    if sequences <= 16:
        return 1 << (sequences - 1).bit_length()
    step = 8 if sequences <= 32 else 16
    return -(-sequences // step) * step


def _width(blocks: int) -> int:
    """Blocks per row of a block table: a power of two, so that a growing context needs few graphs."""
    return max(_LEAST_BLOCKS, 1 << (blocks - 1).bit_length())
