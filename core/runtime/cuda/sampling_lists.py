"""What a batch's rows say of many tokens, as flat arrays: logit biases, and the tokens that penalties count.

The arrays live on the host and the device, and only what is new is uploaded. Knows nothing of kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CapacityError, RequestError
from ..contract import SamplingRow
from .device import CudaDevice
from .memory import Array

_SPARE = 64  # places for tokens to come behind each generation's list

#: Makes page-locked host arrays: (NumPy type, *shape).
Staging = Callable[..., NDArray[Any]]


class BiasLists:
    """The rows' logit biases, one after another. A mapping that was uploaded is taken to stay as it is."""

    def __init__(self, device: CudaDevice, staging: Staging, ids: Array, values: Array, vocab: int) -> None:
        """``ids`` and ``values`` are the arrays on the device, of one length."""
        self._device = device
        self._vocab = vocab
        self._on_device = (ids, values)
        self._ids = staging(np.int32, ids.size)
        self._values = staging(np.float64, values.size)
        self._uploaded: list[Mapping[int, float]] = []

    def update(self, rows: Sequence[SamplingRow]) -> list[tuple[int, int]]:
        """Each row's first place and number of biases."""
        wanted = [row.logit_bias for row in rows]
        ends = np.cumsum([0, *map(len, wanted)]).tolist()
        ranges = [(start, end - start) for start, end in pairwise(ends)]
        same = len(wanted) <= len(self._uploaded) and all(a is b for a, b in zip(wanted, self._uploaded, strict=False))
        if same or not ends[-1]:
            return ranges
        if ends[-1] > len(self._ids):
            raise CapacityError(
                f"the rows of this step have {ends[-1]:,} logit biases, the sampler has room for {len(self._ids):,}; "
                "lower runtime.max_batch, or send fewer"
            )
        self._uploaded = []
        for bias, (start, count) in zip(wanted, ranges, strict=True):
            if count:
                _check_ids("logit_bias", bias, self._vocab)
                self._ids[start : start + count] = np.fromiter(bias.keys(), np.int32, count)
                self._values[start : start + count] = np.fromiter(bias.values(), np.float64, count)
        end = ends[-1]
        for array, host in zip(self._on_device, (self._ids, self._values), strict=True):
            self._device.copy_in(array.slice_rows(0, end), host[:end])
        self._uploaded = wanted
        return ranges


class _Generation:
    """The distinct tokens of one generation, in the order they came, and how often each is in its output."""

    __slots__ = ("changed", "counts", "done", "last", "output", "prompt", "room", "slots", "start")

    def __init__(self, prompt: Sequence[int], output: Sequence[int], vocab: int) -> None:
        _check_ids("the prompt or output", prompt, vocab)
        self.prompt = prompt
        self.output = output
        self.slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt))}
        self.counts = [0] * len(self.slots)
        self.done = 0  # tokens of the output that are counted, and the last of them
        self.last = -1
        self.changed: list[int] = []  # slots that the lists do not have yet
        self.start = self.room = 0  # where it lies in the lists; no room: nowhere yet

    def describes(self, prompt: Sequence[int], output: Sequence[int]) -> bool:
        """Whether this is the generation, perhaps with some tokens more."""
        if prompt is not self.prompt or output is not self.output or len(output) < self.done:
            return False
        return self.done == 0 or output[self.done - 1] == self.last

    def follow(self, vocab: int, where: str) -> None:
        """Counts the output's new tokens; ``where`` is what an error calls it."""
        new = list(islice(self.output, self.done, None))
        _check_ids(where, new, vocab)
        for token in new:
            slot = self.slots.setdefault(token, len(self.counts))
            if slot == len(self.counts):
                self.counts.append(0)
            self.counts[slot] += 1
            self.changed.append(slot)
        if new:
            self.done += len(new)
            self.last = new[-1]


class SeenLists:
    """The lists of all penalised generations, on the host and the device. What is new is uploaded, not all."""

    def __init__(self, device: CudaDevice, staging: Staging, ids: Array, counts: Array, vocab: int) -> None:
        """``ids`` and ``counts`` are the arrays on the device, of one length."""
        self._device = device
        self._vocab = vocab
        self._on_device = (ids, counts)
        self._ids = staging(np.int32, ids.size)
        self._counts = staging(np.int32, counts.size)
        self._known: dict[tuple[int, int], _Generation] = {}
        self._end = 0

    def update(self, rows: Sequence[SamplingRow]) -> list[tuple[int, int]]:
        """Each row's first place and number of distinct tokens."""
        known: dict[tuple[int, int], _Generation] = {}
        wanted: list[_Generation | None] = []
        for row in rows:
            if row.repetition == 1.0 and not row.presence and not row.frequency:
                wanted.append(None)
                continue
            prompt = row.prompt_ids if row.repetition != 1.0 else ()
            key = (id(prompt), id(row.output_ids))  # both are held here, so no other object has their ids
            item = known.get(key) or self._known.get(key)
            if item is None or not item.describes(prompt, row.output_ids):
                item = _Generation(prompt, row.output_ids, self._vocab)
            item.follow(self._vocab, "the output" if row.repetition == 1.0 else "the prompt or output")
            known[key] = item
            wanted.append(item)
        self._known = known
        self._write(list(known.values()))
        return [(item.start, len(item.counts)) if item else (0, 0) for item in wanted]

    def _write(self, items: list[_Generation]) -> None:
        low, high = len(self._ids), 0
        for item in items:
            if len(item.counts) > item.room:
                room = len(item.counts) + _SPARE
                if self._end + room > len(self._ids):
                    low, high = 0, self._write_all(items)
                    break
                item.start, item.room = self._end, room
                self._end += room
                self._write_one(item)
                low, high = min(low, item.start), max(high, item.start + len(item.counts))
            elif item.changed:
                tokens = list(item.slots) if len(item.changed) > 1 else None
                for slot in item.changed:
                    place = item.start + slot
                    self._ids[place] = tokens[slot] if tokens else item.last
                    self._counts[place] = item.counts[slot]
                    low, high = min(low, place), max(high, place + 1)
                item.changed = []
        if low < high:
            for array, host in zip(self._on_device, (self._ids, self._counts), strict=True):
                self._device.copy_in(array.slice_rows(low, high), host[low:high])

    def _write_all(self, items: list[_Generation]) -> int:
        """Lays all lists out anew, without what is no longer wanted; returns where they end."""
        total = sum(len(item.counts) for item in items)
        if total > len(self._ids):
            raise CapacityError(
                f"the penalties of this step's rows count {total:,} distinct tokens, the sampler has room for "
                f"{len(self._ids):,}; lower runtime.max_batch, or run fewer requests with penalties"
            )
        spare = min(_SPARE, (len(self._ids) - total) // len(items))
        self._end = 0
        for item in items:
            item.start, item.room = self._end, len(item.counts) + spare
            self._end += item.room
            self._write_one(item)
        return self._end

    def _write_one(self, item: _Generation) -> None:
        place = slice(item.start, item.start + len(item.counts))
        self._ids[place] = np.fromiter(item.slots, np.int32, len(item.counts))
        self._counts[place] = item.counts
        item.changed = []


def _check_ids(where: str, ids: Iterable[int], vocab: int) -> None:
    for token in ids:
        if not 0 <= token < vocab:
            raise RequestError(f"token id {token} in {where} is not in the vocabulary (0 to {vocab - 1})")
