"""Chat templates: a conversation becomes the text that a model was trained to continue.

A template is source code that came with a model file; it runs in a sandbox with limits on size, time and memory
(sandbox.py). Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.exceptions import TemplateSyntaxError

from ..errors import RequestError, TemplateError
from .meter import Meter, metering
from .sandbox import TemplateSandbox

MAX_SOURCE = 64 << 10
MAX_OUTPUT = 4 << 20
_MAX_VALUES = 1_000_000
_MAX_NESTING = 64
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"})


class ChatTemplate:
    """A compiled chat template; may be rendered from several threads.

    ``source`` is the template in Jinja's language, as model files carry it; None raises, because no other template
    would suit the model. ``tokens`` are further variables of the kind ``unk_token="<unk>"``. Raises TemplateError,
    with the line, where the source is too long, is not valid, or uses what is not offered.
    """

    def __init__(self, source: str | None, bos_token: str = "", eos_token: str = "", **tokens: str) -> None:
        if source is None:
            raise TemplateError(
                "the model file has no chat template (tokenizer.chat_template), and polyhead does not guess one; "
                "give a template, or use the model for plain text"
            )
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"the chat template has {len(source)} characters, more than {MAX_SOURCE}")
        self.source = source
        self._tokens = {**tokens, "bos_token": bos_token or "", "eos_token": eos_token or ""}
        sandbox = TemplateSandbox()
        try:
            with metering(Meter()):
                self._template: Template = sandbox.from_string(source)
            self.takes_parts = _reads_parts(sandbox.parse(source))
        except TemplateSyntaxError as error:
            raise TemplateError(f"chat template, line {error.lineno}: {_short(error)}") from error
        except (JinjaError, RecursionError, SyntaxError, MemoryError, ValueError, OverflowError, TypeError) as error:
            raise TemplateError(f"the chat template cannot be compiled: {_short(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **extra: Any,
    ) -> str:
        """The conversation as text, to be encoded with ``special=True``.

        A message is a dict with a ``role`` and a ``content``: text, None, or a list of parts as in OpenAI's protocol.
        Text parts are joined with line ends where the template knows only text. ``extra`` are variables that the
        template may know (``enable_thinking=False``). Raises RequestError for messages of another form, TemplateError
        where the template fails, refuses (``raise_exception``) or exceeds its limits.
        """
        checked = [self._message(message, index) for index, message in enumerate(_listed(messages, "messages"))]
        if not checked:
            raise RequestError("messages is empty: a chat needs at least one message")
        given_tools = None if tools is None else _listed(tools, "tools")
        for index, tool in enumerate(given_tools or ()):
            if not isinstance(tool, Mapping):
                raise RequestError(f"tools[{index}] is {type(tool).__name__}, expected a dict")
        clash = _RESERVED & extra.keys()
        if clash:
            raise RequestError(f"{', '.join(sorted(clash))} cannot be given as an extra template variable")
        count, size = [0], [0]
        variables: dict[str, Any] = {"documents": None, **self._tokens}
        variables |= {name: _copied(value, name, 0, count, size) for name, value in extra.items()}
        variables["messages"] = _copied(checked, "messages", 0, count, size)
        variables["tools"] = _copied(given_tools, "tools", 0, count, size)
        variables["add_generation_prompt"] = bool(add_generation_prompt)
        return self._run(variables, Meter(size[0], count[0]), MAX_OUTPUT + 4 * size[0])

    def _run(self, variables: dict[str, Any], limits: Meter, max_output: int) -> str:
        chunks: list[str] = []
        length = 0
        try:
            with metering(limits):
                for chunk in self._template.generate(variables):
                    length += len(chunk)
                    if length > max_output:
                        raise TemplateError(f"the chat template's output exceeds {max_output} characters")
                    chunks.append(chunk)
        except TemplateError:
            raise
        except RecursionError as error:
            raise TemplateError(f"chat template{_line(error)}: nested too deeply") from error
        except Exception as error:
            raise TemplateError(f"chat template{_line(error)}: {_short(error)}") from error
        return "".join(chunks)

    def _message(self, message: Any, index: int) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise RequestError(f"messages[{index}] is {type(message).__name__}, expected a dict with role and content")
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(f"messages[{index}].role is {role!r}, expected a string such as 'user'")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list | tuple):
            raise RequestError(f"messages[{index}].content is {type(content).__name__}, expected text or a list")
        for place, part in enumerate(content if isinstance(content, list | tuple) else ()):
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise RequestError(f"messages[{index}].content[{place}] must be a dict with a 'type'")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise RequestError(f"messages[{index}].content[{place}].text must be a string")
        result = dict(message)
        if isinstance(content, list | tuple) and not self.takes_parts:
            others = sorted({part["type"] for part in content} - {"text"})
            if others:
                raise RequestError(
                    f"messages[{index}].content has parts of type {', '.join(others)}, but this model's chat template "
                    "knows only text"
                )
            result["content"] = "\n".join(part["text"] for part in content)
        return result


def _listed(value: Any, name: str) -> Sequence[Any]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise RequestError(f"{name} must be a list, not {type(value).__name__}")
    return value


def _copied(value: Any, name: str, depth: int, count: list[int], size: list[int]) -> Any:
    """A copy made of plain dicts, lists, strings and numbers, so that a template meets no other objects."""
    count[0] += 1
    if count[0] > _MAX_VALUES or depth > _MAX_NESTING:
        raise RequestError(f"{name} is nested deeper than {_MAX_NESTING} or has more than {_MAX_VALUES} values")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        size[0] += len(value)
        return str(value)
    if isinstance(value, int | float):
        if isinstance(value, int) and value.bit_length() > 256:
            raise RequestError(f"{name} holds a number of {value.bit_length()} bits, more than 256")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestError(f"{name} has the key {key!r}, expected a string")
            size[0] += len(key)
        return {str(key): _copied(item, name, depth + 1, count, size) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(item, name, depth + 1, count, size) for item in value]
    raise RequestError(f"{name} holds a {type(value).__name__}; templates take text, numbers, lists and dicts")


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's content, and so knows content that is a list of parts."""

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name == "content"

    def iterated(loop: nodes.For) -> nodes.Node:
        node: nodes.Node = loop.iter
        while isinstance(node, nodes.Filter) and node.node is not None:
            node = node.node
        return node

    return any(is_content(iterated(loop)) for loop in tree.find_all(nodes.For))


def _line(error: BaseException) -> str:
    """', line N' of the template where the error arose, or ''."""
    line, traceback = 0, error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f", line {line}" if line else ""


def _short(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"
