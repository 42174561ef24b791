"""The least work a case can take: bytes that must be read and operations that must be done, from the description."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..arch import Decoder
from ..runtime.memory import MemoryPlan
from .cases import Case


def weight_bytes_per_step(decoder: Decoder, plan: MemoryPlan) -> float:
    """Bytes of weights that one step reads, however many sequences it serves.

    All that the device holds (``plan.weights``) except the rows of tables that are only looked up: an embedding that is
    not the head as well, and learned positions. Their share is reckoned by values, so it is exact where all weights
    are stored alike and near where they are not.
    """
    sizes = {spec.name: math.prod(spec.shape) for spec in decoder.tensors()}
    looked_up = sizes[decoder.tokens.weight] if decoder.head is not None else 0
    if decoder.positions is not None:
        looked_up += sizes[decoder.positions.weight]
    whole = sum(sizes.values())
    return plan.weights * (whole - looked_up) / whole


def read_bytes(decoder: Decoder, plan: MemoryPlan, case: Case) -> float:
    """Bytes that a decode case reads in all: the weights at every step, and each sequence's keys and values so far.

    A window bounds what a layer reads of the cache.
    """
    item = plan.kv_bytes_per_token / decoder.kv_values_per_token()
    kv = sum(
        2 * block.attn.kv_size * item * _seen(block.attn.window, case.depth, case.tokens) for block in decoder.blocks
    )
    return case.tokens * weight_bytes_per_step(decoder, plan) + case.batch * kv


def flops(decoder: Decoder, case: Case) -> float:
    """Operations of a prefill case: 2 per weight of a layer's matrices and token, causal attention, one row of logits.

    Attention: 4 · heads · head_dim for each pair of a query and a key it sees (one product for q·k, one for p·v).
    """
    matrices = sum(math.prod(shape) for shape in _layer_matrices(decoder))
    attention = sum(
        4 * block.attn.q_size * _seen(block.attn.window, case.depth, case.tokens) for block in decoder.blocks
    )
    head = 2 * decoder.hidden * decoder.vocab
    return case.batch * (2.0 * matrices * case.tokens + attention + head)


def _layer_matrices(decoder: Decoder) -> Iterator[tuple[int, ...]]:
    for block in decoder.blocks:
        for spec in block.tensors(decoder.hidden):
            if len(spec.shape) >= 2:
                yield spec.shape


def _seen(window: int | None, depth: int, tokens: int) -> int:
    """Pairs of query and key when positions depth … depth + tokens − 1 each see what is before them and themselves."""
    if window is None:
        return tokens * depth + tokens * (tokens + 1) // 2
    free = max(0, min(window, depth + tokens) - depth)  # queries that see everything so far
    return free * depth + free * (free + 1) // 2 + (tokens - free) * window
