"""Base: what every part of the conformance suite shares: the subject of a test class, failures and skips in words."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, ClassVar, NoReturn

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError, PolyheadError
from .case import Case
from .subject import Subject, Variant

F32 = NDArray[np.float32]
CPU_NOISE = 1e-5
"""Two ways to the same float32 result on the CPU differ by less, relative."""
CUDA_NOISE = 5e-3
CUDA_LOGITS = 1e-2
"""Logits on a GPU, whose activations are float16, against the CPU runtime or a reference."""


class Base:
    """Holds the plugin and the case; their Subject is made once for each test class."""

    plugin: ClassVar[ModuleType | str]
    case: ClassVar[Case]

    @classmethod
    def made(cls) -> Subject:
        """The plugin loaded with this class's case. Raises PolyheadError where it cannot be."""
        known: Subject | None = cls.__dict__.get("_subject")
        if known is None:
            for name, kind in (("plugin", (ModuleType, str)), ("case", Case)):
                if not isinstance(getattr(cls, name, None), kind):
                    raise ConfigError(
                        f"{cls.__name__} has no {name}; write `plugin = your_module` and `case = Case(…)` into it"
                    )
            known = Subject(cls.plugin, cls.case)
            cls._subject = known  # type: ignore[attr-defined]
        return known

    @classmethod
    def subject(cls) -> Subject:
        """The plugin loaded with this class's case; a failure where it cannot be."""
        try:
            return cls.made()
        except PolyheadError as error:
            cls.fail_once(str(error))

    @classmethod
    def built(cls) -> tuple[Variant, ...]:
        """The case's models, unchecked; a failure where the plugin cannot build them."""
        subject = cls.subject()
        try:
            return subject.variants
        except PolyheadError as error:
            cls.fail_once(f"the case's model cannot be built: {error}")

    @classmethod
    def variants(cls) -> Iterator[Variant]:
        """The case's models, each checked as a file is when it is opened."""
        subject, built = cls.subject(), cls.built()
        for variant in built:
            cls.opened(variant, subject.check)
        yield from built

    @classmethod
    def opened(cls, variant: Variant, check: Callable[[Variant], None]) -> None:
        """Does a check of what opens files; a failure where it refuses the variant."""
        try:
            check(variant)
        except PolyheadError as error:
            cls.fail_once(f"the case's model, {variant.label}, cannot be opened: {error}")

    @classmethod
    def fail_once(cls, message: str) -> NoReturn:
        """A failure that nearly every test of the class meets: in full in the first, a line in the others.

        They still fail: a test that could not be made is not one that may be left out.
        """
        told: dict[str, str] = cls.__dict__.get("_told") or {}
        cls._told = told  # type: ignore[attr-defined]
        test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0].rpartition("::")[2]
        first = told.setdefault(message, test)
        fail(message if first == test else f"see the first failure, {first}: this test met the same")

    @classmethod
    def first(cls) -> Variant:
        """The model with all optional tensors."""
        return next(cls.variants())

    @classmethod
    def gpu(cls) -> str:
        """The first GPU that can be used, or a skip that says why there is none."""
        from ..runtime.cuda.probe import MINIMUM_CC, probe

        found = probe()
        if found.problem:
            pytest.skip(f"no GPU: {found.problem}")
        usable = next((info for info in found.devices if info.cc >= MINIMUM_CC), None)
        if usable is None:
            pytest.skip(f"no GPU: none has compute capability {MINIMUM_CC[0]}.{MINIMUM_CC[1]} or newer")
        try:
            import cuda.core  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
        except ImportError:
            pytest.skip("no CUDA packages: pip install 'polyhead[cu13]'")
        subject = cls.subject()
        kinds = subject.registry.module_kinds()
        cls.built()
        for spec in subject.kinds():
            if getattr(kinds.get(spec), "cuda", None) is None:
                pytest.skip(f"{spec.__name__} has no CUDA implementation: its ModuleKind gives no cuda")
        return f"cuda:{usable.index}"


def run(
    subject: Subject, variant: Variant, weights: Mapping[str, F32], ids: Sequence[int], device: str, **options: Any
) -> F32:
    """Logits of a variant with these weights; a failure where it does not run."""
    try:
        return subject.logits(variant.decoder, weights, ids, device, **options)
    except PolyheadError as error:
        fail(f"the model does not run on {device}, {variant.label}: {error}")


def fail(message: str) -> NoReturn:
    """A test's failure in words, without a traceback."""
    raise pytest.fail.Exception(message, pytrace=False) from None  # without the exception that led here


def error_of(found: ArrayLike, expected: ArrayLike) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; infinite where shapes differ or a value is not finite."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def shown(names: list[str], most: int = 12) -> str:
    """Names for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
