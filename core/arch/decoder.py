"""Decoder: a whole model as data. What an architecture plugin returns and a runtime lowers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from .block import Block
from .fields import check_fields
from .linear import Embedding, Linear
from .norm import Norm
from .position import LearnedPositions
from .tensors import MOST_POSITIONS, TensorSpec, check, check_positive, within


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder-only transformer.

    ``hidden`` is the width of the residual stream, ``vocab`` the rows of the embedding (padding rows included),
    ``context`` the positions it was made for. ``head`` None means tied to ``tokens``. ``embedding_scale`` multiplies
    the token embedding, ``embedding_norm`` follows it. Logits are multiplied by ``logit_scale`` and then capped:
    logit_softcap · tanh(logit / logit_softcap). ``unused`` are glob patterns of tensors that files of this
    architecture may carry and that the model does not read; any other tensor left over is a load error.
    """

    hidden: int
    vocab: int
    context: int
    tokens: Embedding
    blocks: tuple[Block, ...]
    final_norm: Norm | None
    head: Linear | None = None
    positions: LearnedPositions | None = None
    embedding_scale: float = 1.0
    embedding_norm: Norm | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    unused: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The letters of a string would each be a pattern, and its * would excuse every tensor.
        check(not isinstance(self.unused, str), f"Decoder: unused is {self.unused!r}, expected a tuple of patterns")
        for name in ("blocks", "unused"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        check_fields(self)
        check_positive("Decoder", hidden=self.hidden, vocab=self.vocab, context=self.context)
        check(self.context <= MOST_POSITIONS, f"Decoder: context is {self.context}, expected at most {MOST_POSITIONS}")
        check(len(self.blocks) > 0, "Decoder: blocks is empty, expected at least one block")
        for name in ("embedding_scale", "logit_scale"):
            value = getattr(self, name)
            check(
                math.isfinite(value) and value != 0,
                f"Decoder: {name} is {value!r}, expected a finite number other than 0",
            )
        check(
            self.logit_softcap is None or (math.isfinite(self.logit_softcap) and self.logit_softcap > 0),
            f"Decoder: logit_softcap is {self.logit_softcap!r}, expected a number above 0",
        )

    def tensors(self) -> Iterator[TensorSpec]:
        """Every tensor the model reads, in the order of the tree; a tied head adds none."""
        yield from within("tokens", self.tokens.tensors(self.vocab, self.hidden))
        if self.positions is not None:
            yield from within("positions", self.positions.tensors(self.context, self.hidden))
        if self.embedding_norm is not None:
            yield from within("embedding_norm", self.embedding_norm.tensors(self.hidden))
        for index, block in enumerate(self.blocks):
            yield from within(f"blocks[{index}]", block.tensors(self.hidden))
        if self.final_norm is not None:
            yield from within("final_norm", self.final_norm.tensors(self.hidden))
        if self.head is not None:
            yield from within("head", self.head.tensors(self.vocab, self.hidden))

    def kv_values_per_token(self) -> int:
        """Numbers cached per token: 2 · kv_heads · head_dim, summed over the layers."""
        return sum(2 * block.attn.kv_size for block in self.blocks)
