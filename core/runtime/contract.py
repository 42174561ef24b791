"""What a runtime offers. The CPU and the CUDA runtime both answer to these types; the engine's loop speaks only them.

Knows nothing of requests, scheduling policy, files or plugins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..arch import Decoder
from .memory import MemoryPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's ragged input: N tokens of S sequences, prefill chunks and decodes side by side.

    ``tokens`` and ``positions`` are int32 [N], sequence after sequence. Sequence s owns rows
    ``query_start[s]:query_start[s + 1]`` (int32 [S + 1]); after the step it has ``context_lens[s]`` tokens in the
    cache (int32 [S]), in the physical blocks ``block_tables[s]`` (int32 [S, B], padded with 0): position p lies in
    block ``block_tables[s, p // block_size]``. ``logit_rows`` (int32 [M]) are the rows whose logits are wanted.

    Sequences of one token should come first: a runtime may take those that lead more quickly. No sequence reads keys
    that another one writes in the same step.
    """

    tokens: NDArray[np.int32]
    positions: NDArray[np.int32]
    query_start: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    block_tables: NDArray[np.int32]
    logit_rows: NDArray[np.int32]


@dataclass(slots=True)  # not frozen: one is made for every token, and that would take several times as long
class SamplingRow:
    """How one row of logits becomes a token. ``position`` is the position the sampled token will have.

    ``repetition`` counts prompt and output, ``presence`` and ``frequency`` only output. ``logprobs`` None: none;
    n: that of the sampled token and of the n most likely, from the unmodified logits.

    ``allowed`` gives the tokens that may be chosen, int32 [ceil(vocab / 32)]: bit t % 32 of word t // 32, counted from
    the least significant, is token t's. It is called when the logits are on their way, so that it may be worked out
    while the device computes. Tokens whose bit is not set count as -inf, after the bias and before the penalties; bits
    past the vocabulary mean nothing. What it raises concerns this row alone: it passes through, with ``row`` set, when
    the step's tokens are asked for at the latest.
    """

    seed: int
    position: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    logprobs: int | None = None
    allowed: Callable[[], NDArray[np.int32]] | None = None


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token; where asked for, its log-probability and the most likely (id, log-probability), best first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Pending(Protocol):
    """A step that was handed to a device and may still be under way."""

    def result(self) -> list[SampledToken]:
        """Waits for it and returns a token for each of its rows. Raises what :meth:`LoadedModel.step` raises."""
        ...


class WeightInfo(Protocol):
    """What a file says of one tensor; ``shape`` is in NumPy order, ``type`` a GGML name such as Q4_K."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def type(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


class WeightSource(Protocol):
    """Where a runtime reads weights: an open model file, or random ones made for a benchmark. Thread-safe reads."""

    @property
    def tensors(self) -> Mapping[str, WeightInfo]: ...

    def data(self, name: str) -> NDArray[np.uint8]:
        """The stored bytes."""
        ...

    def dequantise(self, name: str, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """The values, float32 in the tensor's shape, written to ``out`` where given."""
        ...


@runtime_checkable
class PartialSource(WeightSource, Protocol):
    """A source that can also read a part of a tensor to a given place, as a file can. Optional; thread-safe."""

    def read_into(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fills ``out`` (uint8 [n]) with the stored bytes ``start:start + n``."""
        ...


MAX_TOKENS = 512
"""Tokens of a step where nobody asks for another number and the runtime knows no better one."""


@dataclass(frozen=True, slots=True)
class RuntimeOptions:
    """How much a loaded model may hold and do at once. Memory follows from it before anything is allocated.

    ``context`` is the most tokens of one sequence (None: as many as the model and memory allow), ``max_batch`` the most
    sequences in a step, ``max_tokens`` the most tokens in a step, ``block_size`` the tokens of a KV block.
    ``grow_steps``: a runtime that gains from longer steps may plan more than ``max_tokens``, as memory allows.
    ``threads`` bounds the CPU runtime's matrix products. ``deterministic``: a sequence's results are bit-equal alone,
    in any batch and with any chunking.
    """

    context: int | None = None
    kv_dtype: str = "auto"
    activation_dtype: str = "auto"
    max_batch: int = 64
    max_tokens: int = MAX_TOKENS
    grow_steps: bool = False
    block_size: int = 16
    memory_fraction: float = 0.9
    deterministic: bool = False
    threads: int | None = None


class LoadedModel(Protocol):
    """A model on a device: weights uploaded, workspace and KV cache allocated. Not thread-safe."""

    decoder: Decoder
    plan: MemoryPlan
    #: Whether a step may be handed over while the one before is under way, so that the device never waits for the host.
    runs_ahead: bool

    def logits(self, batch: Batch) -> NDArray[np.float32]:
        """Runs a step and returns float32 [M, vocab], after soft cap and scale. The KV of all N tokens is cached."""
        ...

    def step(self, batch: Batch, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Runs a step and samples one token for each of ``batch.logit_rows`` (as many ``rows``)."""
        ...

    def submit(self, batch: Batch, rows: Sequence[SamplingRow], after: Pending | None = None) -> Pending:
        """As :meth:`step`, without waiting. At most one other step may be under way.

        ``after``: the step under way, of as many sequences; row i's token is the one that step samples for its row i,
        whatever ``batch.tokens`` says. Rows may then have neither penalties nor ``allowed``, which need to know that
        token.
        """
        ...

    def close(self) -> None:
        """Returns all memory. The model cannot be used afterwards."""
        ...
