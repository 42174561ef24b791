"""What strangers may ask for: refusals in words, and grammars made to hang, crash or fill the memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from polyhead.engine import StructuredOutputs
from polyhead.errors import CapacityError, RequestError
from polyhead.tokenizer import Tokenizer
from polyhead.tokenizer.tiny import tiny_vocabulary

pytest.importorskip("llguidance", reason="llguidance is not installed: pip install 'polyhead[structured]'")

from polyhead.structured import Guides, guides
from polyhead.structured.lark import check

TOKENIZER = Tokenizer.from_gguf(tiny_vocabulary(300))


@pytest.fixture
def made() -> Guides:
    return Guides(TOKENIZER, TOKENIZER.vocab_size, TOKENIZER.stop_ids)


REFUSED = [
    ({"regex": "(a"}, "regex cannot be used: unclosed group"),
    ({"regex": "a(?=b)"}, "regex cannot be used: look-around, including look-ahead and look-behind, is not supported"),
    ({"regex": r"(a)\1"}, "regex cannot be used: backreferences are not supported"),
    ({"regex": r"\bfoo"}, "regex cannot be used: lookarounds not supported yet"),
    ({"regex": "a\\"}, "regex ends with a backslash that escapes nothing"),
    ({"regex": r"[^\s\S]"}, "regex allows no text that can be written"),
    ({"json": {"type": "object", "if": {}, "uniqueItems": True}}, r'json cannot be used: Unimplemented keys: \["if"'),
    ({"json": {"items": {"not": {}}}}, r'json cannot be used: Unimplemented keys: \["not"\]'),
    ({"json": {"if": {}, "x-guidance": {"lenient": True}}}, r'json cannot be used: Unimplemented keys: \["if"\]'),
    ({"json": {"format": "foo", "type": "string"}}, "json cannot be used: Unknown format: foo"),
    ({"json": {"oneOf": [{}, {"type": "object"}]}}, r"json cannot be used: oneOf constraints are not supported$"),
    ({"json": {"$ref": "http://example.com/x"}}, "json cannot be used: .*does not fetch resources"),
    ({"json": {"$ref": "file:///etc/passwd"}}, "json cannot be used: .*does not fetch resources"),
    ({"json": {"$ref": "#/$defs/none"}}, "json cannot be used: "),
    ({"json": {"$ref": "#"}}, "json allows no text that can be written"),
    ({"json": {"type": 5}}, "json cannot be used: type must be a string or array of strings"),
    ({"json": {"enum": []}}, "json cannot be used: Unsatisfiable schema"),
    (
        {"json": {"properties": {f"p{i}": {} for i in range(481)}}},
        "json has an object with 481 optional properties; 480 are",
    ),
    ({"grammar": 'start: "a" b'}, 'grammar cannot be used: line 1, column 8: unknown name: "b"'),
    ({"grammar": '# it\nstart "a"'}, "grammar cannot be used: line 2, column 7: Expected token ':'"),
    ({"grammar": "# nothing"}, "grammar cannot be used: no start rule found"),
    ({"grammar": "start: a\na: a"}, "grammar allows no text that can be written"),
    ({"grammar": 'start: "a" <|endoftext|>'}, r"grammar has the special token <\|endoftext\|>: only text"),
    ({"grammar": "start: <[3]>"}, r"grammar has the special token <\[3\]>: only text can be asked for"),
    ({"grammar": "start: <[*]>"}, r"grammar has the special token <\[\*\]>"),
    ({"grammar": "start: a\na[temperature=0.5]: /x/"}, "grammar has the option temperature="),
    ({"grammar": 'start: a "b"\na[capture, stop=""]: /x*/'}, "grammar has the option stop=, which is not supported"),
    ({"grammar": '%llguidance {"allow_invalid_utf8": true}\nstart: /a/'}, "grammar asks for allow_invalid_utf8"),
    ({"grammar": 'start: %json {"a": }'}, "grammar has something other than JSON after %json in line 1"),
    ({"grammar": ' {"grammars": []}'}, "grammar must be Lark, but begins with '{'"),
    ({"grammar": "start: @other"}, "grammar cannot be used: unknown grammar @other"),
    ({"grammar": "%import secret.FILE\nstart: FILE"}, "grammar cannot be used: line 1, column 1: Unknown common regex"),
    ({"grammar": ": a"}, "grammar has a ':' that defines no name"),
    ({"grammar": "start: A\nA: B\nB: A"}, "grammar: A contains itself"),
]


@pytest.mark.parametrize(("spec", "words"), REFUSED, ids=[words[:50] for _, words in REFUSED])
def test_what_cannot_be_used_is_told_in_a_sentence(made, spec, words, capfd):
    with pytest.raises(RequestError, match=f"^structured_outputs.{words}") as caught:
        made.guide(StructuredOutputs(**spec))
    message = str(caught.value)
    assert len(message) < 500
    assert "\n" not in message
    assert "<" not in message or "special token <" in message
    assert capfd.readouterr() == ("", "")


def test_what_a_grammar_may_have():
    check('start: "<a>" /<b>|:/ x // <c>: d\nx[capture="q", lazy]: A.5 "]"\nA: %json {"a": "<z>:"}\n%override x: "b"')
    check('start: "a"*\nIGNORED: "b"\n%ignore IGNORED')
    check('%import common.INT start: INT\n?list: "a"\n!p::_: "x" %if is_ones([0:2])\nA: "\\"" B~3..5\nB: /\\/:/i')


def chain(definitions: int, body: str = "{}", names: str = "a") -> str:
    rules = "".join(f"{names}{i}: {body.replace('{}', f'{names}{i + 1}')}\n" for i in range(definitions))
    return f'start: {names}0\n{rules}{names}{definitions}: "x"\n'


def references(count: int, schema: str) -> str:
    """A schema of definitions, each of which needs the next."""
    inner = ",".join(f'"d{i}":{schema.replace("@", f"#/$defs/d{i + 1}")}' for i in range(count))
    return f'{{"$ref":"#/$defs/d0","$defs":{{{inner},"d{count}":{{"type":"string"}}}}}}'


def later(index: int, end: int) -> str:
    return "|".join(f"A{i}" for i in range(index + 1, end))


HOSTILE = {
    "parentheses": {"regex": "(" * 100_000 + "a" + ")" * 100_000},
    "stars": {"regex": "a" + "*" * 200_000},
    "blow up": {"regex": "(a|b)*a(a|b){1000}"},
    "repeats": {"regex": "((a{0,1000}){0,1000}){0,1000}"},
    "a long repeat": {"regex": "(abc|def){100000,1000000}"},
    "repeats of letters": {"regex": r"((\w{1,1000}){1,1000}){1,1000}"},
    "alternatives": {"regex": "|".join(f".*{i}" for i in range(3000))},
    "many choices": {"choice": [f"choice {i}" for i in range(1024)]},
    "long choices": {"choice": [f"{i:02}" * 2_048 for i in range(60)]},
    "brackets of rules": {"grammar": "start: " + "(" * 100_000 + '"a"' + ")" * 100_000},
    "brackets of terminals": {"grammar": "start: A\nA: " + "(" * 1_900 + '"a"' + ")" * 1_900},
    "rules": {"grammar": chain(12_000)},
    "rules at the bound": {"grammar": chain(1_900)},
    "nested rules": {"grammar": chain(95, "(" * 19 + "{}" + ' "y")*' * 19)},
    "terminals": {"grammar": chain(12_000, names="A")},
    "terminals at the bound": {"grammar": chain(120, '({} "y")*', "A")},
    "nested terminals": {"grammar": chain(400, "(" * 4 + "{}" + ' "y")*' * 4, "A")},
    "doubling": {"grammar": chain(60, "{} {}")},
    "doubling terminals": {"grammar": chain(60, "{} {}", "A")},
    "undefined names": {"grammar": "start: " + "|".join(f"A{i}" for i in range(40_000))},
    "names in all names": {"grammar": "start: A0\n" + "".join(f"A{i}: {later(i, 200)}\n" for i in range(199))},
    "ambiguity": {"grammar": 'start: a\na: a a | "x" | a a a | '},
    "intersections": {"grammar": "start: A\nA: " + " & ".join(f"/(?s:.*){c}(?s:.*)/" for c in "abcdefghijklm")},
    "json in a grammar": {"grammar": "start: %json " + '{"not":' * 30_000 + "{}" + "}" * 30_000},
    "properties": {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(8_000)}}},
    "required properties": {
        "json": {"properties": {f"p{i}": {} for i in range(6_000)}, "required": [f"p{i}" for i in range(6_000)]}
    },
    "references": {"json": references(7_000, '{"$ref":"@"}')},
    "nested references": {"json": references(2_500, '{"type":"object","properties":{"x":{"$ref":"@"}}}')},
    "references and more": {"json": references(4_000, '{"$ref":"@","type":"object"}')},
    "doubled references": {"json": references(60, '{"anyOf":[{"$ref":"@"},{"allOf":[{"$ref":"@"}]}]}')},
    "products": {
        "json": {"allOf": [{"anyOf": [{"required": [f"a{i}_{j}"]} for j in range(10)]} for i in range(50)]}
    },
    "items": {"json": {"type": "array", "items": {"type": "array", "maxItems": 10**5}, "minItems": 10**9}},
    "lengths": {"json": {"type": "string", "minLength": 10**9, "maxLength": 10**12}},
    "numbers": {"json": {"type": "number", "minimum": -1.7e308, "maximum": 1.7e308, "multipleOf": 1e-300}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_grammar_takes_long_or_ends_the_process(made, name, capfd):
    start, refusal = time.process_time(), "structured_outputs."
    try:
        guide = made.guide(StructuredOutputs(**HOSTILE[name]))
        slowest = 0.0
        for _ in range(40):
            before = time.process_time()
            tokens = np.flatnonzero(np.unpackbits(guide.allowed().view(np.uint8), bitorder="little"))
            text = [token for token in tokens.tolist() if token not in TOKENIZER.stop_ids]
            if not text:
                break
            guide.accept(text[-1])
            slowest = max(slowest, time.process_time() - before)
        assert slowest < 2.0
    except RequestError as error:
        refusal = str(error)
    assert refusal.startswith("structured_outputs.")
    assert "\n" not in refusal
    assert time.process_time() - start < 20.0
    assert capfd.readouterr() == ("", "")


def test_a_grammar_that_grows_too_complex_says_where(made):
    guide = made.guide(StructuredOutputs(regex="((a{0,1000}){0,1000}){0,1000}"))
    a = TOKENIZER.encode("a")[0]

    def run() -> None:
        for _ in range(500):
            guide.allowed()
            guide.accept(a)

    with pytest.raises(RequestError, match=r"regex cannot be followed after [0-9]+ tokens: too many expressions"):
        run()


def test_equal_forms_are_compiled_once_and_the_least_used_are_forgotten(made, monkeypatch):
    compiled = []
    compile_ = Guides._compile
    monkeypatch.setattr(
        Guides, "_compile", lambda self, spec, tokens: compiled.append(spec) or compile_(self, spec, tokens)
    )
    specs = [StructuredOutputs(regex=f"a{{{i}}}") for i in range(1, guides.KEPT + 2)]
    first = made.guide(specs[0])
    first.accept(TOKENIZER.encode("a")[0])
    assert first.ended
    assert not made.guide(StructuredOutputs(regex="a{1}")).ended  # a fresh one
    assert compiled == specs[:1]
    for spec in specs:
        made.guide(spec)
    assert compiled == specs
    made.guide(specs[-1])
    made.guide(specs[0])
    assert compiled == [*specs, specs[0]]


def test_what_others_used_up_of_a_grammar_does_not_end_a_request(made, monkeypatch):
    monkeypatch.setitem(guides.LIMITS, "max_lexer_states", 60)
    spec = StructuredOutputs(regex="[ab]*c[de]{30}")
    a, b, c, d = (TOKENIZER.encode(char)[0] for char in "abcd")
    for _ in range(3):  # the states found add up, until one begins with a grammar of its own
        guide = made.guide(spec)
        for token in [a, b, c, *[d] * 20]:
            assert guide.allowed()[token // 32] >> token % 32 & 1
            guide.accept(token)
    other = made.guide(spec)
    other._matcher.consume_token(c)
    other._matcher.consume_token(c)  # in an error state now
    assert other._matcher.is_error()
    other.accept(a)
    assert other.allowed()[c // 32] >> c % 32 & 1


def test_depth_is_counted_through_names_and_brackets():
    check(chain(248, names="A"))
    check("start: A\nA: " + "(" * 248 + '"a"' + ")" * 248)
    check("start: " + " ".join(f"A{i}" for i in range(900)) + "\n" + "".join(f'A{i}: "x"\n' for i in range(900)))
    for grammar in (chain(250, names="A"), chain(120, "(({}))", "A"), "A: B\nB: C\nC: (A)", '_A: "x" _A'):
        with pytest.raises(RequestError, match="contains itself, or nests deeper than the 250 levels"):
            check(grammar)
    check('start: a\na: b\nb: a | "x"')  # rules may


def test_guides_are_made_from_several_threads(made):
    found, threads = [], []
    for index in range(8):
        spec = StructuredOutputs(regex=f"[ab]{{{index % 3 + 1}}}")
        threads.append(threading.Thread(target=lambda spec=spec: found.append(made.guide(spec).allowed().copy())))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all((each == found[0]).all() for each in found)
    assert threading.stack_size() == 0


def test_no_room_for_a_stack_is_an_error(made, monkeypatch):
    def fails(self: object) -> None:
        raise RuntimeError("can't start new thread")

    made.guide(StructuredOutputs(regex="b"))
    monkeypatch.setattr(threading.Thread, "start", fails)
    with pytest.raises(CapacityError, match="thread with a stack of 512 MiB"):
        made.guide(StructuredOutputs(regex="a"))
    assert threading.stack_size() == 0


MISSING = """
import sys
sys.modules["llguidance"] = None
from polyhead.engine import StructuredOutputs
from polyhead.errors import RequestError
from polyhead.structured import Guides
from polyhead.tokenizer import Tokenizer
from polyhead.tokenizer.tiny import tiny_vocabulary
tokenizer = Tokenizer.from_gguf(tiny_vocabulary(100))
try:
    Guides(tokenizer, 100, tokenizer.stop_ids).guide(StructuredOutputs(regex="a"))
except RequestError as error:
    print(error)
"""


def test_a_missing_llguidance_is_told_with_what_installs_it():
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "structured outputs need llguidance: pip install 'polyhead[structured]'\n"


def test_importing_the_package_imports_nothing_of_llguidance():
    code = "import sys, polyhead.structured, polyhead.engine; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout.lower()) is False
