"""Chat templates: what they may do, what they may not, and how that is said."""

from __future__ import annotations

import threading
import time
import tracemalloc
from typing import Any

import pytest
from polyhead.chat import ChatTemplate
from polyhead.errors import RequestError, TemplateError

HI = [{"role": "user", "content": "hi"}]


def render(source: str, messages: Any = HI, **extra: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **extra)


def test_a_template_sees_messages_tokens_tools_and_extras() -> None:
    source = "{{ bos_token }}{{ messages[0].content }}{{ tools }}{{ add_generation_prompt }}{{ think }}{{ eos_token }}"
    assert render(source, think=False) == "<s>hiNoneTrueFalse</s>"
    assert render(source, tools=[{"a": 1}], add_generation_prompt=False) == "<s>hi[{'a': 1}]False</s>"
    assert ChatTemplate("{{ pad_token }}", pad_token="<pad>").render(HI) == "<pad>"


def test_no_template_is_an_error_and_never_a_guess() -> None:
    with pytest.raises(TemplateError, match=r"no chat template.*tokenizer\.chat_template"):
        ChatTemplate(None)


def test_block_tags_leave_no_lines_and_generation_marks_are_ignored() -> None:
    source = "{% for m in messages %}\n  {% generation %}\nA {{ m.role }}\n  {% endgeneration %}\n{% endfor %}\nend"
    assert render(source) == "A user\nend"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "{{ {'a': 'é<'} | tojson }}",
            '{"a": "é<"}',
        ),
        (
            "{{ [1, {'b': none}] | tojson(indent=2) }}",
            '[\n  1,\n  {\n    "b": null\n  }\n]',
        ),
        (
            "{{ 'Hello %s, %5.1f%%' % ('you', 2.25) }}",
            "Hello you,   2.2%",
        ),
        (
            "{{ '{} and {b}'.format('a', b='c') }}",
            "a and c",
        ),
        (
            "{{ ' x '.strip() ~ 'a-b'.split('-')[-1] ~ 1 ~ none }}",
            "xb1None",
        ),
        (
            "{{ 'abc'.startswith(('x', 'a')) }}{{ 'b' in 'abc' }}{{ 'A'.lower().upper() }}",
            "TrueTrueA",
        ),
        (
            "{{ 'a\\nb' | indent(2, true) }}{{ [3, 1, 2] | sort | join('<') }}{{ [1, 2] | sum }}",
            "  a\n  b1<2<33",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(4) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "6",
        ),
        (
            "{% for x in 'abc' %}{{ loop.index }}{{ x }}{% if loop.last %}!{% else %},{% endif %}{% endfor %}",
            "1a,2b,3c!",
        ),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break "
            "%}{% endif %}{{ i }}{% endfor %}",
            "023",
        ),
        (
            "{% macro f(x, n=2) %}{{ x * n }}{% endmacro %}{{ f('a') }}{{ f('b', n=3) }}",
            "aabbb",
        ),
        (
            "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}x{% endcall %}",
            "<x>",
        ),
        (
            "{% set t %}{% if 1 %}x{% endif %}{% endset %}{{ t | upper }}{% filter upper %}y{% endfilter %}",
            "XY",
        ),
        (
            "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}{{ {'k': 3}.get('k') }}",
            "a1b23",
        ),
        (
            "{% for r in [1, [2, [3]]] recursive %}{% if r is iterable %}({{ loop(r) }}){% else %}{{ r "
            "}}{% endif %}{% endfor %}",
            "1(2(3))",
        ),
        (
            "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
            "['hi']",
        ),
        (
            "{{ nothing }}{{ nothing is defined }}{{ nothing | default('d') }}{{ messages[5] is defined }}",
            "FalsedFalse",
        ),
        (
            "{{ messages[0]['items'] is defined }}{{ messages[0]._x is defined }}{{ messages[0]['role'][1:] }}",
            "TrueFalseser",
        ),
        (
            "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ -3 | abs }}{{ 2 * 'ab' }}{{ [0] * 2 }}",
            "3310243abab[0, 0]",
        ),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source) == expected


