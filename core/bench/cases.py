"""Cases: what is timed, in llama-bench's terms. pp512 takes in 512 prompt tokens, tg128 generates 128 one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import RequestError

MOST = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """One test: ``tokens`` per sequence, for ``batch`` sequences at once, each after ``depth`` tokens of context."""

    kind: Literal["pp", "tg"]
    tokens: int
    depth: int = 0
    batch: int = 1

    @property
    def label(self) -> str:
        depth = f" @ d{self.depth}" if self.depth else ""
        return f"{self.kind}{self.tokens}{depth}{f' x{self.batch}' if self.batch > 1 else ''}"

    @property
    def context(self) -> int:
        """Tokens of one sequence at the end."""
        return self.depth + self.tokens


def cases(prompt_tokens: int, gen_tokens: int, depth: int = 0, batches: Sequence[int] = (1,)) -> list[Case]:
    """A pp and a tg case for every batch; 0 tokens leave that kind out. Raises RequestError for impossible numbers."""
    numbers = {"prompt tokens": (prompt_tokens, 0), "generated tokens": (gen_tokens, 0), "depth": (depth, 0)}
    numbers |= {f"batch[{index}]": (batch, 1) for index, batch in enumerate(batches)}
    for name, (value, least) in numbers.items():
        if not least <= value <= MOST:
            raise RequestError(f"{name} must be from {least} to {MOST:,}, got {value:,}")
    found = [Case("pp", prompt_tokens, depth, batch) for batch in batches if prompt_tokens]
    found += [Case("tg", gen_tokens, depth, batch) for batch in batches if gen_tokens]
    if not found:
        raise RequestError("nothing to measure: prompt tokens and generated tokens are both 0")
    return found
