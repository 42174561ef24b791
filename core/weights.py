"""Claims: which tensor of a file each leaf of a Decoder reads. Every tensor is claimed once or named as unused.

Knows names, shapes and types; reads no values.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from .arch import Decoder, TensorSpec
from .errors import TensorError
from .runtime.contract import WeightInfo

_MOST_LINES = 20
_MOST_CANDIDATES = 1000
_PER_HEAD = (
    "q_norm and k_norm act on each head by itself, with one weight [head_dim] for all heads; a norm over all heads at "
    "once, or with weights for each head, is not in the vocabulary"
)


@dataclass(frozen=True, slots=True)
class Claims:
    """The tensors a model reads, in the order of its tree, and the file's tensors that it does not."""

    specs: tuple[TensorSpec, ...]
    unused: tuple[str, ...]


def claim(decoder: Decoder, tensors: Mapping[str, WeightInfo]) -> Claims:
    """Matches a decoder with a file's tensors before a byte is read.

    Raises TensorError that lists every tensor that is missing, of another shape than the decoder needs, claimed by two
    leaves, or left over without the architecture naming it as unused.
    """
    specs = tuple(decoder.tensors())
    problems: list[str] = []
    owners: dict[str, TensorSpec] = {}
    for spec in specs:
        first = owners.setdefault(spec.name, spec)
        if first is not spec and not (first.shared and spec.shared and first.shape == spec.shape):
            problems.append(f"claimed twice: {spec.name}, by {first.owner} and by {spec.owner}")
    unused: list[str] = []
    extra: list[str] = []
    for name in tensors:
        if name not in owners:
            known = any(fnmatch.fnmatchcase(name, glob) for glob in decoder.unused)
            (unused if known else extra).append(name)
    problems += _missing_or_misshapen(owners, tensors, extra)
    problems += [
        f"not claimed: {name} {_shape(tensors[name].shape)}, which nothing in this architecture reads" for name in extra
    ]
    if problems:
        more = len(problems) - _MOST_LINES
        shown = problems[:_MOST_LINES] + ([f"and {more} more"] if more > 0 else [])
        if any(_is_head_norm(spec) and _misshapen(spec, tensors) for spec in owners.values()):
            shown.append(_PER_HEAD)
        raise TensorError("the file's tensors do not fit the architecture:\n  " + "\n  ".join(shown))
    return Claims(specs, tuple(unused))


def _missing_or_misshapen(
    owners: Mapping[str, TensorSpec], tensors: Mapping[str, WeightInfo], extra: list[str]
) -> Iterator[str]:
    missing = 0
    for spec in owners.values():
        if spec.name not in tensors:
            # A hostile file may hold a million names: look for similar ones only where the answer is shown.
            missing += 1
            candidates = extra[:_MOST_CANDIDATES] if missing <= _MOST_LINES else []
            close = difflib.get_close_matches(spec.name, candidates, 1, cutoff=0.85)
            hint = f"; the file has {close[0]}" if close else ""
            yield f"missing: {spec.name} {_shape(spec.shape)}, which {spec.owner} reads{hint}"
        elif _misshapen(spec, tensors):
            yield (
                f"wrong shape: {spec.name} is {_shape(tensors[spec.name].shape)} in the file, "
                f"{spec.owner} needs {_shape(spec.shape)}"
            )


def _misshapen(spec: TensorSpec, tensors: Mapping[str, WeightInfo]) -> bool:
    return spec.name in tensors and tuple(tensors[spec.name].shape) != spec.shape


def _is_head_norm(spec: TensorSpec) -> bool:
    return spec.owner.endswith((".q_norm", ".k_norm"))


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
