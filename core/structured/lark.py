"""A first look at a Lark grammar from a stranger, before llguidance compiles it.

llguidance bounds much of its work, but not what nests through names: terminals that refer to terminals take time that
grows with the cube of their depth, and rules take stack. So names and brackets are counted here, and names followed,
with llguidance's own lexical rules. Refused as well is what would have no effect, or would end a text before its
grammar does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from ..errors import RequestError

MAX_PARTS = 2_000  # definitions and brackets
MAX_DEPTH = 250
NAME = "structured_outputs.grammar"

_LEXEME = re.compile(
    r"""(?P<skip>(?:\#|//)[^\n]*|[ \t\r]+)
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regexp>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<special><[^<>\s]+>)
    |(?P<block>%(?:json|regex|llguidance)\b)
    |(?P<name>!?[_?]?[a-z][_a-z0-9-]*|_?[A-Z][_A-Z0-9-]*)
    |(?P<number>0[xX][0-9a-fA-F]+|[+-]?[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)
    |(?P<sign>::|.|\n)""",
    re.VERBOSE,
)
_BLANKS = re.compile(r"\s*")
_AFTER_NAME = (("sign", "."), ("sign", "_"), ("sign", "::"))
_STATEMENTS = frozenset({"ignore", "import", "declare"})
# Options of a rule: a generation has one temperature, and hiding what was generated already is not possible.
_WITHOUT_EFFECT = frozenset({"temperature", "stop"})


def check(grammar: str) -> None:
    """Raises RequestError for a grammar that must not be compiled."""
    if grammar.lstrip().startswith("{"):
        raise RequestError(
            f"{NAME} must be Lark, but begins with '{{'; a JSON schema goes into structured_outputs.json"
        )
    lexemes = list(_lexemes(grammar))
    starts, deep = set(), 0
    for index, (kind, text) in enumerate(lexemes):
        if kind == "sign":
            deep += (text in "([") - (text in ")]")
            if text == ":" and deep == 0:  # in brackets it is a range of bits
                starts.add(_start(lexemes, index))
    parts = len(starts) + sum(kind == "sign" and text in "([" for kind, text in lexemes)
    if parts > MAX_PARTS:
        raise RequestError(f"{NAME} has {parts:,} definitions and brackets; {MAX_PARTS:,} are allowed")
    names: dict[str, set[str]] = {}
    nesting: dict[str, int] = {}
    current, deep = "", 0
    for index, (kind, text) in enumerate(lexemes):
        if index in starts:
            current, deep = text.lstrip("!?"), 0
        elif kind == "sign":
            deep += (text in "([") - (text in ")]")
        elif kind == "special":
            raise RequestError(f"{NAME} has the special token {text[:40]}: only text can be asked for")
        elif kind == "name" and text in _STATEMENTS and lexemes[index - 1] == ("sign", "%"):
            current = ""
        elif kind == "name":
            if text in _WITHOUT_EFFECT and lexemes[index + 1 : index + 2] == [("sign", "=")]:
                raise RequestError(f"{NAME} has the option {text}=, which is not supported")
            names.setdefault(current, set()).add(text)
        nesting[current] = max(nesting.get(current, 0), deep)
    _check_depth(names, nesting)


def _lexemes(grammar: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of each lexeme; the JSON after %json and its like is left out."""
    at = 0
    while at < len(grammar):
        found = _LEXEME.match(grammar, at)
        assert found is not None  # any character is a sign
        assert found.lastgroup is not None
        at = found.end()
        if found.lastgroup == "block":
            at = _after_json(grammar, at, found[0])
        elif found.lastgroup != "skip":
            yield found.lastgroup, found[0]


def _after_json(grammar: str, at: int, keyword: str) -> int:
    """Where the JSON that follows a keyword ends."""
    start = _BLANKS.match(grammar, at).end()  # type: ignore[union-attr]  # it matches nothing, too
    try:
        value, end = json.JSONDecoder().raw_decode(grammar, start)
    except (ValueError, RecursionError):
        line = grammar.count("\n", 0, at) + 1
        raise RequestError(f"{NAME} has something other than JSON after {keyword} in line {line}") from None
    if keyword == "%llguidance" and isinstance(value, dict) and value.get("allow_invalid_utf8"):
        raise RequestError(f"{NAME} asks for allow_invalid_utf8, which is not supported")
    return end


def _start(lexemes: list[tuple[str, str]], colon: int) -> int:
    """Where the name stands that is defined at a colon: ``name``, ``name[options]``, ``name::_`` or ``NAME.5``."""
    index = colon - 1
    if index > 0 and lexemes[index] == ("sign", "]"):
        while index > 0 and lexemes[index] != ("sign", "["):
            index -= 1
        index -= 1
    while index > 0 and (lexemes[index][0] == "number" or lexemes[index] in _AFTER_NAME):
        index -= 1
    if index < 0 or lexemes[index][0] != "name":
        raise RequestError(f"{NAME} has a ':' that defines no name")
    return index


def _check_depth(names: dict[str, set[str]], nesting: dict[str, int]) -> None:
    """Follows terminals, which are written in capitals, through the names in them. Linear in the grammar."""
    depth: dict[str, int] = {}
    terminals = {name for name in nesting if name.lstrip("_")[:1].isupper()}
    for name in nesting:
        if name in depth:
            continue
        path = {
            name: iter(names.get(name, set()) & terminals)
        }  # the names that are being followed, the last the inmost
        while path:
            top = next(reversed(path))
            inner = next((other for other in path[top] if other not in depth), None)
            if inner is None:
                below = max((depth[other] for other in names.get(top, set()) & terminals), default=0)
                depth[top] = 1 + nesting[top] + below
                del path[top]
            if inner in path or len(path) > MAX_DEPTH or depth.get(top, 0) > MAX_DEPTH:
                raise RequestError(
                    f"{NAME}: {inner or top} contains itself, or nests deeper than the {MAX_DEPTH} levels of names and "
                    "brackets that are allowed"
                )
            if inner is not None:
                path[inner] = iter(names.get(inner, set()) & terminals)
