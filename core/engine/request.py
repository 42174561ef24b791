"""Request: one prompt on its way to its completion, with the state that the scheduler keeps of it.

Knows nothing of text, batches or devices.
"""

from __future__ import annotations

import enum
import math
import operator
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from ..errors import PolyheadError, RequestError
from .sampling import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Status(enum.Enum):
    """Where a request is: without a block (waiting), in the running batch, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One prompt, its parameters, and the tokens generated so far.

    ``seed`` is that of the parameters, or 64 random bits drawn here; with the position of a token it decides the draw,
    so a request gives the same tokens alone, in any batch, and after a preemption. ``output_ids`` includes the token
    that ended the generation. ``error`` is set where ``finish_reason`` is "error". The scheduler alone changes
    ``status``, ``num_cached_tokens`` (the first so many tokens have their keys and values in the cache) and
    ``block_table`` (the physical blocks that hold them).
    """

    __slots__ = (
        "_stop_ids",
        "block_table",
        "error",
        "finish_reason",
        "id",
        "num_cached_tokens",
        "num_preemptions",
        "output_ids",
        "params",
        "prompt_ids",
        "seed",
        "status",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        eos_ids: Collection[int] = (),
    ) -> None:
        """``eos_ids``: the model's own end tokens, end of text and end of turn. Raises ``RequestError`` if the
        prompt is empty or holds something that is no integer.
        """
        self.id = request_id
        try:
            if any(isinstance(token, bool) for token in prompt_ids):
                raise TypeError("True and False are not token ids")
            self.prompt_ids = tuple(map(operator.index, prompt_ids))
        except TypeError as error:
            raise RequestError(f"a prompt must hold token ids: {error}") from None
        if not self.prompt_ids:
            raise RequestError("the prompt is empty; give at least one token")
        self.params = params if params is not None else SamplingParams()
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
        self.output_ids: list[int] = []
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.error: PolyheadError | None = None
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.block_table: list[int] = []
        own = frozenset(self.params.stop_token_ids)
        self._stop_ids = own if self.params.ignore_eos else own | frozenset(eos_ids)

    def __repr__(self) -> str:
        ended = f", {self.finish_reason}" if self.finish_reason else ""
        return (
            f"<Request {self.id!r} {self.status.value}{ended}: {len(self.prompt_ids)} prompt + {len(self.output_ids)} "
            f"output tokens, {self.num_cached_tokens} cached in {len(self.block_table)} blocks>"
        )

    @property
    def num_tokens(self) -> int:
        """Prompt and output. It is also the position that the next token will have."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def finished(self) -> bool:
        """Whether the request has ended, for whatever reason."""
        return self.status is Status.FINISHED

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end the generation: the model's own unless ``ignore_eos``, and ``stop_token_ids``."""
        return self._stop_ids

    @property
    def logit_bias(self) -> Mapping[int, float]:
        """The bias for the next token: the parameters', and -inf for every stop token before ``min_tokens``."""
        if len(self.output_ids) >= self.params.min_tokens:
            return self.params.logit_bias
        return {**self.params.logit_bias, **dict.fromkeys(self._stop_ids, -math.inf)}

    def tokens(self, start: int, stop: int) -> list[int]:
        """The tokens at positions ``start`` to ``stop - 1``, of prompt and output as one sequence."""
        n = len(self.prompt_ids)
        if start >= n:
            return self.output_ids[start - n : stop - n]
        return [*self.prompt_ids[start:stop], *self.output_ids[: max(stop - n, 0)]]

    def validate_for(self, vocab_size: int) -> None:
        """Raises ``RequestError`` if a token id of the prompt or of the parameters is not in the vocabulary."""
        for index, token in enumerate(self.prompt_ids):
            if not 0 <= token < vocab_size:
                raise RequestError(
                    f"token id {token} at position {index} of the prompt is not in the vocabulary "
                    f"(0 to {vocab_size - 1})"
                )
        self.params.validate_for(vocab_size)

    def end_reached(self, context: int) -> Literal["stop", "length"] | None:
        """Why the generation ends with the last output token, if it does. A stop token counts before a full context."""
        made = len(self.output_ids)
        # The stop token itself is no part of the min_tokens; the bias above keeps it from coming earlier.
        if made > self.params.min_tokens and self.output_ids[-1] in self._stop_ids:
            return "stop"
        if made >= self.params.max_tokens or self.num_tokens >= context:
            return "length"
        return None
