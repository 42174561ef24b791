"""The part of the suite about metadata: every key is known, a missing one is named, a strange one is no crash."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import ConfigError, PolyheadError, summary
from ..weights import claim
from .alterations import alterations
from .base import Base, fail, shown
from .memory import Info
from .subject import Subject, Variant

UNKNOWN = "polyhead_testing_unknown"
STRANGE: tuple[object, ...] = (
    0,
    -1,
    2**31 - 1,
    2**63,
    0.5,
    -1.0,
    math.nan,
    math.inf,
    True,
    "text",
    "",
    [],
    [1],
    ["text"],
)
_SECONDS = 1.0
_PADDED = ("vocab_size",)
"""A vocabulary smaller than the embedding is padding, which changes nothing."""
_DECIDING = (
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
)
"""Keys that no model computes the same without; where they are in the case, ``meta.ignore`` is no excuse."""


class KeyTests(Base):
    """What decoder() does with metadata that is complete, incomplete or absurd."""

    def test_every_metadata_key_of_the_case_is_read(self) -> None:
        """A key that is neither read nor ignored makes polyhead refuse the file."""
        for _ in self.variants():
            pass

    def test_every_metadata_value_matters(self) -> None:
        """Another value gives another Decoder or is refused; one that changes nothing was read and not used."""
        subject = self.subject()
        variants = list(self.variants())
        ignored = {full for full in subject.values if all(full in variant.ignored for variant in variants)}
        idle: list[str] = []
        for full, what, others in alterations(subject):
            key = full.removeprefix(f"{subject.case.architecture}.")
            if key in _PADDED or (full in ignored and key not in _DECIDING):
                continue
            if all(_same(subject, variant, full, other) for variant in variants for other in others):
                idle.append(what)
        if idle:
            fail(
                f"other values of {shown(idle)} give the same Decoder: use what the file says, refuse what you do not "
                "support with meta.require, or name what never matters with meta.ignore (not sizes of the model)"
            )

    def test_an_unknown_metadata_key_is_refused(self) -> None:
        """A key of this architecture that the plugin never heard of must not pass in silence."""
        subject = self.subject()
        key = subject.case.full(UNKNOWN)
        for variant in self.variants():
            try:
                subject.registry.decoder({**subject.values, key: 1}, variant.shapes)
            except ConfigError as error:
                if key not in str(error):
                    fail(f"the error for the unknown key {key} does not name it: {error}")
                continue
            fail(
                f"a file with the unknown key {key} is accepted, though it might change what the model computes; "
                "let meta.ignore name keys one by one, not '*'"
            )

    def test_a_missing_metadata_key_is_named(self) -> None:
        """Without a key that the plugin needs there is an error with the key's name, and no silent default."""
        subject, case = self.subject(), self.case
        silent: list[str] = []
        for variant in self.variants():
            for full in sorted(variant.needed | variant.defaulted):
                if full not in subject.values or not full.startswith(f"{case.architecture}."):
                    continue
                problem = _without(subject, variant, full)
                if problem is not None:
                    fail(problem)
                if problem is None and full in variant.defaulted and not _refused(subject, variant, full):
                    silent += [] if case.may_lack(full) or full in silent else [full]
        if silent:
            keys = ", ".join(f'"{full.removeprefix(case.architecture + ".")}"' for full in silent)
            fail(
                f"a file without {shown(silent)} runs with a default of the plugin's. If the format defines that "
                f"default, say so in the case: optional=({keys},); else read the key without one"
            )

    def test_strange_metadata_is_refused_or_works(self) -> None:
        """Zero, negative, huge, not finite, another type: a PolyheadError or a model, never another exception."""
        subject = self.subject()
        variant = self.first()
        for key in self.case.metadata:
            full = subject.case.full(key)
            for value in STRANGE:
                _try(subject, variant, full, value)


def _same(subject: Subject, variant: Variant, full: str, value: object) -> bool:
    try:
        return subject.ask({**subject.values, full: value}, variant.shapes)[0] == variant.decoder
    except Exception:  # refused; in words or not is another test's question
        return False


def _lacking(subject: Subject, full: str) -> dict[str, Any]:
    return {key: value for key, value in subject.values.items() if key != full}


def _refused(subject: Subject, variant: Variant, full: str) -> bool:
    try:
        subject.ask(_lacking(subject, full), variant.shapes)
    except PolyheadError:
        return True
    return False


def _without(subject: Subject, variant: Variant, full: str) -> str | None:
    """What is wrong with how a missing key is met, or None."""
    try:
        subject.ask(_lacking(subject, full), variant.shapes)
    except PolyheadError as error:
        if full in variant.needed and full not in str(error):
            return f"without {full} the error does not name it: {error}"
    except (Exception, SystemExit) as error:
        return f"without {full} decoder() raises {summary(error)}, expected a MissingKeyError that names the key"
    else:
        if full in variant.needed - variant.defaulted:
            return f"without {full}, which the plugin reads without a default, decoder() returns a model all the same"
    return None


def _try(subject: Subject, variant: Variant, full: str, value: object) -> None:
    values: Mapping[str, Any] = {**subject.values, full: value}
    what = f"with {full} = {value!r}"
    try:
        with _limit(what):
            decoder, _ = subject.ask(values, variant.shapes)
            claim(decoder, {name: Info(shape) for name, shape in variant.shapes.items()})
            if decoder != variant.decoder:
                subject.logits(decoder, variant.weights, subject.prompt(decoder))
    except PolyheadError:
        return
    except _TooLong:
        fail(f"{what} decoder() does not end; bound what it loops over, as meta.layers() does for block_count")
    except (Exception, SystemExit) as error:
        fail(f"{what} the plugin raises {summary(error)}, expected a ConfigError; meta.get takes minimum and maximum")


class _TooLong(BaseException):
    """A strange value sent the plugin into a loop."""


@contextmanager
def _limit(what: str) -> Iterator[None]:
    """Ends what takes too long, where a signal can: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong(what)

    before = signal.signal(signal.SIGALRM, stop)
    left = signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)  # another's, such as a time limit for the whole test
