"""Pictures of a benchmark of many requests, drawn with matplotlib, which the extra ``docs`` brings."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .machine import Limits
from .serving import Served
from .static import StaticResult

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ConfigError where a plot could not be drawn or written, before anything is measured for it."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"{path}: a plot is written as {', '.join(FORMATS)}; name a file that ends so")
    try:
        writable = not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)
    except (OSError, ValueError):  # a name too long, or with a NUL
        writable = False
    if not writable:
        raise ConfigError(f"{path} cannot be written")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a plot needs matplotlib: pip install 'polyhead[docs]', or leave --plot out")


def draw(path: Path, title: str, statics: Sequence[StaticResult], runs: Sequence[Served], limits: Limits) -> None:
    """Writes a picture with a row for the static batches and a row for each run of requests."""
    from matplotlib.figure import Figure  # draws without a display

    rows = bool(statics) + len(runs)
    figure = Figure(figsize=(12, 0.8 + 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(rows, 3, squeeze=False)
    if statics:
        _statics(axes[0], statics, limits)
    for row, run in zip(axes[bool(statics) :], runs, strict=True):
        _run(row, run)
    figure.savefig(path, dpi=110)


def _statics(axes: Any, statics: Sequence[StaticResult], limits: Limits) -> None:
    batches = [str(result.case.batch) for result in statics]
    for ax, name, rates, most in (
        (axes[0], "decode", [r.decode_rate for r in statics], [r.decode_limit(limits)[0] for r in statics]),
        (axes[1], "prefill", [r.prefill_rate for r in statics], [r.prefill_limit(limits) for r in statics]),
    ):
        ax.bar(batches, most, color="0.85", label="limit")
        ax.bar(batches, rates, width=0.5, label="measured")
        ax.set(title=f"{name}, tokens/s", xlabel="sequences at once")
        ax.legend()
    shares = [100 * rate.decode_rate / rate.decode_limit(limits)[0] for rate in statics]
    axes[2].plot(batches, shares, marker="o")
    axes[2].set(title="decode, % of the limit", xlabel="sequences at once", ylim=(0, None))


def _run(axes: Any, run: Served) -> None:
    name = "all at once" if run.rate is None else f"{run.rate:g} requests/s"
    for values, label in ((run.first, "to the first token"), (run.gaps, "between tokens")):
        ordered = sorted(1e3 * value for value in values)
        if ordered:
            axes[0].plot(ordered, [(i + 1) / len(ordered) for i in range(len(ordered))], label=label)
    axes[0].set(title=f"{name}: latency", xlabel="ms", ylabel="share at or below", xscale="log")
    axes[0].legend()
    at = [moment.at for moment in run.moments]
    axes[1].plot(at, [moment.requests for moment in run.moments], drawstyle="steps-post")
    axes[1].set(title="requests running or waiting", xlabel="s", ylim=(0, None))
    axes[2].plot(at, [100 * moment.kv for moment in run.moments], drawstyle="steps-post")
    axes[2].set(title="KV cache in use, %", xlabel="s", ylim=(0, 100))
