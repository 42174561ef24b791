"""CpuModel: a program carried out step by step in NumPy over one workspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from ...arch import Decoder, Module, Norm, Rope
from ...errors import DeviceError, PluginError, RequestError, summary
from ..batch_checks import check_batch
from ..contract import Batch, Pending, RuntimeOptions, SampledToken, SamplingRow, WeightSource
from ..modules import CpuModule, ModuleKind
from ..program import (
    Activate,
    Add,
    Apply,
    Attend,
    Buffer,
    Embed,
    Finish,
    Gather,
    Normalise,
    Project,
    StoreKV,
    Workspace,
    lower,
)
from ..rope import tables
from . import attention, ops
from .kv_cache import KVCache, storage_dtype
from .plan import plan_program, ropes
from .sampler import sample
from .weights import Progress, Weights, norm_names

F32 = NDArray[np.float32]
Observer = Callable[[str, F32], None]


class CpuModel:
    """A model in host memory: float32 weights, workspace and KV cache. Not thread-safe.

    Raises CapacityError before anything is allocated if the plan does not fit, PluginError if a module of a plugin has
    no implementation here.
    """

    runs_ahead = False

    def __init__(
        self,
        decoder: Decoder,
        source: WeightSource,
        options: RuntimeOptions,
        kinds: Mapping[type[Module], ModuleKind] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.decoder = decoder
        self.program = lower(decoder)
        self._deterministic = options.deterministic
        self._threads = _thread_limit(options.threads)
        self.plan = plan_program(self.program, options)
        self._dispatch: dict[type, Callable[..., None]] = {
            Embed: self._embed,
            Normalise: self._normalise,
            Project: self._project,
            StoreKV: self._store_kv,
            Attend: self._attend,
            Activate: self._activate,
            Apply: self._apply,
            Add: self._add,
            Gather: self._gather,
            Finish: self._finish,
        }
        modules = self._kinds_of_modules(kinds or {})
        self._weights = Weights(self.program, source, progress)
        self._modules = {step.name: self._load_module(step, kind) for step, kind in modules}
        self._ropes = self._rope_tables()
        self._workspace = self.program.workspace(self.plan.max_tokens, self.plan.max_logit_rows)
        self._memory = np.empty(self._workspace.size // 4, np.float32)
        self._cache: KVCache | None = KVCache(
            decoder, self.plan.num_blocks, self.plan.block_size, storage_dtype(options.kv_dtype)
        )

    def logits(self, batch: Batch) -> F32:
        """Runs a step: float32 [M, vocab], a copy. Raises RequestError for a batch beyond the plan."""
        return self._run(batch, None).copy()

    def step(self, batch: Batch, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Runs a step and samples a token for each of ``batch.logit_rows``."""
        if len(rows) != len(batch.logit_rows):
            raise RequestError(f"{len(rows)} sampling rows for {len(batch.logit_rows)} rows of logits")
        logits = self._run(batch, None)
        return sample(logits, rows) if rows else []

    def submit(self, batch: Batch, rows: Sequence[SamplingRow], after: Pending | None = None) -> Pending:
        """Runs the step at once; there is nothing to run ahead of."""
        if after is not None:
            tokens = [token.id for token in after.result()]
            batch = replace(batch, tokens=np.array(tokens, np.int32))
        return _Done(self.step(batch, rows))

    def trace(self, batch: Batch) -> dict[str, F32]:
        """Runs a step and returns a copy of what each step of the program left in its destination, by step name."""
        seen: dict[str, F32] = {}
        self._run(batch, lambda name, array: seen.__setitem__(name, array.copy()))
        return seen

    def read_kv(self, layer: int, slots: Sequence[int]) -> tuple[F32, F32]:
        """K and V [len(slots), kv_heads, head_dim] of a layer as cached; slot = block · block_size + offset."""
        return self._open().read(layer, np.asarray(slots, np.intp))

    def close(self) -> None:
        """Returns all memory. Safe to call twice."""
        self._cache = None
        self._memory = np.empty(0, np.float32)
        self._weights.release()
        self._modules, self._ropes = {}, {}

    def _open(self) -> KVCache:
        if self._cache is None:
            raise DeviceError("the model is closed")
        return self._cache

    def _run(self, batch: Batch, observe: Observer | None) -> F32:
        cache = self._open()
        check_batch(batch, self.plan, self.decoder.vocab)
        run = _Run(
            batch, attention.lay_out(batch, cache.block_size, self._deterministic), self._memory, self._workspace
        )
        # What damaged weights overflow to is told by the check of the logits, not by warnings on the user's terminal.
        with self._threads(), np.errstate(all="ignore"):
            for step in self.program.steps:
                self._dispatch[type(step)](step, run)
                if observe is not None:
                    observe(step.name, run[step.qkv if isinstance(step, StoreKV) else step.dst])
        return run[self.program.logits]

    def _kinds_of_modules(self, kinds: Mapping[type[Module], ModuleKind]) -> list[tuple[Apply, ModuleKind]]:
        """The implementation of each module, before anything is loaded."""
        found = []
        for step in self.program.steps:
            if isinstance(step, Apply):
                kind = kinds.get(type(step.module))
                if kind is None:
                    raise PluginError(
                        f"{step.name} is a {type(step.module).__name__}, for which no plugin registers a ModuleKind"
                    )
                found.append((step, kind))
        return found

    def _load_module(self, step: Apply, kind: ModuleKind) -> CpuModule:
        specs = step.module.tensors(self.decoder.hidden)
        try:
            return kind.cpu(step.module, {spec.name: self._weights.vector(spec.name) for spec in specs})
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{step.name}: module {type(step.module).__name__} failed to load: {summary(error)}"
            ) from error

    def _rope_tables(self) -> dict[Rope, tuple[F32, F32]]:
        return {
            rope: tables(rope, self.plan.context, self._weights.vector(rope.factors) if rope.factors else None)
            for rope in ropes(self.decoder)
        }

    def _embed(self, step: Embed, run: _Run) -> None:
        dst = run[step.dst]
        np.take(self._weights.table(step.table), run.batch.tokens, axis=0, out=dst)
        if step.scale != 1.0:
            dst *= np.float32(step.scale)
        if step.positions is not None:
            dst += self._weights.vector(step.positions.weight)[run.batch.positions]

    def _norm(self, norm: Norm, src: F32, dst: F32) -> None:
        weight, bias = norm_names(norm)
        vector = self._weights.vector
        ops.normalise(src, norm, vector(weight), vector(bias) if bias else None, dst)

    def _normalise(self, step: Normalise, run: _Run) -> None:
        self._norm(step.norm, run[step.src], run[step.dst])

    def _project(self, step: Project, run: _Run) -> None:
        weight, bias = self._weights.matrix(step)
        src, dst = run[step.src], run[step.dst]
        if not step.accumulate:
            ops.project(src, weight, dst, self._deterministic)
            if bias is not None:
                dst += bias
            return
        out = run.spare(dst)
        ops.project(src, weight, out, self._deterministic)
        if bias is not None:
            out += bias
        if step.scale != 1.0:
            out *= np.float32(step.scale)
        dst += out

    def _store_kv(self, step: StoreKV, run: _Run) -> None:
        spec = step.attention
        q, k, v = _heads(run[step.qkv], spec.heads, spec.kv_heads, spec.head_dim)
        if spec.q_norm is not None:
            self._norm(spec.q_norm, q, q)
        if spec.k_norm is not None:
            self._norm(spec.k_norm, k, k)
        if spec.rope is not None:
            cos, sin = run.turn(spec.rope, self._ropes)
            interleaved = spec.rope.pairing == "interleaved"
            ops.rotate(q, cos, sin, interleaved)
            ops.rotate(k, cos, sin, interleaved)
        self._open().store(step.layer, run.layout.slots, k, v)

    def _attend(self, step: Attend, run: _Run) -> None:
        spec = step.attention
        q, _, _ = _heads(run[step.qkv], spec.heads, spec.kv_heads, spec.head_dim)
        out = run[step.dst].reshape(len(q), spec.heads, spec.head_dim)
        attention.attend(q, self._open(), step.layer, run.layout, spec, out)

    def _activate(self, step: Activate, run: _Run) -> None:
        src, dst = run[step.src], run[step.dst]
        if not step.gated:
            ops.activate(step.activation, src, dst)
            return
        size = dst.shape[1]
        ops.activate(step.activation, src[:, :size], dst)
        dst *= src[:, size:]

    def _apply(self, step: Apply, run: _Run) -> None:
        scratch = {key: run[buffer] for key, buffer in step.scratch}
        try:
            returned: object = self._modules[step.name](run[step.src], run[step.dst], scratch)
        except (Exception, SystemExit) as error:
            raise PluginError(f"{step.name}: module {type(step.module).__name__} failed: {summary(error)}") from error
        if returned is not None:
            raise PluginError(
                f"{step.name}: module {type(step.module).__name__} returned {type(returned).__name__}; it must write "
                "its result to out and return nothing"
            )

    def _add(self, step: Add, run: _Run) -> None:
        src = run[step.src]
        run[step.dst][...] += src if step.scale == 1.0 else src * np.float32(step.scale)

    def _gather(self, step: Gather, run: _Run) -> None:
        np.take(run[step.src], run.batch.logit_rows, axis=0, out=run[step.dst])

    def _finish(self, step: Finish, run: _Run) -> None:
        dst = run[step.dst]
        dst *= np.float32(step.scale)
        if step.softcap is not None:
            dst *= np.float32(1.0 / step.softcap)
            np.tanh(dst, out=dst)
            dst *= np.float32(step.softcap)


