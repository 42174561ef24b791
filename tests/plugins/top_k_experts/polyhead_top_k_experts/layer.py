"""TopKExperts: the layer's description, and how NumPy computes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from polyhead import CpuModule
from polyhead.arch import Module, TensorSpec
from polyhead.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class TopKExperts(Module):
    """Each row goes through the ``used`` experts with the highest router scores; their results are weighted.

    y = sum over the chosen e of p_e · down_e(relu(up_e(x))²), p = softmax of the chosen experts' scores.
    ``router`` names [experts, hidden], ``up`` [experts, size, hidden], ``down`` [experts, hidden, size].
    """

    experts: int
    used: int
    size: int
    router: str
    up: str
    down: str

    def __post_init__(self) -> None:
        if not 1 <= self.used <= self.experts:
            raise ConfigError(f"TopKExperts: used is {self.used}, expected 1 to {self.experts}")

    def tensors(self, hidden: int) -> Iterator[TensorSpec]:
        yield TensorSpec(self.router, (self.experts, hidden), "router")
        yield TensorSpec(self.up, (self.experts, self.size, hidden), "up")
        yield TensorSpec(self.down, (self.experts, hidden, self.size), "down")

    def scratch(self, hidden: int) -> Mapping[str, int]:
        return {"scores": self.experts, "inner": self.size}


def load_on_cpu(spec: TopKExperts, weights: Mapping[str, NDArray[np.float32]]) -> CpuModule:
    """Called once when the model is loaded."""
    import numpy as np  # not at the top: importing a plugin should cost nothing

    router, up, down = weights[spec.router], weights[spec.up], weights[spec.down]

    def run(x: NDArray[np.float32], out: NDArray[np.float32], scratch: Mapping[str, NDArray[np.float32]]) -> None:
        scores, inner = scratch["scores"], scratch["inner"]
        np.matmul(x, router.T, out=scores)
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, : spec.used]
        for row, experts in enumerate(chosen):
            shares = np.exp(scores[row, experts] - scores[row, experts[0]])
            shares /= shares.sum()
            out[row] = 0.0
            for share, expert in zip(shares, experts, strict=True):
                np.matmul(up[expert], x[row], out=inner[row])
                np.maximum(inner[row], 0.0, out=inner[row])
                inner[row] *= inner[row]
                out[row] += share * (down[expert] @ inner[row])

    return run
