"""The form of the answer that a body asks for: OpenAI's ``response_format``, or ``structured_outputs`` as vLLM has it.

Both become StructuredOutputs; whether a grammar can be followed is found when the request begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engine import StructuredOutputs
from ..errors import RequestError
from .problem import BodyError

_FORMAT, _OWN = "response_format", "structured_outputs"
_KEYS = {
    "text": frozenset({"type"}),
    "json_object": frozenset({"type"}),
    "json_schema": frozenset({"type", "json_schema"}),
}
_SCHEMA_KEYS = frozenset({"name", "schema", "strict", "description"})
_NAME_CHARS = 64


def form_of_output(given: Mapping[str, Any]) -> StructuredOutputs | None:
    """The form, or None where the answer is free. Raises BodyError whose ``param`` is the field."""
    form = _response_format(given.get(_FORMAT))
    own = given.get(_OWN)
    if own is None:
        return form
    if form is not None:
        raise BodyError(f"{_OWN} and {_FORMAT} both say what the answer must be; give one of them", _OWN)
    try:
        return StructuredOutputs.of(own)
    except RequestError as error:
        raise BodyError(str(error), _OWN) from None


def _response_format(form: Any) -> StructuredOutputs | None:
    if form is None:
        return None
    if not isinstance(form, Mapping):
        raise BodyError(f"{_FORMAT} must be an object with a type", _FORMAT)
    kind = form.get("type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise BodyError(
            f"{_FORMAT} of type {str(kind)[:40]!r} is not supported; {', '.join(map(repr, _KEYS))} are",
            _FORMAT, "unsupported_parameter",
        )  # fmt: skip
    _check_keys(form, _KEYS[kind], _FORMAT)
    if kind == "text":
        return None
    schema = _schema(form.get("json_schema")) if kind == "json_schema" else True
    try:
        return StructuredOutputs(json=schema)
    except RequestError as error:
        message = str(error).replace("structured_outputs.json", f"{_FORMAT}.json_schema.schema", 1)
        raise BodyError(message, _FORMAT) from None


def _schema(value: Any) -> Mapping[str, Any]:
    where = f"{_FORMAT}.json_schema"
    if not isinstance(value, Mapping):
        raise BodyError(f"{where} must be an object with a name and a schema", _FORMAT)
    _check_keys(value, _SCHEMA_KEYS, where)
    name, description = value.get("name"), value.get("description")
    if not isinstance(name, str) or not 1 <= len(name) <= _NAME_CHARS:
        raise BodyError(f"{where}.name must be a string of 1 to {_NAME_CHARS} characters", _FORMAT)
    if description is not None and not isinstance(description, str):
        raise BodyError(f"{where}.description must be a string", _FORMAT)
    if not isinstance(value.get("strict"), bool | None):
        raise BodyError(f"{where}.strict must be true or false; a schema is followed in either case", _FORMAT)
    schema = value.get("schema")
    if not isinstance(schema, Mapping):
        raise BodyError(f"{where}.schema must be a JSON schema, which is an object", _FORMAT)
    return schema


def _check_keys(value: Mapping[str, Any], known: frozenset[str], where: str) -> None:
    for key in value:
        if key not in known:
            raise BodyError(f"{where} has the unknown key {key[:80]!r}", _FORMAT, "unknown_parameter")
