"""Request: one prompt on its way to its completion, with the state that the scheduler keeps of it.

Knows nothing of text, batches or devices.
"""

from __future__ import annotations

import copy
import enum
import math
import operator
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from ..errors import PolyheadError, RequestError
from .block_keys import block_key, root_key
from .drafting import Lookup
from .sampling import SamplingParams
from .structured import Guide

FinishReason = Literal["stop", "length", "abort", "error"]
_SEED_STEP = 0x9E3779B97F4A7C15  # odd, so its multiples modulo 2**64 all differ


class Status(enum.Enum):
    """Where a request is: without a block (waiting), in the running batch, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One prompt, its parameters, and the tokens generated so far.

    ``seed`` is that of the parameters, or 64 random bits drawn here; with the position of a token it decides the draw,
    so a request gives the same tokens alone, in any batch, and after a preemption. ``output_ids`` includes the token
    that ended the generation. ``stop_ids`` are the tokens that end it: the model's own unless ``ignore_eos``, and
    ``stop_token_ids``. ``guide``: where the output is in the form it must have; whoever makes the request sets it.
    ``foreseeable``: how a token is chosen does not depend on the one before. ``error`` is set where ``finish_reason``
    is "error".

    The scheduler alone changes these: ``status``; ``num_cached_tokens``, the first so many tokens have their keys and
    values in the cache; ``block_table``, the physical blocks that hold them, with room for ``held_tokens``;
    ``num_published``, the first so many blocks of the table may be found by others; ``num_reused_tokens``, so many
    tokens of the prompt were found when the request was first admitted; ``num_scored``, of the first so many tokens of
    the prompt the log-probability is known or not asked for; ``num_drafted`` tokens were guessed and ``num_accepted``
    of them right; ``rank``, its place in the order of requests; ``final``, no more tokens than this will ever be
    cached; ``next_event``, the number of cached tokens at which something is due besides the next token.
    """

    __slots__ = (
        "block_keys",
        "block_table",
        "cache_salt",
        "error",
        "final",
        "finish_reason",
        "foreseeable",
        "guide",
        "held_tokens",
        "id",
        "lookup",
        "next_event",
        "num_accepted",
        "num_cached_tokens",
        "num_drafted",
        "num_preemptions",
        "num_published",
        "num_reused_tokens",
        "num_scored",
        "output_ids",
        "params",
        "priority",
        "prompt_ids",
        "rank",
        "sample",
        "seed",
        "status",
        "stop_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        *,
        eos_ids: Collection[int] = (),
        priority: int = 0,
        cache_salt: bytes | None = None,
    ) -> None:
        """``eos_ids``: the model's own end tokens, end of text and end of turn. ``priority``: a lower number runs
        earlier. ``cache_salt``: KV blocks are shared with requests of the same salt that begin alike; None: with none.

        Raises ``RequestError`` if the prompt is empty or holds something that is no integer, or the priority is no
        32-bit integer.
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
        if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) >= 2**31:
            raise RequestError(f"priority must be a 32-bit integer, lower ones run earlier; got {priority!r:.80}")
        self.params = params if params is not None else SamplingParams()
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
        self.sample = 0
        penalised = self.params.presence_penalty or self.params.frequency_penalty
        penalised = penalised or self.params.repetition_penalty != 1.0
        self.foreseeable = not penalised and not self.params.min_tokens and self.params.structured is None
        self.guide: Guide | None = None
        self.priority = priority
        self.cache_salt = cache_salt
        self.block_keys: list[bytes] = []
        self.output_ids: list[int] = []
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self.error: PolyheadError | None = None
        self.rank = (0, 0)
        self.held_tokens = self.num_cached_tokens = self.num_published = self.num_reused_tokens = 0
        self.num_preemptions = self.num_drafted = self.num_accepted = 0
        # The first token of a text follows nothing and has no log-probability.
        self.num_scored = len(self.prompt_ids) if self.params.prompt_logprobs is None else 1
        self.lookup: Lookup | None = None
        self.final = self.next_event = 0
        self.block_table: list[int] = []
        own = frozenset(self.params.stop_token_ids)
        self.stop_ids = own if self.params.ignore_eos else own | frozenset(eos_ids)

    def another(self, request_id: str, sample: int) -> Request:
        """A further sample of a request that was not added yet: the same but for its id, its number and its seed.

        Sample i has the seed ``(seed + i * 0x9E3779B97F4A7C15) mod 2**64``, a different one for each i; sample 0 is
        the request itself, so it does not depend on how many samples there are.
        """
        other = copy.copy(self)
        other.id, other.sample = request_id, sample
        other.seed = (self.seed + sample * _SEED_STEP) % 2**64
        other.block_keys, other.output_ids, other.block_table = list(self.block_keys), [], []
        other.num_scored = len(self.prompt_ids)  # once for all samples
        other.guide = None if self.guide is None else self.guide.fork()
        return other

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
    def logit_bias(self) -> Mapping[int, float]:
        """The bias for the next token: the parameters', and -inf for every stop token before ``min_tokens``."""
        if len(self.output_ids) >= self.params.min_tokens:
            return self.params.logit_bias
        return {**self.params.logit_bias, **dict.fromkeys(self.stop_ids, -math.inf)}

    def tokens(self, start: int, stop: int) -> list[int]:
        """The tokens at positions ``start`` to ``stop - 1``, of prompt and output as one sequence."""
        n = len(self.prompt_ids)
        if start >= n:
            return self.output_ids[start - n : stop - n]
        return [*self.prompt_ids[start:stop], *self.output_ids[: max(stop - n, 0)]]

    def unscored(self, start: int, end: int) -> range:
        """The positions of prompt tokens whose log-probabilities are wanted and come of computing ``start:end``."""
        if self.num_scored >= len(self.prompt_ids):
            return range(0)
        return range(max(start + 1, self.num_scored), min(end + 1, len(self.prompt_ids)))

    def extend_keys(self, block_size: int, count: int) -> None:
        """Makes ``block_keys`` those of at least the first ``count`` blocks of its tokens, all of them full. Without a
        ``cache_salt`` there are none.
        """
        keys = self.block_keys
        done = len(keys)
        if done >= count or self.cache_salt is None:
            return
        key = keys[-1] if done else root_key(self.cache_salt)
        for start in range(done * block_size, count * block_size, block_size):
            key = block_key(key, self.tokens(start, start + block_size))
            keys.append(key)

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
        if made > self.params.min_tokens and self.output_ids[-1] in self.stop_ids:
            return "stop"
        if made >= self.params.max_tokens or self.num_tokens >= context:
            return "length"
        return None
