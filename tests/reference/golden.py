"""The stored reference outputs, for tests: ``load(name)`` for a tiny model, ``load_smollm2()`` for SmolLM2-135M.

Needs only numpy; reads ``goldens/``, written by make_goldens.py. README.md says what each array means.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Sequence:
    """One teacher-forced input: ``logits[i]`` (float32 [P, vocab]) belongs to position ``positions[i]`` of ``ids``."""

    ids: list[int]
    positions: NDArray[np.int32]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation. ``margins[i]``: top logit minus second at step i (how far from a tie), float32.

    No token ends it: SmolLM2's continuations run on past ``<|im_end|>``; those of tiny models do not contain the end.
    """

    prompt: list[int]
    tokens: list[int]
    margins: NDArray[np.float32]


@dataclass(frozen=True)
class Golden:
    """What transformers computed for one tiny model. ``checkpoints`` are of block ``layer`` for ``sequences[0]``.

    ``float32_error`` is ‖float32 - float64‖ / ‖float64‖ of the reference's own logits: tolerances must exceed it.
    """

    name: str
    sha256: str
    sequences: tuple[Sequence, ...]
    greedy: Greedy
    layer: int
    checkpoints: Mapping[str, NDArray[np.float32]]
    float32_error: float


@dataclass(frozen=True)
class Prompt:
    """A prompt of the SmolLM2 golden: raw ``text``, or ``messages`` that render to ``text``; tokenised to ``ids``.

    Last-position logits (float32) at the 64 best ids (``top_ids``, best first) and at 512 random ids (``some_ids``).
    """

    text: str
    messages: list[dict[str, str]] | None
    ids: list[int]
    greedy: Greedy
    greedy_text: str
    top_ids: NDArray[np.int32]
    top_logits: NDArray[np.float32]
    some_ids: NDArray[np.int32]
    some_logits: NDArray[np.float32]


@dataclass(frozen=True)
class SmolLM2:
    """Reference outputs for SmolLM2-135M-Instruct.Q4_1.gguf. ``nll``: the mean over ``paragraph_ids[1:]``, in nats."""

    sha256: str
    prompts: tuple[Prompt, ...]
    paragraph: str
    paragraph_ids: list[int]
    token_nll: NDArray[np.float32]
    nll: float


def names() -> list[str]:
    """Names of the tiny models that have a golden, those of ``tiny_models.SPECS``."""
    return list(_index())


def load(name: str) -> Golden:
    """The golden of a tiny model. KeyError for an unknown name."""
    entry = _index()[name]
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return Golden(
            name=name,
            sha256=entry["sha256"],
            sequences=tuple(_sequences(arrays)),
            greedy=_greedy(arrays, ""),
            layer=entry["layer"],
            checkpoints={key[11:]: arrays[key] for key in arrays.files if key.startswith("checkpoint.")},
            float32_error=entry["float32_error"],
        )


def load_smollm2() -> SmolLM2:
    """The golden of SmolLM2-135M-Instruct.Q4_1.gguf."""
    entry = json.loads((FOLDER / "smollm2.json").read_text(encoding="utf-8"))
    with np.load(FOLDER / "smollm2.npz") as arrays:
        prompts = []
        for i, prompt in enumerate(entry["prompts"]):
            greedy = _greedy(arrays, f"{i}.")
            tops = {key: arrays[f"{i}.{key}"] for key in ("top_ids", "top_logits", "some_ids", "some_logits")}
            prompts.append(Prompt(**prompt, ids=greedy.prompt, greedy=greedy, **tops))
        return SmolLM2(
            sha256=entry["sha256"],
            prompts=tuple(prompts),
            paragraph=entry["paragraph"],
            paragraph_ids=arrays["paragraph_ids"].tolist(),
            token_nll=arrays["token_nll"],
            nll=entry["nll"],
        )


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file, to compare with ``Golden.sha256`` before trusting a comparison."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def half_pairs(x: NDArray[np.float32], rope_dim: int) -> NDArray[np.float32]:
    """Reorders channels of q or k (last axis) from interleaved pairs (2i, 2i+1) to half pairs (i, i + rope_dim/2).

    For a runtime that keeps ``llama`` files in the half layout inside: attention does not care, checkpoints do.
    """
    rotated, rest = x[..., :rope_dim], x[..., rope_dim:]
    return np.concatenate([rotated[..., 0::2], rotated[..., 1::2], rest], axis=-1)


def _index() -> dict[str, dict[str, object]]:
    return json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))["models"]


def _sequences(arrays: np.lib.npyio.NpzFile) -> Iterator[Sequence]:
    for i in range(sum(key.startswith("ids.") for key in arrays.files)):
        yield Sequence(arrays[f"ids.{i}"].tolist(), arrays[f"positions.{i}"], arrays[f"logits.{i}"])


def _greedy(arrays: np.lib.npyio.NpzFile, prefix: str) -> Greedy:
    prompt, tokens = arrays[f"{prefix}prompt"].tolist(), arrays[f"{prefix}tokens"].tolist()
    return Greedy(prompt, tokens, arrays[f"{prefix}margins"])
