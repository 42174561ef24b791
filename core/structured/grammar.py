"""StructuredOutputs as a grammar in llguidance's Lark, and llguidance's complaints as sentences.

In every grammar the model itself chooses the tokens in which a text is written (``no_forcing``): nothing is tokenised
here, so that no vocabulary can lead to a token that its grammar then refuses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import llguidance

from ..engine import StructuredOutputs
from ..errors import RequestError
from . import lark

MAX_OPTIONAL = 480
_OPTIONS = '\n%llguidance {"no_forcing": true}\n'
# Blanks between the parts of a JSON text: without a bound a small model may write them for ever. A schema's own
# x-guidance comes before this.
_BLANKS = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
_SHOWN = 300


def grammar_of(spec: StructuredOutputs) -> str:
    """The grammar. Raises RequestError for what llguidance would take in silence and get wrong, or never finish."""
    content = spec.content
    if not isinstance(content, str):
        return f"start: /{'|'.join(map(_literally, content))}/{_OPTIONS}"
    if spec.kind == "regex":
        if (len(content) - len(content.rstrip("\\"))) % 2:
            raise RequestError("structured_outputs.regex ends with a backslash that escapes nothing")
        return f"start: /{llguidance.regex_to_lark(content)}/{_OPTIONS}"
    if spec.kind == "json":
        return f"start: %json {_schema(content)}{_OPTIONS}"
    lark.check(content)
    return content + _OPTIONS  # at the end, where it moves no line number


def complaint(spec: StructuredOutputs, message: str) -> RequestError:
    """What llguidance says of a grammar that cannot be used: its own sentence, without traces and states."""
    if "NoExtensionBias" in message:
        what = "allows no text that can be written with the model's vocabulary"
    else:
        what = f"cannot be used: {reason(message, spec.kind == 'grammar')}"
    return RequestError(f"structured_outputs.{spec.kind} {what}")


def reason(message: str, place: bool = False) -> str:
    """The sentence in a message of llguidance; ``place``: with the line and column, where it begins with them."""
    lines = message.split("\n")
    first = lines[0]
    explained = next((line for line in lines if line.startswith("error: ")), None)  # of a regular expression
    where, _, rest = first.partition(": ")
    if where.endswith(")") and where.removeprefix("at ")[:1].isdigit():
        first = rest
        where = f"line {where.removeprefix('at ').replace('(', ', column ').rstrip(')')}: " if place else ""
    else:
        where = ""
    first = first.rpartition(" (in regex): ")[2]
    for prefix in ("failed to compile JSON schema: ", "lexer error: ", "parser error: ", "Parser Error: ", "panic: "):
        first = first.removeprefix(prefix)
    first = first.partition(". Enable 'coerce_one_of'")[0]  # which is refused as well
    text = where + (explained.removeprefix("error: ") if explained else first)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _literally(text: str) -> str:
    """A regular expression for exactly this text."""
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _schema(text: str) -> str:
    schema: dict[str, Any] = json.loads(text)
    for count in map(_optional, _objects(schema)):
        if count > MAX_OPTIONAL:
            raise RequestError(
                f"structured_outputs.json has an object with {count:,} optional properties; {MAX_OPTIONAL} are allowed"
            )
    options = schema.get("x-guidance", {})
    if isinstance(options, dict):
        own = {"whitespace_pattern", "whitespace_flexible"} & options.keys()
        schema["x-guidance"] = options if own else _BLANKS | options
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(item)


def _optional(schema: dict[str, Any]) -> int:
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict):
        return 0
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
    return len(properties.keys() - names)
