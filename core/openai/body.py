"""Bodies of ``/v1/chat/completions`` and ``/v1/completions``, read strictly: an unknown field is an error.

A field that is null counts as absent. What a body leaves out comes from the defaults, which are the configuration's.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..engine import SamplingParams
from ..errors import RequestError
from .form import form_of_output
from .problem import BodyError

Endpoint = Literal["chat", "completions"]

MAX_CHOICES = 1_024
_TOKEN_ID_DIGITS = 10

# Fields that say what SamplingParams says, under the same name.
_SAME = frozenset({
    "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "stop",
    "top_k", "min_p", "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos",  # not OpenAI's
})  # fmt: skip
# What changes nothing in the answer: for the books of whoever runs a service.
_WITHOUT_EFFECT = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
_COMMON = _SAME | _WITHOUT_EFFECT | {"model", "max_tokens", "logit_bias", "logprobs", "stream", "stream_options"}
_COMMON |= {"priority", "structured_outputs"}
_FIELDS: dict[Endpoint, frozenset[str]] = {
    "chat": _COMMON
    | {"messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls"}
    | {"response_format"},
    "completions": _COMMON | {"prompt", "echo", "best_of"},
}
# Fields that exist elsewhere. Their names are right, so the message must not send anyone looking for a misspelling.
_NOT_OFFERED = frozenset({
    "audio", "function_call", "functions", "modalities", "prediction", "reasoning_effort", "suffix", "verbosity",
    "web_search_options",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What a body asks for, checked as far as that needs no model.

    ``messages`` and ``tools`` are set for a chat, ``prompts`` (strings or lists of token ids) otherwise. ``model`` is
    what the body says, for the caller to compare or not. ``only_echo``: the answer is the prompt alone, with its
    log-probabilities; a token is made, because a generation has at least one, and left out.
    """

    endpoint: Endpoint
    params: SamplingParams
    messages: Sequence[Mapping[str, Any]] = ()
    tools: Sequence[Mapping[str, Any]] | None = None
    prompts: tuple[str | Sequence[int], ...] = ()
    echo: bool = False
    priority: int = 0
    stream: bool = False
    include_usage: bool = False
    model: str | None = None
    only_echo: bool = False


def read_body(endpoint: Endpoint, body: Any, defaults: SamplingParams) -> Asked:
    """What the body of a request asks for. Raises BodyError, or RequestError for a sampling value out of range."""
    if not isinstance(body, Mapping):
        raise BodyError(f"the body must be a JSON object, got {_kind(body)}")
    _check_names(endpoint, body)
    given = {name: value for name, value in body.items() if value is not None}
    stream = _flag(given, "stream")
    return Asked(
        endpoint=endpoint,
        params=_params(endpoint, given, defaults),
        messages=_messages(given) if endpoint == "chat" else (),
        tools=_tools(given),
        prompts=_prompts(given) if endpoint == "completions" else (),
        echo=_flag(given, "echo"),
        priority=_priority(given),
        stream=stream,
        include_usage=_include_usage(given, stream),
        model=_text(given, "model"),
        only_echo=_only_echo(given),
    )


def _check_names(endpoint: Endpoint, body: Mapping[str, Any]) -> None:
    known = _FIELDS[endpoint]
    for name, value in body.items():
        if name in known or (name in _NOT_OFFERED and value is None):
            continue
        if name in _NOT_OFFERED:
            raise BodyError(f"{name} is not supported; leave it out", name, "unsupported_parameter")
        near = difflib.get_close_matches(name[:80], known, 1)
        other = next((where for where, names in _FIELDS.items() if where != endpoint and name in names), None)
        path = "/v1/chat/completions" if other == "chat" else "/v1/completions"
        hint = f"; it belongs to {path}" if other else f"; did you mean {near[0]!r}?" if near else ""
        raise BodyError(f"unknown field {name[:80]!r}{hint}", name[:80], "unknown_parameter")


