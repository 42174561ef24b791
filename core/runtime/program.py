"""A Decoder lowered to a program: steps over named buffers whose offsets in one workspace are planned once.

Both runtimes run the same program; they differ in how they carry out a step, and may fuse neighbours. Knows nothing of
a device, of weights' values or of file formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Literal

from ..arch import (
    MLP,
    Activation,
    Attention,
    Block,
    Decoder,
    Embedding,
    FusedGateUp,
    FusedQKV,
    LearnedPositions,
    Linear,
    Module,
    Norm,
)

ALIGNMENT = 256  # bytes; what a GPU's vector loads and tensor maps need


@dataclass(frozen=True, slots=True)
class Buffer:
    """Rows of ``columns`` values: one row per token of the step, or per row of logits.

    ``wide``: float32 on every runtime, because sums over layers or over the vocabulary end there; the others may be
    stored in half precision.
    """

    name: str
    columns: int
    rows: Literal["tokens", "logits"] = "tokens"
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Embed:
    """dst = table[token] · scale, plus positions[position] where the model learned them."""

    name: str
    dst: Buffer
    table: Embedding
    positions: LearnedPositions | None
    scale: float


@dataclass(frozen=True, slots=True)
class Normalise:
    """dst = norm(src); src and dst may be the same buffer."""

    name: str
    src: Buffer
    dst: Buffer
    norm: Norm


@dataclass(frozen=True, slots=True)
class Project:
    """dst = src · [weights stacked]ᵀ + bias, or dst += scale · (…) where ``accumulate``.

    ``rows[i]`` output features come from ``weights[i]``; a tied head reads the embedding's table.
    """

    name: str
    src: Buffer
    dst: Buffer
    weights: tuple[Linear | Embedding, ...]
    rows: tuple[int, ...]
    accumulate: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class StoreKV:
    """In place on ``qkv`` [q | k | v]: norm of each head, RoPE of q and k; then k and v into layer's cache."""

    name: str
    layer: int
    qkv: Buffer
    attention: Attention


@dataclass(frozen=True, slots=True)
class Attend:
    """dst = causal attention of the queries in ``qkv`` over the layer's cache."""

    name: str
    layer: int
    qkv: Buffer
    dst: Buffer
    attention: Attention


@dataclass(frozen=True, slots=True)
class Activate:
    """dst = act(src), or where gated act(first half of src) · second half."""

    name: str
    src: Buffer
    dst: Buffer
    activation: Activation
    gated: bool


@dataclass(frozen=True, slots=True)
class Apply:
    """dst = module(src), a plugin's own layer; ``scratch`` are the buffers it asked for."""

    name: str
    src: Buffer
    dst: Buffer
    module: Module
    scratch: tuple[tuple[str, Buffer], ...]


@dataclass(frozen=True, slots=True)
class Add:
    """dst += scale · src."""

    name: str
    src: Buffer
    dst: Buffer
    scale: float


@dataclass(frozen=True, slots=True)
class Gather:
    """dst = the rows of src whose logits are wanted."""

    name: str
    src: Buffer
    dst: Buffer


@dataclass(frozen=True, slots=True)
class Finish:
    """In place on the logits: · scale, then softcap · tanh(x / softcap)."""

    name: str
    dst: Buffer
    scale: float
    softcap: float | None


Step = Embed | Normalise | Project | StoreKV | Attend | Activate | Apply | Add | Gather | Finish


@dataclass(frozen=True, slots=True)
class Workspace:
    """Byte offsets of the buffers for a given number of rows, and the size of the whole."""

    offsets: Mapping[str, int]
    size: int