def test_an_error_names_the_line_and_the_cause() -> None:
    with pytest.raises(TemplateError, match="line 3: 'dict object' has no attribute 'tool'"):
        render("a\n{{ messages[0].role }}\n{{ messages[0].tool.name }}")
    with pytest.raises(TemplateError, match="line 2: only two roles"):
        render("x\n{{ raise_exception('only two roles') }}")
    with pytest.raises(TemplateError, match=r"line 2: .*unexpected"):
        render("x\n{{ 1 + }}")
    with pytest.raises(TemplateError, match="line 1: No filter named 'nope'"):
        render("{{ 1 | nope }}")
    with pytest.raises(TemplateError, match="line 2: 'import' is not offered"):
        render("\n{% import 'x' as x %}")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "must be a list"),
        ({"role": "user"}, "must be a list"),
        ([], "at least one"),
        (["hi"], r"messages\[0\] is str"),
        ([*HI, {"content": "x"}], r"messages\[1\]\.role is None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role is 3"),
        ([{"role": "user", "content": 5}], r"content is int"),
        ([{"role": "user", "content": [5]}], r"content\[0\].*type"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text"),
        ([{"role": "user", "content": "x", "extra": object()}], "holds a object"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "key 1"),
        ([{"role": "user", "content": "x", "extra": 1 << 300}], "301 bits"),
    ],
)
def test_messages_are_checked(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        render("{{ messages }}", messages)


def test_nesting_extras_and_tools_are_checked() -> None:
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested]
    with pytest.raises(RequestError, match="deeper"):
        render("x", [{"role": "user", "content": "x", "extra": nested}])
    with pytest.raises(RequestError, match="bos_token"):
        render("x", bos_token="y")
    with pytest.raises(RequestError, match=r"tools\[0\]"):
        render("x", tools=["f"])


def test_parts_are_joined_for_templates_that_know_only_text() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert render("{{ messages[0].content }}", parts) == "a\nb"
    loop = "{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert render(loop, parts) == "[a][b]"
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(RequestError, match="image_url"):
        render("{{ messages[0].content }}", image)


def test_a_template_cannot_change_the_callers_messages() -> None:
    messages = [{"role": "user", "content": "x", "list": [1]}]
    for source in ("{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}", "{{ messages[0].list.pop() }}"):
        with pytest.raises(TemplateError):
            render(source, messages)
    assert messages == [{"role": "user", "content": "x", "list": [1]}]


