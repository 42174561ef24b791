"""Compiles the CUDA kernels without a GPU and lists what each needs; a warning, or a spill in a hot one, is an error.

Every specialisation for Hopper, and of each source file up to MOST, evenly spread, for generations before and after.
`polyhead doctor --kernels` compiles them all.
"""

from __future__ import annotations

import sys
import time

from polyhead.runtime.cuda.compile_all import compile_all, table
from polyhead.runtime.cuda.variants import Variant, kernel_files, variants

MOST = 14


def spread(wanted: list[Variant], most: int) -> list[Variant]:
    """At most so many of them, the first and the last included."""
    if len(wanted) <= most:
        return wanted
    return [wanted[n * (len(wanted) - 1) // (most - 1)] for n in range(most)]


began = time.perf_counter()
everything = variants()
some = [each for file in kernel_files() for each in spread([v for v in everything if v.file == file], MOST)]
reports = [*compile_all(["sm_90a"], everything), *compile_all(["sm_80", "sm_120"], some)]
print(table(reports))
problems = sum(bool(report.problem) for report in reports)
print(f"{len(reports)} specialisations in {time.perf_counter() - began:.0f} s; {problems or 'none'} with a problem")
sys.exit(problems > 0)
