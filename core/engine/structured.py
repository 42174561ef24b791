"""StructuredOutputs: the form that a generation's text must have, and what a guide of it must offer.

Pure policy: checks what a user wrote as far as that needs no grammar library, and makes it something that can be
compared, hashed and kept. Whether a grammar makes sense is found where it is compiled (polyhead.structured).
"""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, cast

from ..errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_TEXT = 256 * 1024  # bytes of UTF-8
MAX_DEPTH = 64
MAX_CHOICES = 1_024
MAX_CHOICE_CHARS = 4_096
KINDS = ("json", "regex", "choice", "grammar")
ANY_OBJECT = '{"type":"object"}'

Kind = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """What the text of a generation must be; exactly one of these. A wrong value raises ``RequestError``.

    json: a JSON schema, as a mapping or as JSON text; True is any JSON object. Kept as JSON text, in the order given,
        which is the order of the properties in the answer. Schemas that differ in order are different.
    regex: a regular expression that the whole text matches, as Rust's regex crate reads it: no look-around, no
        references to groups, and classes such as ``\\w`` are Unicode's.
    choice: 1 to 1,024 different strings of 1 to 4,096 characters, one of which is the text.
    grammar: a context-free grammar in Lark's syntax, as llguidance reads it; it begins at ``start``.

    All of it together has at most 256 KiB of UTF-8, a schema at most 64 levels. Immutable and hashable.
    """

    json: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            what = f"got {' and '.join(given)}" if given else "got none"
            raise RequestError(f"structured_outputs must have exactly one of {', '.join(KINDS)}, {what}")
        if self.json is not None:
            self._set("json", _schema(self.json))
        elif self.choice is not None:
            self._set("choice", _choices(self.choice))
        else:
            _text(f"structured_outputs.{given[0]}", getattr(self, given[0]))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @classmethod
    def of(cls, value: Any) -> StructuredOutputs:
        """From a mapping with one of the four keys, as a configuration or a request's body has it; a
        StructuredOutputs is returned as it is. A key whose value is None counts as absent.
        """
        if isinstance(value, StructuredOutputs):
            return value
        if not isinstance(value, Mapping):
            _refuse("structured_outputs", value, f"a mapping with one of the keys {', '.join(KINDS)}")
        for key in value:
            if key not in KINDS:
                raise RequestError(f"structured_outputs has the key {_shown(key)}; known are {', '.join(KINDS)}")
        return cls(**value)

    @property
    def kind(self) -> Kind:
        """Which of the four it is."""
        return cast(Kind, next(kind for kind in KINDS if getattr(self, kind) is not None))

    @property
    def content(self) -> str | tuple[str, ...]:
        """What it was normalised to: of a schema the JSON text, of choices a tuple, else the text given."""
        return cast("str | tuple[str, ...]", getattr(self, self.kind))

    def mapping(self) -> dict[str, Any]:
        """Plain data of which ``of`` makes an equal one: for JSON, YAML and other processes."""
        content = self.content
        return {self.kind: content if isinstance(content, str) else list(content)}


class Guide(Protocol):
    """Where one generation is in its grammar. Not thread-safe; a copy for another generation is a ``fork``."""

    @property
    def ended(self) -> bool:
        """Nothing but an end may follow: the text is complete and cannot go on. Raises RequestError as ``allowed``."""
        ...

    def allowed(self) -> NDArray[np.int32]:
        """Which tokens may come next: bit t % 32 of word t // 32, counted from the least significant, is token t's.

        Shape [ceil(vocab / 32)]; bits past the vocabulary are zero. The array is not written to again. Raises
        RequestError if the grammar takes too much work at this place.
        """
        ...

    def accept(self, token: int) -> None:
        """Goes on past a token, an end token included. Raises RequestError for one that is not allowed, or if the
        grammar takes too much work at this place; the guide is of no use after that.
        """
        ...

    def fork(self) -> Guide:
        """An independent copy in the present state, for another sample of the same prompt."""
        ...


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number that Python does not print, or nesting that it does not follow
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise RequestError(f"{name} must be {allowed}, got {_shown(value)}")


