"""Steps: how a GPU carries out each step of a program, and the joined steps that stand for them where tokens decode.

Knows nothing of where inputs come from, of graphs, of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ...arch import Attention, LayerNorm, Norm, Rope
from ..program import (
    Activate,
    Add,
    Apply,
    Attend,
    Embed,
    Finish,
    Gather,
    Normalise,
    Program,
    Project,
    StoreKV,
)
from .blas import Blas
from .context import Context
from .fusion import FusedAttend, FusedProject, JoinedStep, fuse_activation, fuse_attention, fuse_row
from .kv_cache import KVCache
from .memory import Array
from .modules import Modules
from .ops import activation, attention, embed, norm, rope, rows
from .ops.linear import linear, linear_activated
from .ops.linear_one import fits, linear_one
from .plan import narrow_bytes
from .run import Run
from .weights import CudaWeights

Observe = Callable[[str, Array], None]


class Steps:
    """Carries out a program's steps. ``room``: scratch memory, and counters that are zero between steps."""

    def __init__(
        self,
        ctx: Context,
        program: Program,
        blas: Blas,
        weights: CudaWeights,
        turns: Mapping[Rope, rope.Turn],
        kv: KVCache,
        modules: Modules,
        room: tuple[Array, Array],
        act: str,
        deterministic: bool,
    ) -> None:
        self._ctx, self._blas, self._weights, self._kv, self._modules = ctx, blas, weights, kv, modules
        self._turns, self._act, self._deterministic = turns, act, deterministic
        self._scratch, self._counters = room
        self._plain = program.steps
        # What joins steps changes the order of sums, or how work is split, with the batch.
        self._joined: Sequence[JoinedStep] = (
            self._plain if deterministic else fuse_attention(fuse_activation(program.steps))
        )
        self._seen: Sequence[JoinedStep] = self._plain if deterministic else fuse_attention(program.steps)
        self._row: Sequence[JoinedStep] = (
            self._plain if deterministic else fuse_attention(fuse_row(program, self._fits))
        )
        self._dispatch: dict[type, Callable[..., None]] = {
            Embed: self._embed,
            Normalise: self._normalise,
            Project: self._project,
            FusedProject: self._project_joined,
            StoreKV: self._store_kv,
            Attend: self._attend,
            FusedAttend: self._attend_joined,
            Activate: self._activate,
            Apply: self._apply,
            Add: self._add,
            Gather: self._gather,
            Finish: self._finish,
        }

    def run(self, run: Run, observe: Observe | None = None) -> None:
        """Launches every step. ``observe`` is given each step's name and what it wrote."""
        view = run.view
        steps = self._row if view.decode and view.count == 1 else self._joined
        if observe is not None and not view.decode:
            steps = self._plain if view.singles == 0 else self._seen  # what they leave can be looked at one by one
        for step in steps:
            self._dispatch[type(step)](step, run)
            if observe is not None:
                observe(step.name, run[step.qkv if isinstance(step, StoreKV) else step.dst])

    def _fits(self, step: Project, normed: bool, gated: bool) -> bool:
        parts = self._weights.parts(step)
        return (len(parts) == 1 or not gated) and all(
            fits(self._ctx.device, part.matrix, normed=normed, gated=gated) for part in parts
        )

    def _project_joined(self, step: FusedProject, run: Run) -> None:
        if run.view.decode and run.view.count == 1:
            self._project_one(step, run)
            return
        project, after = step.project, step.activate
        assert after is not None, "what many rows join"
        parts = self._weights.parts(project)
        if (
            len(parts) > 1
            or project.src.wide
            or not linear_activated(
                self._ctx,
                run[project.src],
                parts[0].matrix,
                run[after.dst],
                self._scratch,
                parts[0].bias,
                after.activation,
                after.gated,
            )
        ):
            self._project(project, run)
            self._activate(after, run)

    def _project_one(self, step: FusedProject, run: Run) -> None:
        before, after = step.norm, step.activate
        for part in self._weights.parts(step.project):
            linear_one(
                self._ctx,
                run[step.src],
                part.matrix,
                run[step.dst],
                part.column,
                bias=part.bias,
                accumulate=step.project.accumulate,
                scale=step.project.scale,
                norm=None if before is None else (before.norm, *self._norm_arrays(before.norm)),
                activation=None if after is None else after.activation,
                gated=after is not None and after.gated,
                act=self._act,
            )

    def _attend_joined(self, step: FusedAttend, run: Run) -> None:
        """The leading sequences of one token by the attention of decode, the others as the plain steps have it.

        Neither waits for what the other stores: no sequence of a step reads keys that another one writes in it.
        """
        if run.view.singles:
            self._attend_decode(step, run)
        self._store_kv(step.store, run, run.view.singles)
        self._attend(step.attend, run)

    def _attend_decode(self, step: FusedAttend, run: Run) -> None:
        view, spec, layer = run.view, step.attend.attention, step.attend.layer
        qkv, out, lens, tables, positions = (
            array.slice_rows(0, view.singles)
            for array in (run[step.attend.qkv], run[step.dst], view.context_lens, view.block_tables, view.positions)
        )
        attention.attend_decode(
            self._ctx,
            qkv,
            *self._kv.layers[layer],
            out,
            lens,
            tables,
            spec,
            self._scratch,
            self._counters,
            turn=self._turn(spec),
            norms=self._head_norms(spec),
            positions=positions,
            scales=self._kv.scales[layer],
        )

    def _turn(self, spec: Attention) -> rope.Turn | None:
        return None if spec.rope is None else self._turns[spec.rope]

    def _head_norms(self, spec: Attention) -> list[rope.HeadNorm | None]:
        return [None if part is None else (part, *self._norm_arrays(part)) for part in (spec.q_norm, spec.k_norm)]

    def _embed(self, step: Embed, run: Run) -> None:
        positions = self._weights.vector(step.positions.weight) if step.positions else None
        table = self._weights.table(step.table)
        view = run.view
        embed.embed(self._ctx, view.tokens, table, run[step.dst], step.scale, view.positions, positions)

    def _normalise(self, step: Normalise, run: Run) -> None:
        weight, bias = self._norm_arrays(step.norm)
        norm.normalise(self._ctx, run[step.src], step.norm, weight, bias, run[step.dst])

    def _norm_arrays(self, spec: Norm) -> tuple[Array, Array | None]:
        weight = self._weights.vector(spec.weight)
        assert weight is not None
        return weight, self._weights.vector(spec.bias) if isinstance(spec, LayerNorm) else None

    def _project(self, step: Project, run: Run) -> None:
        src, scratch = run[step.src], self._scratch
        if step.src.wide:  # a block without a norm before it: products take the activations' type
            src = scratch.view(self._act, *src.shape)
            rows.convert(self._ctx, run[step.src], src)
            taken = narrow_bytes(*src.shape)  # and weights are unpacked behind it
            scratch = scratch.at(taken, "u8", scratch.nbytes - taken)
        for part in self._weights.parts(step):
            linear(
                self._ctx,
                self._blas,
                src,
                part.matrix,
                run[step.dst],
                part.column,
                scratch,
                bias=part.bias,
                accumulate=step.accumulate,
                scale=step.scale,
                invariant=self._deterministic,
            )

    def _store_kv(self, step: StoreKV, run: Run, first: int = 0) -> None:
        """For the rows from ``first`` on; their numbers of sequences count from the step's first one all the same."""
        spec, view = step.attention, run.view
        qkv, positions, sequences = (
            array.slice_rows(first, view.count) for array in (run[step.qkv], view.positions, view.sequences)
        )
        rope.store_kv(
            self._ctx,
            qkv,
            spec,
            self._turn(spec),
            self._head_norms(spec),
            positions,
            sequences,
            view.block_tables,
            *self._kv.layers[step.layer],
            self._kv.scales[step.layer],
        )

    def _attend(self, step: Attend, run: Run) -> None:
        view, spec = run.view, step.attention
        arrays = (run[step.qkv], *self._kv.layers[step.layer], run[step.dst])
        where = (view.query_start, view.context_lens, view.block_tables, view.tiles)
        attention.attend_prefill(self._ctx, *arrays, *where, spec, scales=self._kv.scales[step.layer])

    def _activate(self, step: Activate, run: Run) -> None:
        activation.activate(self._ctx, run[step.src], run[step.dst], step.activation, step.gated)

    def _apply(self, step: Apply, run: Run) -> None:
        self._modules.apply(step, run[step.src], run[step.dst], {key: run[buffer] for key, buffer in step.scratch})

    def _add(self, step: Add, run: Run) -> None:
        rows.add(self._ctx, run[step.src], run[step.dst], step.scale)

    def _gather(self, step: Gather, run: Run) -> None:
        rows.gather(self._ctx, run[step.src], run.view.logit_rows, run[step.dst])

    def _finish(self, step: Finish, run: Run) -> None:
        rows.finish(self._ctx, run[step.dst], step.scale, step.softcap)
