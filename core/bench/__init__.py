"""Measuring: how fast a model runs and near what limit, and how well it predicts a text. Used by the command line."""

from __future__ import annotations

from .cases import Case, cases
from .machine import Limits, measure_limits
from .measure import Report, Result, measure
from .perplexity import Perplexity, perplexity, windows

__all__ = [
    "Case",
    "Limits",
    "Perplexity",
    "Report",
    "Result",
    "cases",
    "measure",
    "measure_limits",
    "perplexity",
    "windows",
]