# Ways out of a sandbox: from a value to its class, to a function's globals, through a string's format, through Jinja's
# own objects. The first lines are those of CVE-2024-34359 and CVE-2026-5760.
ESCAPES = [
    "{% for x in ().__class__.__base__.__subclasses__() %}{% if 'warning' in x.__name__ %}"
    "{{ x()._module.__builtins__['__import__']('os').popen('id').read() }}{% endif %}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ namespace.__init__.__globals__['os'].popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.eval_ctx }}",
    "{{ raise_exception.__globals__['os'] }}",
    "{{ range.__self__.__import__('os') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ messages['__class__']['__base__'] }}",
    "{{ ('' | attr('__class__')).__mro__ }}",
    "{{ ([''] | map(attribute='__class__') | list)[0].__mro__ }}",
    "{{ ([''] | map(attribute='__class__.__mro__') | first)[1] }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0[__class__]}'.format({}) }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('%s' | safe).format.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._environment.globals }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% for x in [1] %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% set ns = namespace() %}{{ ns.__class__.__mro__ }}",
    "{% set ns = namespace() %}{{ ns._Namespace__attrs.x }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__.__mro__ }}",
    "{{ messages.__getitem__(0) }}",
    "{{ messages[0].__init__() }}",
    "{{ [].append.__self__.x }}",
    "{{ nothing.__class__.__mro__ }}",
    "{{ (messages | map('first')).gi_frame.f_builtins }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.fromkeys('a') }}",
    "{{ 1 | _emit }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from 'os' import system %}",
    "{% block a %}{{ super() }}{% endblock %}",
    "{% autoescape true %}{% endautoescape %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_there_is_no_way_from_a_value_to_pythons_internals(source: str) -> None:
    with pytest.raises(TemplateError):
        render(source)


GROW = "{%% set ns = namespace(s='aaaaaaaa') %%}{%% for i in range(100) %%}%s{%% endfor %%}"
SHARE = (
    "{%% set ns = namespace(l=[1], m=[1], t=(1,)) %%}{%% for i in range(100) %%}{%% set ns.l = [ns.l, ns.l] %%}"
    "{%% set ns.m = [ns.m, ns.m] %%}{%% set ns.t = (ns.t, ns.t) %%}{%% endfor %%}{{ %s }}"
)
KEEP = (
    "{%% set ns = namespace(l=[]) %%}{%% set s = 'xyz ' * 100000 %%}{%% for i in range(100000) %%}"
    "{%% set ns.l = [ns.l, %s] %%}{%% endfor %%}"
)
BOMBS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = i * j %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endset %}",
    "{% macro f() %}{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endmacro %}{% set x = f() %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for x in [[1]] recursive %}{{ loop([[1], [1]]) }}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ ([0] * 10**9) | length }}",
    "{{ (0,) * 10**8 }}",
    "{{ 7 ** (7 ** 9) }}",
    "{% set ns = namespace(n=7) %}{% for i in range(100) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x'.center(10**9) }}",
    "{{ 'x'.zfill(10**9) }}",
    "{{ 'x\\t'.expandtabs(10**9) }}",
    "{{ 'a'.translate({97: 'b' * 1000000}) }}",
    "{{ '%1000000000d' % 5 }}",
    "{{ '%*d' % (10**9, 5) }}",
    "{{ '%.1000000000f' % 5 }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '%999999999d' | format(3) }}",
    "{{ '{:>1000000000}'.format('x') }}",
    "{{ '{:>{}}'.format('x', 10**9) }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ 'x' | indent(10**9, true) }}",
    "{{ ('a\\n' * 100000) | indent('x' * 1000) }}",
    "{{ range(9) | batch(10**9, 'x') | list }}",
    "{{ range(9) | slice(10**9) | list }}",
    "{{ 'x' | center(10**10) }}",
    "{{ lipsum(n=10**6) }}",
    "{{ 5 | round(-10**9, 'floor') }}",
    "{{ range(99999) | map('string') | map('replace', '', 'x' * 100000) | list }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ ('ab' * 500000).strip('cdefgh' * 100000 ~ 'ab') }}",
    "{{ ('ab' * 500000) | trim('cdefgh' * 100000 ~ 'ab') }}",
    GROW % "{% set ns.s = ns.s + ns.s %}",
    GROW % "{% set ns.s = ns.s ~ ns.s %}",
    GROW % "{% set ns.s = ns.s * 2 %}",
    GROW % "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}",
    GROW % "{% set ns.s = ns.s.replace('a', 'aa') %}",
    GROW % "{% set ns.s = ns.s | replace('a', 'aa') %}",
    GROW % "{% set ns.s = [ns.s, ns.s] | join %}",
    GROW % "{% set ns.s = ns.s.join(['', ns.s, '']) %}",
    GROW % "{% set ns.s = '%s%s' % (ns.s, ns.s) %}",
    GROW % "{% set ns.s = '{}{}'.format(ns.s, ns.s) %}",
    GROW % "{% set ns.s = ('<' ~ ns.s) | escape | escape ~ ns.s %}",
    GROW % "{% set ns.s = [ns.s, ns.s] | tojson %}",
    SHARE % "ns.l",
    SHARE % "ns.l ~ ''",
    SHARE % "ns.l | tojson",
    SHARE % "ns.l | string",
    SHARE % "'%s' % ns.t",
    SHARE % "'%s' % [ns.l]",
    SHARE % "'{}'.format(ns.l)",
    SHARE % "[ns.l] | join",
    SHARE % "ns.l == ns.m",
    SHARE % "ns.l < ns.m",
    SHARE % "ns.l in [ns.m]",
    SHARE % "ns.l is eq(ns.m)",
    SHARE % "ns.l is in([ns.m])",
    SHARE % "[ns.l, ns.m] | sort | length",
    SHARE % "[ns.l, ns.m] | max | length",
    SHARE % "[{'a': ns.l}] | selectattr('a', 'equalto', ns.m) | list",
    SHARE % "{ns.t: 1}",
    SHARE % "{}[ns.t]",
    SHARE % "{}.get(ns.t)",
    SHARE % "[ns.t] | unique | list",
    SHARE % "dict([(ns.t, 1)])",
    KEEP % "s[1:]",
    KEEP % "s.upper()",
    KEEP % "s | upper",
    KEEP % "s.split(' ')",
    KEEP % "s | list",
    KEEP % "s | map('upper') | list",
    KEEP % "'%s' % s",
    KEEP % "range(99999) | list",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ 1" + " + 1" * 12_000 + " }}",
    "{{ a" + ".b" * 25_000 + " }}",
    "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "{% if a %}" * 4000 + "{% endif %}" * 2000,
    "{{a}}" * 12_000,
    "{{ " + "9" * 60_000 + " }}",
    "x" * 70_000,
]


@pytest.mark.parametrize("source", BOMBS, ids=[f"{i}-{bomb[-60:]}" for i, bomb in enumerate(BOMBS)])
def test_a_hostile_template_is_stopped_in_time(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(TemplateError):
        render(source)
    assert time.perf_counter() - start < 2.5


@pytest.mark.parametrize(
    "source",
    [
        BOMBS[4],
        BOMBS[9],
        *(GROW % s for s in ("{% set ns.s = ns.s ~ ns.s %}", "{% set ns.s = ns.s + ns.s %}")),
        KEEP % "s[1:]",
    ],
)
def test_a_hostile_template_makes_no_more_than_50_megabytes(source: str) -> None:
    template = ChatTemplate(source)
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            template.render(HI)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


def test_a_long_conversation_is_within_the_limits() -> None:
    messages = [{"role": "user", "content": "word " * 200}] * 3000
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m['content'] | trim + '\\n' }}{% endfor %}"
    assert len(render(source, messages)) == 3000 * (200 * 5 + 6)


def test_one_template_renders_in_many_threads() -> None:
    template = ChatTemplate("{% for m in messages %}{% for i in range(200) %}{{ m.content }}{% endfor %}{% endfor %}")
    results: dict[int, str] = {}

    def work(index: int) -> None:
        results[index] = template.render([{"role": "user", "content": str(index)}])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: str(i) * 200 for i in range(8)}
