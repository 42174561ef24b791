"""read_rope: the rotary embedding that a model file's metadata describes, for any architecture."""

from __future__ import annotations

import math

from ..errors import ConfigError
from .metadata import Metadata
from .position import LinearScaling, Pairing, Rope, YarnScaling

SCALINGS = ("none", "linear", "yarn")


def read_rope(
    meta: Metadata,
    dim: int,
    pairing: Pairing,
    *,
    theta: float = 10000.0,
    factors: str | None = "rope_freqs.weight",
) -> Rope:
    """Reads the ``{architecture}.rope.*`` keys. ``dim`` and ``theta`` hold where the file does not say.

    ``factors`` is the tensor of frequency factors, used if the file has it. Raises ConfigError for a scaling that is
    unknown or incomplete.
    """
    return Rope(
        theta=meta.get(float, "rope.freq_base", theta),
        dim=meta.get(int, "rope.dimension_count", dim, minimum=2),
        pairing=pairing,
        scaling=_read_scaling(meta),
        factors=meta.optional(factors) if factors is not None else None,
    )


def _read_scaling(meta: Metadata) -> LinearScaling | YarnScaling | None:
    meta.ignore("rope.scaling.finetuned")  # says how the file came to be, not how to run it
    legacy = meta.get(float, "rope.scale_linear", 1.0)
    factor = meta.get(float, "rope.scaling.factor", legacy)
    # Files from before the type was recorded mean linear when they carry a factor.
    kind = meta.get(str, "rope.scaling.type", "linear" if factor not in (0.0, 1.0) else "none")
    if kind not in SCALINGS:
        raise ConfigError(
            f"{meta.architecture}.rope.scaling.type is {kind!r}; plugin {meta.plugin} supports {', '.join(SCALINGS)}. "
            "Running the model anyway would give wrong results"
        )
    meta.require(rope__scaling__yarn_log_multiplier=0.0)
    if kind == "yarn":
        return _read_yarn(meta, factor)
    meta.ignore("rope.scaling.original_context_length", "rope.scaling.yarn_*", "rope.scaling.attn_factor")
    if kind == "linear" and factor not in (0.0, 1.0):
        return LinearScaling(factor)
    return None


def _read_yarn(meta: Metadata, factor: float) -> YarnScaling:
    extrapolation = meta.get(float, "rope.scaling.yarn_ext_factor", 1.0)
    if extrapolation not in (1.0, -1.0):  # -1 is written for "not set"
        raise ConfigError(
            f"{meta.architecture}.rope.scaling.yarn_ext_factor is {extrapolation}; plugin {meta.plugin} supports only 1"
        )
    # Converters write a whole magnitude here that readers take for a factor: which is meant cannot be told.
    meta.require(rope__scaling__yarn_attn_factor=1.0)
    attention = meta.get(float, "rope.scaling.attn_factor", 1.0)
    return YarnScaling(
        factor=factor,
        original_context=meta.get(int, "rope.scaling.original_context_length", minimum=1),
        beta_fast=meta.get(float, "rope.scaling.yarn_beta_fast", 32.0),
        beta_slow=meta.get(float, "rope.scaling.yarn_beta_slow", 1.0),
        magnitude=attention * (1.0 + 0.1 * math.log(factor)) if factor > 0 else None,
    )
