"""Experts in NumPy: pairs of a row and one of its experts, sorted by expert, so that each matrix is used once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .layer import Experts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from polyhead import CpuModule

    F32 = NDArray[np.float32]


def load_on_cpu(spec: Experts, weights: Mapping[str, NDArray[np.float32]]) -> CpuModule:
    """Called once when a model is loaded."""
    import numpy as np  # not at the top: importing a plugin should cost nothing

    router, gate, up, down = (weights[name] for name in (spec.router, spec.gate, spec.up, spec.down))
    shared = spec.shared
    parts = () if shared is None else tuple(weights[name] for name in (shared.gate, shared.up, shared.down))

    def silu(x: F32) -> F32:
        return np.asarray(x / (1.0 + np.exp(-x)), np.float32)

    def run(x: F32, out: F32, scratch: Mapping[str, F32]) -> None:
        scores = scratch["scores"]
        np.matmul(x, router.T, out=scores)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : spec.used]
        kept = np.take_along_axis(scores, chosen, axis=1)
        shares = np.exp(kept - kept[:, :1])
        shares /= (shares if spec.normalise else np.exp(scores - kept[:, :1])).sum(axis=1, keepdims=True)
        shares *= np.float32(spec.scale)

        results = scratch["results"].reshape(-1, x.shape[1])  # of each pair
        experts = chosen.reshape(-1)
        order = np.argsort(experts, kind="stable")
        bounds = np.searchsorted(experts[order], np.arange(spec.count + 1))
        for expert in np.unique(experts):
            pairs = order[bounds[expert] : bounds[expert + 1]]
            rows = x[pairs // spec.used]
            results[pairs] = (silu(rows @ gate[expert].T) * (rows @ up[expert].T)) @ down[expert].T
        np.einsum("rs,rsh->rh", shares, results.reshape(len(x), spec.used, -1), out=out)
        if shared is not None:
            inner = silu(x @ parts[0].T) * (x @ parts[1].T)
            switch = 1.0 / (1.0 + np.exp(-(x @ weights[shared.gate_input].reshape(-1, 1))))
            out += switch * (inner @ parts[2].T)

    return run
