"""Block: one layer of a decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .attention import Attention
from .fields import check_fields
from .mlp import MLP
from .module import Module
from .norm import Norm
from .tensors import TensorSpec, check, within


@dataclass(frozen=True, slots=True)
class Block:
    """Attention and an MLP (or a plugin's Module) around the residual stream x.

    ``sequential``: x += attn(attn_norm(x)), then x += mlp(mlp_norm(x)). ``parallel``: both read the same x and both
    are added; without an ``mlp_norm`` they share the normed x. ``post_attn_norm`` and ``post_mlp_norm`` act on each
    branch before it is added, ``residual_scale`` multiplies it. A missing ``attn_norm`` means the branch reads x.
    """

    attn_norm: Norm | None
    attn: Attention
    mlp_norm: Norm | None
    mlp: MLP | Module
    residual: Literal["sequential", "parallel"] = "sequential"
    post_attn_norm: Norm | None = None
    post_mlp_norm: Norm | None = None
    residual_scale: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check(
            self.residual in ("sequential", "parallel"),
            f"Block: residual is {self.residual!r}, expected 'sequential' or 'parallel'",
        )
        check(
            math.isfinite(self.residual_scale),
            f"Block: residual_scale is {self.residual_scale!r}, expected a finite number",
        )

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        for name, norm in (("attn_norm", self.attn_norm), ("mlp_norm", self.mlp_norm)):
            if norm is not None:
                yield from within(name, norm.tensors(hidden))
        yield from within("attn", self.attn.tensors(hidden))
        yield from within("mlp", self.mlp.tensors(hidden))
        for name, norm in (("post_attn_norm", self.post_attn_norm), ("post_mlp_norm", self.post_mlp_norm)):
            if norm is not None:
                yield from within(name, norm.tensors(hidden))