@dataclass(frozen=True, slots=True)
class _Done:
    """A step that ran when it was submitted."""

    tokens: list[SampledToken]

    def result(self) -> list[SampledToken]:
        return self.tokens


class _Run:
    """One step in flight: the batch, its layout, and the workspace seen as buffers of this many rows."""

    def __init__(self, batch: Batch, layout: attention.Layout, memory: F32, workspace: Workspace) -> None:
        self.batch = batch
        self.layout = layout
        self._memory = memory
        self._workspace = workspace
        self._rows = {"tokens": len(batch.tokens), "logits": len(batch.logit_rows)}
        self._turns: dict[Rope, tuple[F32, F32]] = {}
        self._spare: F32 | None = None

    def __getitem__(self, buffer: Buffer) -> F32:
        rows = self._rows[buffer.rows]
        start = self._workspace.offsets[buffer.name] // 4
        return self._memory[start : start + rows * buffer.columns].reshape(rows, buffer.columns)

    def spare(self, like: F32) -> F32:
        """A temporary of this shape, for products that are added to the residual stream."""
        if self._spare is None or self._spare.shape != like.shape:
            self._spare = np.empty_like(like)
        return self._spare

    def turn(self, rope: Rope, ropes: Mapping[Rope, tuple[F32, F32]]) -> tuple[F32, F32]:
        """cos and sin [N, dim/2] at this step's positions."""
        if rope not in self._turns:
            cos, sin = ropes[rope]
            self._turns[rope] = cos[self.batch.positions], sin[self.batch.positions]
        return self._turns[rope]


def _thread_limit(threads: int | None) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which BLAS uses at most so many threads."""
    if threads is None:
        return nullcontext
    controller = ThreadpoolController()
    return lambda: controller.limit(limits=threads, user_api="blas")


def _heads(qkv: F32, heads: int, kv_heads: int, head_dim: int) -> tuple[F32, F32, F32]:
    """[N, q | k | v] as views [N, heads, head_dim], [N, kv_heads, head_dim] twice."""
    rows = len(qkv)
    split = qkv.reshape(rows, heads + 2 * kv_heads, head_dim)
    return split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]
