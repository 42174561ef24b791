"""Errors in OpenAI's form: a status and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from typing import Any

from ..errors import CapacityError, PolyheadError, RequestError, TemplateError, TokenizerError, summary

_THE_REQUEST_S = (RequestError, TemplateError, TokenizerError, CapacityError)


class BodyError(RequestError):
    """A body asks for something unknown, impossible or not offered. ``param`` names the field, ``code`` the kind."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def is_the_request_s(error: BaseException) -> bool:
    """Whether an error comes of the request and would come again, rather than of the device or the program."""
    return isinstance(error, _THE_REQUEST_S)


def problem(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body that tell of an error: 400 where the request is at fault, else 500."""
    if is_the_request_s(error):
        param = error.param if isinstance(error, BodyError) else None
        code = error.code if isinstance(error, BodyError) else "invalid_value"
        return 400, _body(str(error), "invalid_request_error", param, code)
    text = str(error) if isinstance(error, PolyheadError) else f"internal error: {summary(error)}"
    return 500, _body(text, "server_error", None, "internal_error")


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
