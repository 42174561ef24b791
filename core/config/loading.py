"""From a file, a mapping or a model's address to a checked configuration that knows where each value came from.

Order, strongest first: command line, environment, file (or mapping), defaults. Mappings are merged key by key; lists
are replaced whole, and so is ``sampling.structured_outputs``, for half of one form makes no sense in another. A
checksum belongs to the path it was written with: a stronger layer that names another ``model.path`` drops a weaker
layer's ``model.sha256``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, SourceError
from ..sources.local import expand
from ..sources.reference import LocalModel, parse_reference
from .describe import allowed, did_you_mean, field_at, fields, shown, unknown_key
from .layers import Problems, from_environment, from_file, from_mapping, from_overrides
from .schema import RunConfig
from .tree import Node, mapping, merge

_MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A checked configuration. ``origins`` says for every dotted key where its value is from.

    An origin is ``command line``, ``environment POLYHEAD_RUNTIME__CONTEXT``, ``configs/x.yaml:7:3`` (line and column
    of the key, from 1), ``configuration`` (a Python mapping), ``model`` (the source itself is the model) or
    ``default``. Where parts of a value are from a stronger layer, that follows after a comma.
    """

    config: RunConfig
    origins: Mapping[str, str]


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    """Reads, merges and checks a configuration.

    ``source`` is a YAML file, a mapping of the same shape, or a model (a .gguf file, ``hf://…``, ``pypi://…``).
    ``overrides`` are ``key=value`` texts of the command line; ``environ`` is ``os.environ`` unless given. A relative
    ``model.path`` in a YAML file counts from that file's folder, everywhere else from the current one.

    Raises ConfigError with all that is wrong, one line each: where, the key, the value, what is allowed.
    """
    _check_types(source, overrides)
    problems: Problems = []
    if isinstance(source, Mapping):
        root = _with_model_mapping(from_mapping(source))
    elif _is_model(os.fspath(source)):
        path = os.fspath(source)
        root = mapping({"model": mapping({"path": Node(path, "model", "model")}, "model")}, "model")
    else:
        name = os.fspath(source)
        file = Path(expand(name))
        root, problems = from_file(file, name)
        root = _anchored(_with_model_mapping(root), file.parent)
    if not isinstance(root.value, dict):
        raise ConfigError(
            f"{root.origin}: {shown(root.plain())} stands where settings should; expected 'key: value' lines"
        )
    above, wrong = from_environment(os.environ if environ is None else environ)
    problems += wrong
    on_top, wrong = from_overrides(overrides)
    problems += wrong
    for layer in (*above, *on_top):
        root = _laid_over(root, _with_model_mapping(layer))
    return LoadedConfig(*_checked(root, problems))


def show(loaded: LoadedConfig) -> list[tuple[str, Any, str]]:
    """Every setting as (dotted key, value, origin), in the schema's order."""
    rows: list[tuple[str, Any, str]] = []
    for key, _ in fields():
        value: Any = loaded.config
        for part in key.split("."):
            value = getattr(value, part)
        rows.append((key, value, loaded.origins[key]))
    return rows


def _check_types(source: Any, overrides: Any) -> None:
    name = os.fspath(source) if isinstance(source, os.PathLike) else source
    if not isinstance(name, str | Mapping):
        raise ConfigError(f"a configuration is a path, a model's address or a mapping, not {type(name).__name__}")
    listed = isinstance(overrides, Sequence) and not isinstance(overrides, str | bytes)
    if not listed or not all(isinstance(item, str) for item in overrides):
        raise ConfigError(f"overrides is {shown(overrides)}, expected a list of texts such as ['runtime.context=2048']")


def _is_model(source: str) -> bool:
    if "://" in source or source.lower().endswith(".gguf"):
        return True
    if source.lower().endswith((".yaml", ".yml")):
        return False
    path = Path(expand(source))
    try:
        if not path.is_file():  # What is read from a pipe to look at it would be lost to whoever reads it next.
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


def _with_model_mapping(root: Node) -> Node:
    """``model: PATH`` as ``model: {path: PATH}``, so that layers can be merged."""
    model = root.child("model")
    if model is None or not isinstance(model.value, str):
        return root
    inner = replace(mapping({"path": replace(model)}, model.origin), key_origin=model.key_origin)
    return replace(root, value={**root.value, "model": inner})


