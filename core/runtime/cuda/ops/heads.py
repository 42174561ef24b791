"""What kernels that include kernels/heads.cuh are given for the norms and the rotation of heads. Launches nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ....arch import Attention, LayerNorm, Norm
from ..memory import Array
from .checks import expect, expect_array

#: A norm over each head with its weight and bias, f32 [head_dim].
HeadNorm = tuple[Norm, Array, Array | None]
#: The rotation's tables, cos and sin: f32 [context, rope.dim / 2] each.
Turn = tuple[Array, Array]

_NULL = np.uint64(0)


def head_macros(pairs: int, interleaved: bool, q_norm: int, k_norm: int) -> Mapping[str, object]:
    """The macros. Norms are 0 for none, 1 for RMSNorm, 2 for LayerNorm; 0 ``pairs`` are no rotation."""
    return {"PH_ROPE_PAIRS": pairs, "PH_INTERLEAVED": interleaved, "PH_Q_NORM": q_norm, "PH_K_NORM": k_norm}


def head_kinds(spec: Attention) -> tuple[int, bool, int, int]:
    """The arguments of head_macros for an attention."""
    rope = spec.rope
    norms = (_kind(spec.q_norm), _kind(spec.k_norm))
    return (0, False, *norms) if rope is None else (rope.dim // 2, rope.pairing == "interleaved", *norms)


def head_vectors(
    op: str, spec: Attention, turn: Turn | None, norms: Sequence[HeadNorm | None]
) -> list[Array | np.uint64]:
    """cos, sin, then weight and bias of q's norm and of k's, null where there are none.

    Raises DeviceError where ``turn`` and ``norms``, those of q and of k, disagree with ``spec`` on what there is.
    """
    expect(op, (spec.rope is None) == (turn is None), "rope is in only one of spec and arguments")
    vectors: list[Array | np.uint64] = [_NULL, _NULL]
    if spec.rope is not None and turn is not None:
        expect_array(op, "cos", turn[0], ("f32",), (None, spec.rope.dim // 2))
        expect_array(op, "sin", turn[1], ("f32",), turn[0].shape)
        vectors = list(turn)
    expect(op, len(norms) == 2, lambda: f"{len(norms)} norms, expected those of q and k")
    for name, norm, given in zip(("q_norm", "k_norm"), (spec.q_norm, spec.k_norm), norms, strict=True):
        expect(op, norm == (given and given[0]), f"{name} differs between spec and arguments")
        for vector in given[1:] if given else (None, None):
            if vector is not None:
                expect_array(op, name, vector, ("f32",), (spec.head_dim,))
            vectors.append(_NULL if vector is None else vector)
    return vectors


def head_eps(spec: Attention) -> tuple[float, float]:
    """What the norms of q and of k add to a variance."""
    return 0.0 if spec.q_norm is None else spec.q_norm.eps, 0.0 if spec.k_norm is None else spec.k_norm.eps


def _kind(norm: Norm | None) -> int:
    return 0 if norm is None else 2 if isinstance(norm, LayerNorm) else 1
