"""The layers of a configuration: file, environment, command line; each becomes a tree of nodes.

Environment: ``POLYHEAD_RUNTIME__CONTEXT=2048`` is ``runtime.context``; an empty variable counts as not set; an
unknown ``POLYHEAD_`` name is an error, for it would be a setting that silently does nothing. Command line:
``key.in.dots=value``.

A value from either is read as YAML (``[a, b]``, ``true``, ``1e-3``), but where the setting is text it is taken as it
is, so that ``prompt=Yes: or # no?`` needs no second quoting; there, only ``null``, a fully quoted text and (where the
setting takes lists) a ``[list]`` are read as YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from . import yaml_marks
from .describe import did_you_mean, field_at, fields, section_in, takes_list, takes_null, takes_text, unknown_key
from .tree import Node, from_python, nest

MAX_BYTES = 1 << 20
"""Largest configuration file, 1 MiB."""
PREFIX = "POLYHEAD_"
RESERVED = frozenset(("POLYHEAD_CACHE",))
"""Variables that mean something else than a setting; so does everything that begins with POLYHEAD_TEST_."""

Problems = list[tuple[str, str]]


def from_file(path: Path, shown: str) -> tuple[Node, Problems]:
    """A YAML file's tree. ``shown`` is how errors name the file. Raises ConfigError where it cannot be read at all."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: there is no such file{_neighbours(path)}") from None
    except IsADirectoryError:
        raise ConfigError(f"{shown}: this is a folder; name a YAML file{_neighbours(path / 'config.yaml')}") from None
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # A NUL or a lone surrogate in the name.
        raise ConfigError(f"{shown!r} cannot be the name of a file: {error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{shown}: larger than {MAX_BYTES} bytes; this cannot be a configuration")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise ConfigError(
            f"{shown}:{line}:{column}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    text = text.replace("\r\n", "\n")
    root, problems = yaml_marks.parse(text, lambda line, column: f"{shown}:{line}:{column}")
    if root is None:
        raise ConfigError(f"{shown}:1:1: the file is empty; it needs at least 'model: PATH'")
    return root, problems


def from_environment(environ: Mapping[str, str]) -> tuple[list[Node], Problems]:
    """The trees that POLYHEAD_ variables say, and what is wrong with some of them."""
    trees: list[Node] = []
    problems: Problems = []
    known = {PREFIX + key.upper().replace(".", "__"): key for key, _ in fields()}
    known[PREFIX + "MODEL"] = "model"
    for name in sorted(environ):
        text = environ[name]
        if not name.startswith(PREFIX) or name in RESERVED or name.startswith(PREFIX + "TEST_") or not text:
            continue
        origin = f"environment {name}"
        path = known[name].split(".") if name in known else name.removeprefix(PREFIX).lower().split("__")
        if name not in known and not _inside(path):
            problems.append((origin, f"no setting has this name{did_you_mean(name, [*known, *RESERVED])}"))
            continue
        _add(path, text, origin, trees, problems)
    return trees, problems


def _inside(path: Sequence[str]) -> bool:
    """Whether a key lies in a setting that may be a section, as runtime.speculation.max_tokens does."""
    info = field_at(path[:-1]) if len(path) > 1 else None
    section = section_in(info) if info is not None else None
    return section is not None and path[-1] in section.model_fields


def from_overrides(overrides: Sequence[str]) -> tuple[list[Node], Problems]:
    """The trees that ``key=value`` arguments say, first to last, and what is wrong with some of them."""
    trees: list[Node] = []
    problems: Problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        path = key.strip().split(".")
        if not equals or not all(re.fullmatch(r"[A-Za-z0-9_]+", part) for part in path):
            problems.append(("command line", f"{override!r} is not KEY=VALUE, as in runtime.context=2048"))
        elif field_at(path) is None:
            end = next(end for end in range(1, len(path) + 1) if field_at(path[:end]) is None)
            path = path[:end] if end > 1 else path  # of a wrong section the whole key is the better hint
            problems.append(("command line", f"{'.'.join(path)}: {unknown_key(path)}"))
        else:
            _add(path, text, "command line", trees, problems)
    return trees, problems


def _add(path: Sequence[str], text: str, origin: str, trees: list[Node], problems: Problems) -> None:
    info = field_at(path)
    assert info is not None, path
    try:
        value = _literal(text, takes_null(info), takes_list(info)) if takes_text(info, path[-1]) else None
        if value is not None:
            trees.append(nest(path, Node(value[0], origin, origin)))
            return
        if not text.strip():
            raise ConfigError(f"{origin}: nothing after '='; write null for no value")
        node, found = yaml_marks.parse(text, lambda line, column: origin)
    except ConfigError as error:
        problems.append((origin, f"{'.'.join(path)}: {str(error).removeprefix(origin + ': ')}"))
        return
    problems.extend((origin, f"{'.'.join(path)}: {message}") for _, message in found)
    trees.append(nest(path, node or Node(None, origin, origin)))


def _literal(text: str, null: bool, lists: bool) -> tuple[Any] | None:
    """The value, in a tuple, where text is to be taken as it is; None where it is YAML."""
    bare = text.strip()
    if null and bare in ("null", "~"):
        return (None,)
    if lists and bare.startswith("["):
        return None
    if bare.startswith("{"):
        try:
            node, _ = yaml_marks.parse(bare, lambda line, column: "")
        except ConfigError:
            return (text,)
        return None if node is not None and isinstance(node.value, dict) else (text,)
    if len(bare) >= 2 and bare[0] == bare[-1] and bare[0] in "\"'":
        try:
            node, _ = yaml_marks.parse(bare, lambda line, column: "")
        except ConfigError:
            return (text,)
        return (node.value,) if node is not None and isinstance(node.value, str) else (text,)
    return (text,)


def from_mapping(source: Mapping[str, Any]) -> Node:
    """A Python mapping's tree."""
    return from_python(source, "configuration")


def _neighbours(path: Path) -> str:
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".yaml", ".yml"))
    except OSError:
        return f" (nor a folder {path.parent})"
    return did_you_mean(path.name, names) or (f"; in that folder are {', '.join(names[:8])}" if names else "")