def _params(endpoint: Endpoint, given: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    values: dict[str, Any] = {name: given[name] for name in _SAME & given.keys()}
    limits = {name: given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(set(map(repr, limits.values()))) > 1:
        raise BodyError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    for limit in limits.values():
        values["max_tokens"] = limit
    if _only_echo(given):
        values |= {"max_tokens": 1, "min_tokens": 0}
    if "logit_bias" in given:
        values["logit_bias"] = _logit_bias(given["logit_bias"])
    values |= _chat_logprobs(given) if endpoint == "chat" else _logprobs(given)
    if "response_format" in given or "structured_outputs" in given:
        values["structured_outputs"] = form_of_output(given)  # a text, asked for by name, is free of the defaults' form
    try:
        params = replace(defaults, **values)
    except RequestError as error:
        # The message begins with the field's name.
        name = str(error).partition(" ")[0].partition("[")[0]
        if name == "structured_outputs" and name not in given:
            name = "response_format"
        raise BodyError(str(error), name if name in given else None) from None
    best_of = given.get("best_of")
    if best_of is not None and best_of != params.n:
        raise BodyError(f"best_of must be n ({params.n}) or absent: samples are not ranked", "best_of")
    return params


def _only_echo(given: Mapping[str, Any]) -> bool:
    limit = given.get("max_tokens")
    return isinstance(limit, int) and not isinstance(limit, bool) and limit == 0 and given.get("echo") is True


def _logit_bias(value: Any) -> dict[int, Any]:
    if not isinstance(value, Mapping):
        raise BodyError(f"logit_bias must be an object of token id to number, got {_kind(value)}", "logit_bias")
    for key in value:
        if not (key.isascii() and key.isdigit() and len(key) <= _TOKEN_ID_DIGITS):
            raise BodyError(f"logit_bias has the key {key[:40]!r}, which is no token id", "logit_bias")
    return {int(key): bias for key, bias in value.items()}


def _chat_logprobs(given: Mapping[str, Any]) -> dict[str, int | None]:
    top = given.get("top_logprobs")
    if "logprobs" not in given:
        if top is not None:
            raise BodyError("top_logprobs needs logprobs: true", "top_logprobs")
        return {}
    if not _flag(given, "logprobs"):
        if top:
            raise BodyError("top_logprobs needs logprobs: true", "top_logprobs")
        return {"logprobs": None}
    if top is not None and (isinstance(top, bool) or not isinstance(top, int)):
        raise BodyError(f"top_logprobs must be an integer, got {_kind(top)}", "top_logprobs")
    return {"logprobs": top or 0}


def _logprobs(given: Mapping[str, Any]) -> dict[str, Any]:
    if "logprobs" not in given:
        return {}
    return {"logprobs": given["logprobs"], "prompt_logprobs": given["logprobs"] if given.get("echo") else None}


def _messages(given: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BodyError("messages must be a list of at least one message", "messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BodyError(f"messages[{index}] must be an object, got {_kind(message)}", "messages")
    return messages


def _tools(given: Mapping[str, Any]) -> Sequence[Mapping[str, Any]] | None:
    """The tools that the template is to show. Calls of them are left in the text of the answer."""
    tools, choice = given.get("tools"), given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise BodyError("tool_choice must be 'auto' or 'none'; a call cannot be forced", "tool_choice")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise BodyError("tools must be a list of objects", "tools")
    return tools if choice == "auto" else None


def _prompts(given: Mapping[str, Any]) -> tuple[str | Sequence[int], ...]:
    prompt = given.get("prompt")
    if isinstance(prompt, str):
        return (prompt,)
    if not isinstance(prompt, list) or not prompt:
        raise BodyError("prompt must be a string, token ids, or a list of at least one of these", "prompt")
    if all(map(_is_id, prompt)):
        return (prompt,)
    for index, item in enumerate(prompt):
        if not isinstance(item, str) and not (isinstance(item, list) and all(map(_is_id, item))):
            raise BodyError(f"prompt[{index}] must be a string or a list of token ids", "prompt")
    samples = given.get("n", 1)
    if len(prompt) * (samples if isinstance(samples, int) else 1) > MAX_CHOICES:
        raise BodyError(f"{len(prompt):,} prompts with n = {samples} are over {MAX_CHOICES:,} answers", "prompt")
    return tuple(prompt)


def _priority(given: Mapping[str, Any]) -> int:
    value = given.get("priority", 0)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**31:
        raise BodyError("priority must be a 32-bit integer, lower ones run earlier", "priority")
    return value


def _include_usage(given: Mapping[str, Any], stream: bool) -> bool:
    options = given.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise BodyError("stream_options needs stream: true", "stream_options")
    if not isinstance(options, Mapping) or options.keys() - {"include_usage"}:
        raise BodyError("stream_options must be an object with nothing but include_usage", "stream_options")
    return _flag(options, "include_usage")


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise BodyError(f"{name} must be true or false, got {_kind(value)}", name)
    return value


def _text(given: Mapping[str, Any], name: str) -> str | None:
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise BodyError(f"{name} must be a string, got {_kind(value)}", name)
    return value


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
