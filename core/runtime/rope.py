"""Rotary frequencies from a Rope description, in float64: the one place where scalings are arithmetic."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ..arch import LinearScaling, Rope, YarnScaling
from ..errors import TensorError


def frequencies(rope: Rope, factors: NDArray[np.float32] | None = None) -> tuple[NDArray[np.float64], float]:
    """Radians per position for each of the dim/2 pairs, float64 [dim/2], and the magnitude of cos and sin.

    theta^(−2i/dim) of Su et al. 2021; scalings as LinearScaling and YarnScaling say; ``factors`` [dim/2] divide.
    Raises TensorError for a factor that is not a finite number above 0.
    """
    pairs = np.arange(rope.dim // 2, dtype=np.float64)
    freqs = rope.theta ** (-2.0 * pairs / rope.dim)
    if factors is not None:
        if not (np.isfinite(factors) & (factors > 0)).all():
            raise TensorError(
                f"{rope.factors or 'RoPE factors'}: not every factor is a finite number above 0; the file is damaged"
            )
        freqs = freqs / factors.astype(np.float64)
    scaling = rope.scaling
    if isinstance(scaling, LinearScaling):
        return freqs / scaling.factor, 1.0
    if isinstance(scaling, YarnScaling):
        keep = _yarn_ramp(rope, scaling, pairs)
        magnitude = scaling.magnitude if scaling.magnitude is not None else 1.0 + 0.1 * math.log(scaling.factor)
        return freqs * keep + freqs / scaling.factor * (1.0 - keep), magnitude
    return freqs, 1.0


def _yarn_ramp(rope: Rope, scaling: YarnScaling, pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where a pair's frequency is kept, 0 where it is interpolated (YaRN, eq. 17–22)."""

    def pair_with(rotations: float) -> float:
        """The pair that makes so many rotations over the original context."""
        return (
            rope.dim * math.log(scaling.original_context / (rotations * 2.0 * math.pi)) / (2.0 * math.log(rope.theta))
        )

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), rope.dim - 1)
    ramp = np.clip((pairs - low) / max(high - low, 0.001), 0.0, 1.0)
    return np.asarray(1.0 - ramp)


def tables(
    rope: Rope, context: int, factors: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin for every position, float32 [context, dim/2] each; angles are taken in float64."""
    with np.errstate(all="ignore"):  # extreme scalings give NaN, which the logits show
        freqs, magnitude = frequencies(rope, factors)
        angles = np.arange(context, dtype=np.float64)[:, None] * freqs
        return (np.cos(angles) * magnitude).astype(np.float32), (np.sin(angles) * magnitude).astype(np.float32)
