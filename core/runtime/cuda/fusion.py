"""Fusion: the steps of a program with neighbours joined that one kernel can do: most of them for one row of tokens.

Decided from the steps alone, so that every architecture gets it. Knows nothing of kernels: the caller says what fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..program import Activate, Attend, Buffer, Finish, Gather, Normalise, Program, Project, Step, StoreKV, touched


@dataclass(frozen=True, slots=True)
class FusedProject:
    """dst = act(norm(src) · [weights stacked]ᵀ + bias): a projection with what stands before and after it."""

    name: str
    project: Project
    norm: Normalise | None
    activate: Activate | None

    @property
    def src(self) -> Buffer:
        return self.project.src if self.norm is None else self.norm.src

    @property
    def dst(self) -> Buffer:
        return self.project.dst if self.activate is None else self.activate.dst


@dataclass(frozen=True, slots=True)
class FusedAttend:
    """Norms of heads, rotation, the way into the cache and attention of one token per sequence."""

    name: str
    store: StoreKV
    attend: Attend

    @property
    def dst(self) -> Buffer:
        return self.attend.dst


JoinedStep = Step | FusedProject | FusedAttend

#: Whether a projection can be done by one kernel, with a norm before it, with a gate after it.
Fits = Callable[[Project, bool, bool], bool]


def fuse_row(program: Program, fits: Fits) -> tuple[Step | FusedProject, ...]:
    """The steps for a single row whose logits are wanted: fewer, and equal in what they compute but for rounding."""
    steps = _without_gather(program.steps)
    norms: dict[int, Normalise] = {}  # by the index of the projection that takes it in
    gone: set[int] = set()
    for index, step in enumerate(steps):
        if isinstance(step, Normalise) and step.src.wide and not step.dst.wide:
            readers = [n for n, other in enumerate(steps) if n != index and step.dst in touched(other)]
            if readers and all(_takes_norm(steps, index, reader, fits) for reader in readers):
                norms |= dict.fromkeys(readers, step)
                gone.add(index)
    fused: list[Step | FusedProject] = []
    for index, step in enumerate(steps):
        if index in gone:
            continue
        if not isinstance(step, Project) or (step.src.wide and index not in norms):
            fused.append(step)
            continue
        after = steps[index + 1] if index + 1 < len(steps) else None
        norm = norms.get(index)
        if isinstance(after, Activate) and _joins(steps, step, after) and fits(step, norm is not None, after.gated):
            fused.append(FusedProject(after.name, step, norm, after))
            gone.add(index + 1)
        elif norm is not None or fits(step, False, False):
            fused.append(FusedProject(step.name, step, norm, None))
        else:
            fused.append(step)
    return tuple(fused)


def _takes_norm(steps: Sequence[Step], index: int, reader: int, fits: Fits) -> bool:
    """Whether the step ``reader`` can do the norm at ``index`` itself: what it is a norm of must still be there."""
    norm, step = steps[index], steps[reader]
    assert isinstance(norm, Normalise)
    return (
        isinstance(step, Project)
        and reader > index
        and step.src == norm.dst
        and fits(step, True, False)
        and not any(norm.src == _written(other) for other in steps[index + 1 : reader])
    )


def _written(step: Step) -> Buffer:
    return step.qkv if isinstance(step, StoreKV) else step.dst


def _without_gather(steps: Sequence[Step]) -> list[Step]:
    """With one row, the rows whose logits are wanted are the rows there are: nothing needs to be copied.

    Only where every later reader of the copy reads: a step that changed it would change the original.
    """
    found = [step for step in steps if isinstance(step, Gather)]
    if len(found) != 1:
        return list(steps)
    gather = found[0]
    after = steps[steps.index(gather) + 1 :]
    if any(_written(step) == gather.dst or gather.src in touched(step) for step in after):
        return list(steps)
    if any(not isinstance(step, Normalise | Project | Finish) for step in after):
        return list(steps)
    renamed = [_reading(step, gather.dst, gather.src) for step in after]
    return [*steps[: steps.index(gather)], *renamed]


def _reading(step: Step, old: Buffer, new: Buffer) -> Step:
    if isinstance(step, Normalise) and step.src == old:
        return Normalise(step.name, new, step.dst, step.norm)
    if isinstance(step, Project) and step.src == old:
        return Project(step.name, new, step.dst, step.weights, step.rows, step.accumulate, step.scale)
    return step


def fuse_activation(steps: Sequence[Step]) -> tuple[Step | FusedProject, ...]:
    """The steps with each projection and the activation after it as one, where nobody else reads what lies between.

    For many rows: whoever carries it out may still do the one after the other.
    """
    fused: list[Step | FusedProject] = []
    for step in steps:
        before = fused[-1] if fused else None
        if isinstance(step, Activate) and isinstance(before, Project) and _joins(steps, before, step):
            fused[-1] = FusedProject(step.name, before, None, step)
        else:
            fused.append(step)
    return tuple(fused)


def _joins(steps: Sequence[Step], project: Project, after: Activate) -> bool:
    plain = after.src == project.dst and not project.accumulate and project.scale == 1.0
    return plain and (after.src == after.dst or sum(project.dst in touched(other) for other in steps) == 2)


def fuse_attention(steps: Sequence[Step | FusedProject]) -> tuple[JoinedStep, ...]:
    """The steps with each StoreKV and the Attend after it as one. Nothing else reads q, k and v."""
    fused: list[JoinedStep] = []
    for step in steps:
        before = fused[-1] if fused else None
        if isinstance(step, Attend) and isinstance(before, StoreKV) and before.qkv == step.qkv:
            fused[-1] = FusedAttend(step.name, before, step)
        else:
            fused.append(step)
    return tuple(fused)