def _text(name: str, value: Any) -> int:
    """Checks a text; returns its bytes in UTF-8."""
    if not isinstance(value, str):
        _refuse(name, value, "a string")
    if not value:
        raise RequestError(f"{name} must not be empty")
    if len(value) > MAX_TEXT:
        raise _too_long(name, len(value), "characters")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} has a lone surrogate (U+{ord(value[error.start]):04X}) at character {error.start}, which no "
            "generated text contains"
        ) from None
    if size > MAX_TEXT:
        raise _too_long(name, size, "bytes")
    return size


def _too_long(name: str, size: int, unit: str) -> RequestError:
    return RequestError(f"{name} has {size:,} {unit}; {MAX_TEXT:,} bytes are allowed")


def _choices(value: Any) -> tuple[str, ...]:
    name = "structured_outputs.choice"
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        _refuse(name, value, f"a sequence of 1 to {MAX_CHOICES:,} strings")
    found: dict[str, int] = {}
    size = 0
    for index, choice in enumerate(value):
        if index == MAX_CHOICES:
            raise RequestError(f"{name} may hold at most {MAX_CHOICES:,} strings, got more")
        size += _text(f"{name}[{index}]", choice)
        if len(choice) > MAX_CHOICE_CHARS:
            raise RequestError(f"{name}[{index}] has {len(choice):,} characters; {MAX_CHOICE_CHARS:,} are allowed")
        if size > MAX_TEXT:
            raise _too_long(name, size, "bytes up to item " + str(index))
        if choice in found:
            raise RequestError(f"{name}[{index}] is {_shown(choice)}, which {name}[{found[choice]}] is already")
        found[choice] = index
    if not found:
        raise RequestError(f"{name} must hold 1 to {MAX_CHOICES:,} strings, got none")
    return tuple(found)


def _schema(value: Any) -> str:
    """A schema as JSON text without blanks, its keys in the order given."""
    name = "structured_outputs.json"
    if value is True:
        return ANY_OBJECT
    if isinstance(value, str):
        _text(name, value)
        value = _parsed(name, value)
    if not isinstance(value, Mapping):
        _refuse(name, value, "a JSON schema (a mapping, or its JSON text), or True")
    plain = _plain(name, value)
    try:
        text = jsonlib.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:  # Python refuses to print an integer of more than 4,300 digits
        raise RequestError(f"{name} has an integer of thousands of digits") from None
    _text(name, text)
    return text


def _parsed(name: str, text: str) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise RequestError(f"{name} has the key {_shown(twice)} twice in one object")
        return found

    try:
        return jsonlib.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise RequestError(f"{name} is nested deeper than the {MAX_DEPTH} levels that are allowed") from None
    except ValueError as error:
        raise RequestError(f"{name} is not JSON: {str(error)[:200]}") from None


def _plain(name: str, value: Any, depth: int = 1, budget: list[int] | None = None) -> Any:
    """JSON's types only, copied. The budget bounds the work for lists that hold each other many times."""
    budget = [MAX_TEXT] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0:
        raise RequestError(f"{name} has more than {MAX_TEXT:,} values")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        budget[0] -= len(value)
        return str.__str__(value)  # of an enum of strings its text, not its name
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RequestError(f"{name} has the number {value}, which JSON does not know")
        return float(value)
    if not isinstance(value, (Mapping, list, tuple)):
        raise RequestError(f"{name} holds {_shown(value)}, a {type(value).__name__}, which JSON does not know")
    if depth > MAX_DEPTH:
        raise RequestError(f"{name} is nested deeper than the {MAX_DEPTH} levels that are allowed")
    if not isinstance(value, Mapping):
        return [_plain(name, item, depth + 1, budget) for item in value]
    copy: dict[str, Any] = {}
    for key, item in value.items():
        if not isinstance(key, str):
            raise RequestError(f"{name} has the key {_shown(key)}, which is not a string")
        budget[0] -= len(key)
        copy[str.__str__(key)] = _plain(name, item, depth + 1, budget)
    return copy