@dataclass(frozen=True, slots=True)
class Program:
    """The steps of one forward pass, in order. ``logits`` is the buffer that holds the result."""

    decoder: Decoder
    steps: tuple[Step, ...]
    logits: Buffer

    def buffers(self) -> dict[str, tuple[Buffer, int, int]]:
        """Every buffer with the indices of the first and the last step that touch it.

        A runtime may join neighbours: a norm with the projections that read it, a projection with the activation after
        it, the head with the gathering of its rows. What the first of them reads must outlive the last, so these lives
        are stretched accordingly.
        """
        lives: dict[str, tuple[Buffer, int, int]] = {}
        for index, step in enumerate(self.steps):
            for buffer in touched(step):
                first = lives[buffer.name][1] if buffer.name in lives else index
                lives[buffer.name] = (buffer, first, index)

        def stretch(buffer: Buffer, last: int) -> None:
            _, first, own = lives[buffer.name]
            lives[buffer.name] = (buffer, first, max(own, last))

        for index, step in enumerate(self.steps):
            if isinstance(step, Project):
                stretch(step.src, index + 1)
        for step in reversed(self.steps):
            if isinstance(step, Normalise):
                stretch(step.src, lives[step.dst.name][2])
            elif isinstance(step, Gather):
                stretch(step.src, len(self.steps))
        stretch(self.logits, len(self.steps))
        return lives

    def workspace(self, max_tokens: int, max_logit_rows: int, narrow_bytes: int = 4) -> Workspace:
        """Plans the buffers of a step of at most so many tokens and logit rows; lives that overlap never share bytes.

        ``narrow_bytes`` is the size of a value in a buffer that is not ``wide``. Buffers are placed largest first at
        the lowest offset that is free for their whole life. Anyone may call this before anything is allocated.
        """
        lives = self.buffers()
        rows = {"tokens": max_tokens, "logits": max_logit_rows}
        sizes = {
            name: -(-buffer.columns * rows[buffer.rows] * (4 if buffer.wide else narrow_bytes) // ALIGNMENT) * ALIGNMENT
            for name, (buffer, _, _) in lives.items()
        }
        offsets: dict[str, int] = {}
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            _, first, last = lives[name]
            taken = sorted(
                (offsets[other], offsets[other] + sizes[other])
                for other in offsets
                if lives[other][1] <= last and first <= lives[other][2]
            )
            offset = 0
            for start, end in taken:
                if offset + sizes[name] <= start:
                    break
                offset = max(offset, end)
            offsets[name] = offset
        return Workspace(offsets, max(offsets[name] + sizes[name] for name in sizes))


def touched(step: Step) -> Iterator[Buffer]:
    """The buffers a step reads or writes."""
    for field in fields(step):
        value = getattr(step, field.name)
        if isinstance(value, Buffer):
            yield value
    if isinstance(step, Apply):
        yield from (buffer for _, buffer in step.scratch)


def lower(decoder: Decoder) -> Program:
    """The program of a Decoder."""
    x = Buffer("x", decoder.hidden, wide=True)
    last = Buffer("last", decoder.hidden, "logits", wide=True)
    logits = Buffer("logits", decoder.vocab, "logits", wide=True)
    steps: list[Step] = [Embed("embed", x, decoder.tokens, decoder.positions, float(decoder.embedding_scale))]
    if decoder.embedding_norm is not None:
        steps.append(Normalise("embed_norm", x, x, decoder.embedding_norm))
    for index, block in enumerate(decoder.blocks):
        steps += _block(f"blk.{index}", index, block, x)
    steps.append(Gather("gather", x, last))
    head_in = last
    if decoder.final_norm is not None:
        head_in = Buffer("head_in", decoder.hidden, "logits")
        steps.append(Normalise("final_norm", last, head_in, decoder.final_norm))
    steps.append(Project("head", head_in, logits, (decoder.head or decoder.tokens,), (decoder.vocab,)))
    if decoder.logit_scale != 1.0 or decoder.logit_softcap is not None:
        cap = None if decoder.logit_softcap is None else float(decoder.logit_softcap)
        steps.append(Finish("finish", logits, float(decoder.logit_scale), cap))
    return Program(decoder, tuple(steps), logits)


def _block(prefix: str, layer: int, block: Block, x: Buffer) -> Iterator[Step]:
    # Buffers are named per block, so that each lives only as long as it is needed and may share bytes with later ones.
    attn_in = x
    if block.attn_norm is not None:
        attn_in = Buffer(f"{prefix}.attn_in", x.columns)
        yield Normalise(f"{prefix}.attn_norm", x, attn_in, block.attn_norm)
    if block.residual == "sequential":
        yield from _attention(f"{prefix}.attn", layer, block, attn_in, x, accumulate=True)
        mlp_in = x
    else:
        # Both branches read the same x, so neither may add to it before the other has read it.
        branch = Buffer(f"{prefix}.attn_branch", x.columns, wide=True)
        yield from _attention(f"{prefix}.attn", layer, block, attn_in, branch, accumulate=False)
        mlp_in = attn_in
    if block.mlp_norm is not None:
        mlp_in = Buffer(f"{prefix}.mlp_in", x.columns)
        yield Normalise(f"{prefix}.mlp_norm", x, mlp_in, block.mlp_norm)
    yield from _mlp(f"{prefix}.mlp", block, mlp_in, x)
    if block.residual == "parallel":
        yield Add(f"{prefix}.attn.add", branch, x, float(block.residual_scale))


def _attention(prefix: str, layer: int, block: Block, src: Buffer, dst: Buffer, accumulate: bool) -> Iterator[Step]:
    attn = block.attn
    qkv = Buffer(f"{prefix}.qkv", attn.q_size + 2 * attn.kv_size)
    mixed = Buffer(f"{prefix}.mixed", attn.q_size)
    if isinstance(attn.qkv, FusedQKV):
        yield Project(f"{prefix}.qkv", src, qkv, (attn.qkv.proj,), (qkv.columns,))
    else:
        rows = (attn.q_size, attn.kv_size, attn.kv_size)
        yield Project(f"{prefix}.qkv", src, qkv, (attn.qkv.q, attn.qkv.k, attn.qkv.v), rows)
    yield StoreKV(f"{prefix}.store_kv", layer, qkv, attn)
    yield Attend(f"{prefix}.attend", layer, qkv, mixed, attn)
    yield from _branch(prefix, block, block.post_attn_norm, mixed, dst, attn.out, accumulate)


def _mlp(prefix: str, block: Block, src: Buffer, x: Buffer) -> Iterator[Step]:
    mlp = block.mlp
    if isinstance(mlp, Module):
        out = Buffer(f"{prefix}.branch", x.columns, wide=True)
        scratch = tuple(
            (key, Buffer(f"{prefix}.scratch.{key}", n, wide=True)) for key, n in mlp.scratch(x.columns).items()
        )
        yield Apply(prefix, src, out, mlp, scratch)
        if block.post_mlp_norm is not None:
            yield Normalise(f"{prefix}.post_norm", out, out, block.post_mlp_norm)
        yield Add(f"{prefix}.add", out, x, float(block.residual_scale))
        return
    inner = Buffer(f"{prefix}.inner", mlp.size)
    wide = Buffer(f"{prefix}.wide", 2 * mlp.size) if mlp.gated else inner
    yield _up(prefix, mlp, src, wide)
    yield Activate(f"{prefix}.act", wide, inner, mlp.activation, mlp.gated)
    yield from _branch(prefix, block, block.post_mlp_norm, inner, x, mlp.down, accumulate=True)


def _up(prefix: str, mlp: MLP, src: Buffer, wide: Buffer) -> Project:
    if isinstance(mlp.up, FusedGateUp):
        return Project(f"{prefix}.up", src, wide, (mlp.up.proj,), (2 * mlp.size,))
    if mlp.gate is not None:
        return Project(f"{prefix}.up", src, wide, (mlp.gate, mlp.up), (mlp.size, mlp.size))
    return Project(f"{prefix}.up", src, wide, (mlp.up,), (mlp.size,))


def _branch(
    prefix: str, block: Block, post_norm: Norm | None, src: Buffer, dst: Buffer, weight: Linear, accumulate: bool
) -> Iterator[Step]:
    """The last projection of a branch; straight into the residual stream where no norm stands between."""
    hidden, scale = dst.columns, float(block.residual_scale) if accumulate else 1.0
    if post_norm is None:
        yield Project(f"{prefix}.out", src, dst, (weight,), (hidden,), accumulate, scale)
        return
    out = Buffer(f"{prefix}.branch", hidden, wide=True) if accumulate else dst
    yield Project(f"{prefix}.out", src, out, (weight,), (hidden,))
    yield Normalise(f"{prefix}.post_norm", out, out, post_norm)
    if accumulate:
        yield Add(f"{prefix}.add", out, dst, scale)
