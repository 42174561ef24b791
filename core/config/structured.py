"""What ``sampling.structured_outputs`` may be: what the engine takes, in the configuration's words for mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from ..engine.structured import KINDS, StructuredOutputs
from ..errors import RequestError


@dataclass(frozen=True, slots=True)
class TextKeys:
    """Marks a mapping in which the values of these keys are text as it stands, not YAML, on a command line."""

    names: tuple[str, ...]


def _structured(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, StructuredOutputs):
        return value.mapping()
    if not isinstance(value, Mapping):
        raise ValueError(f"is not a mapping with one of the keys {', '.join(KINDS)}")
    try:
        StructuredOutputs.of(value)
    except RequestError as error:
        message = str(error).removeprefix("structured_outputs").lstrip(". ")
        quote = " must be a string, got " in message
        raise ValueError(message + (" (quote what looks like a number or a yes/no)" if quote else "")) from None
    return value


_TEXT = {"type": "string", "minLength": 1}
_STRUCTURED = {
    "type": "object",
    "properties": {
        "json": {"anyOf": [{"type": "object"}, _TEXT, {"const": True}]},
        "regex": _TEXT,
        "choice": {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True},
        "grammar": _TEXT,
    },
    "additionalProperties": False,
    "minProperties": 1,
    "maxProperties": 1,
}
Structured = Annotated[
    dict[str, Any] | None,
    BeforeValidator(_structured),
    WithJsonSchema({"anyOf": [_STRUCTURED, {"type": "null"}]}),
    TextKeys(("regex", "grammar")),
]