def _anchored(root: Node, folder: Path) -> Node:
    """A local relative model path made absolute, counted from the file's folder."""
    model = root.child("model")
    path = model.child("path") if model else None
    if model is None or path is None or not isinstance(path.value, str):
        return root
    try:
        reference = parse_reference(path.value)
    except SourceError:
        return root  # Reported with the other mistakes, when the schema sees it.
    if not isinstance(reference, LocalModel) or os.path.isabs(os.path.expanduser(path.value)):
        return root
    absolute = replace(path, value=os.path.abspath(folder / path.value))
    return replace(root, value={**root.value, "model": replace(model, value={**model.value, "path": absolute})})


def _laid_over(root: Node, layer: Node) -> Node:
    model, above = root.child("model"), layer.child("model")
    path = above.child("path") if above else None
    if model is not None and path is not None and isinstance(model.value, dict):
        old = model.child("path")
        if old is None or old.value != path.value:
            kept = {key: node for key, node in model.value.items() if key != "sha256"}
            root = replace(root, value={**root.value, "model": replace(model, value=kept)})
    sampling, above = root.child("sampling"), layer.child("sampling")
    if sampling is not None and isinstance(sampling.value, dict) and above and above.child("structured_outputs"):
        kept = {key: node for key, node in sampling.value.items() if key != "structured_outputs"}
        root = replace(root, value={**root.value, "sampling": replace(sampling, value=kept)})
    return merge(root, layer)


def _checked(root: Node, problems: Problems) -> tuple[RunConfig, dict[str, str]]:
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(root.plain())
    except ValidationError as error:
        # A value whose text was already refused would only be refused again for what it was read as.
        seen = {origin for origin, _ in problems if ":" in origin}
        described = [_described(root, dict(item)) for item in error.errors(include_url=False)]
        problems = problems + [item for item in dict.fromkeys(described) if item[0] not in seen]
    if problems or config is None:
        lines = [f"{origin}: {message}" for origin, message in sorted(problems, key=_place)]
        if len(lines) > _MAX_SHOWN:
            lines[_MAX_SHOWN:] = [f"… and {len(lines) - _MAX_SHOWN} more"]
        raise ConfigError("\n".join(lines))
    return config, {key: _origin(root, key) for key, _ in fields()}


def _place(problem: tuple[str, str]) -> tuple[int, int]:
    """Sorts what is in the file by line and column; the other layers follow in the order they were found."""
    match = re.fullmatch(r".*:([0-9]+):([0-9]+)", problem[0], re.DOTALL)
    return (int(match[1]), int(match[2])) if match else (1 << 62, 0)


def _described(root: Node, error: dict[str, Any]) -> tuple[str, str]:
    """One of pydantic's errors as (place, message)."""
    node, path = root, []
    for part in error["loc"]:
        child = node.child(part)
        if child is None:
            break
        node = child
        path.append(part)
    kind = error["type"]
    if kind == "missing":
        missing = [*path, error["loc"][len(path)]]
        info = field_at(missing)
        return node.origin, f"{_dotted(missing)}: missing. {info.description if info else ''}".rstrip()
    if kind == "extra_forbidden":
        return node.key_origin, f"{_dotted(path)}: {unknown_key([str(part) for part in path])}"
    value = shown(node.plain())
    where = f"{_dotted(path)}: " if path else ""
    if kind == "value_error":
        # Our own validators; a whole section is not repeated.
        subject = "the configuration" if not path else "" if isinstance(node.value, dict) else f"{value} "
        return node.origin, f"{where}{subject}{' ' if not path else ''}{error['ctx']['error']}"
    info = field_at(path)
    inside = len(path) > 1 and field_at(path[:-1]) is info
    expected = allowed(info, inside) if info else str(error["msg"])
    hint = ""
    if kind == "string_unicode":
        expected = "text in UTF-8"
    if kind == "literal_error" and isinstance(node.value, str):
        hint = did_you_mean(node.value, expected.removeprefix("one of ").split(", "))
    elif isinstance(node.value, str) and kind in ("int_type", "float_type", "bool_type"):
        hint = " (without quotes)" if _looks_like_number(node.value) else ""
    elif kind == "string_type" and node.value is not None:
        hint = " (quote it to make it text)"
    return node.origin, f"{where}{value} is not allowed; expected {expected}{hint}"


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("true", "false")
    return True


def _dotted(path: Sequence[object]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _origin(root: Node, key: str) -> str:
    node: Node | None = root
    for part in key.split("."):
        node = node.child(part) if node else None
    if node is None:
        return "default"
    stronger = {origin: None for origin in _origins(node) if not re.search(r":[0-9]+:[0-9]+$", origin)}
    return ", ".join(dict.fromkeys([node.key_origin, *stronger]))


def _origins(node: Node) -> Iterator[str]:
    """Where a value and its parts are from."""
    yield node.key_origin
    for child in node.value.values() if isinstance(node.value, dict) else ():
        yield from _origins(child)
