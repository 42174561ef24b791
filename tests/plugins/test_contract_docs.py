"""docs/plugins/contract.md against the code: every signature and field on the page is the real one, none is missing."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
import textwrap
import typing
from pathlib import Path

import polyhead
import polyhead.arch
import pytest
from polyhead import architecture, errors, hookspecs, testing
from polyhead.plugins import discover
from polyhead.runtime import modules

PAGE = (Path(__file__).parents[2] / "docs" / "plugins" / "contract.md").read_text(encoding="utf-8")
HOMES = (polyhead.arch, architecture, hookspecs, modules, testing)
# Of these the page lists every public method; of the others, the data of the tree, at least every field.
WHOLE = ("Metadata", "Module", "Architecture", "MemorySource")
Members = dict[str, str]


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def stubs() -> dict[str, ast.stmt]:
    """Name and statement of everything in the blocks that are signatures, not examples."""
    found: dict[str, ast.stmt] = {}
    for text in blocks():
        tree = ast.parse(text)
        if any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
            continue
        for node in tree.body:
            name = node.targets[0].id if isinstance(node, ast.Assign) else node.name
            assert name not in found, f"{name} stands twice on the page"
            found[name] = node
    return found


STUBS = stubs()


def real(name: str) -> object:
    for home in HOMES:
        if hasattr(home, name):
            return getattr(home, name)
    raise AssertionError(f"the page describes {name}, which polyhead does not have")


def source(thing: object) -> ast.stmt:
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def signature(node: ast.FunctionDef) -> str:
    return f"({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else None}"


def members(node: ast.ClassDef) -> tuple[Members, Members]:
    """Fields (a property counts as one) and methods of a class as it is written."""
    fields: Members = {}
    methods: Members = {}
    for part in node.body:
        if isinstance(part, ast.AnnAssign):
            default = f" = {ast.unparse(part.value)}" if part.value is not None else ""
            fields[part.target.id] = ast.unparse(part.annotation) + default
        elif isinstance(part, ast.FunctionDef):
            if any(ast.unparse(each) == "property" for each in part.decorator_list):
                fields[part.name] = ast.unparse(part.returns)
            else:
                methods[part.name] = signature(part)
    return fields, methods


def written(thing: type) -> tuple[Members, Members]:
    """The same of the real class, with what it inherits within polyhead."""
    fields: Members = {}
    methods: Members = {}
    for base in reversed(thing.__mro__):
        if base.__module__.startswith("polyhead."):
            mine = members(source(base))
            fields |= mine[0]
            methods |= mine[1]
    return fields, methods


def of(kind: type) -> list[str]:
    return [name for name, node in STUBS.items() if isinstance(node, kind)]


@pytest.mark.parametrize("name", of(ast.FunctionDef))
def test_a_function_on_the_page_has_its_real_signature(name):
    assert signature(STUBS[name]) == signature(source(real(name)))


@pytest.mark.parametrize("name", of(ast.ClassDef))
def test_a_class_on_the_page_has_its_real_fields_and_methods(name):
    fields, methods = members(STUBS[name])
    real_fields, real_methods = written(real(name))
    protocol = getattr(real(name), "_is_protocol", False)
    if name == "ConformanceTests":
        real_methods = {name: real_methods[name] for name in methods}
    public = {key: value for key, value in real_methods.items() if not key.startswith("_") or key == "__call__"}
    plain = {key: value for key, value in real_fields.items() if not isinstance(vars(real(name)).get(key), property)}
    assert fields == (real_fields if protocol else plain)
    assert list(fields) == [key for key in real_fields if key in fields], "in another order"
    assert methods.items() <= real_methods.items()
    if name in WHOLE or protocol:
        assert public.items() <= methods.items()


@pytest.mark.parametrize("name", of(ast.Assign))
def test_a_constant_on_the_page_has_its_real_value(name):
    space = {**vars(typing), **vars(polyhead.arch)}
    assert eval(ast.unparse(STUBS[name].value), space) == real(name)


def test_nothing_public_is_left_out():
    protocols = [name for name, thing in vars(modules).items() if getattr(thing, "_is_protocol", False)]
    expected = {
        *(name for name in polyhead.arch.__all__ if name not in ("ACTIVATIONS", "REQUIRED")),
        *(name for name in vars(hookspecs) if name.startswith("polyhead_")),
        *(name for name in protocols if name != "Protocol"),
        *testing.__all__,
        "Architecture",
        "API_VERSION",
        "SUPPORTED_API_VERSIONS",
        "ModuleKind",
    }
    assert set(STUBS) == expected
    assert "`ACTIVATIONS`" in PAGE
    assert "`REQUIRED`" in PAGE


def test_the_table_of_imports_is_true():
    rows = re.findall(r"^\| `(polyhead[a-z.]*)` \| (.*) \|$", PAGE, re.MULTILINE)
    homes = {
        "polyhead": polyhead,
        "polyhead.arch": polyhead.arch,
        "polyhead.errors": errors,
        "polyhead.testing": testing,
    }
    assert [home for home, _ in rows] == list(homes)
    for home, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert hasattr(homes[home], name), f"{home} has no {name}"
    assert set(re.findall(r"`(\w+)`", dict(rows)["polyhead.testing"])) == set(testing.__all__)


def test_every_test_of_the_kit_stands_in_the_table():
    listed = set(re.findall(r"^\| `(test_\w+)` \|", PAGE, re.MULTILINE))
    tests = {name for name in dir(testing.ConformanceTests) if name.startswith("test_")}
    assert listed == {name for name in tests if not name.startswith("test_cuda")}


def test_keys_that_may_always_be_missing_are_named():
    from polyhead.testing.case import OPTIONAL

    for key in OPTIONAL:
        assert f"`{key}`" in PAGE or f"`{key.removeprefix('attention.')}`" in PAGE, key


def test_the_layer_on_the_page_is_accepted_and_computes_what_it_says(tmp_path, monkeypatch):
    import numpy as np

    (example,) = [text for text in blocks() if "class Bilinear" in text]
    (tmp_path / "polyhead_contract_layer.py").write_text(example)
    monkeypatch.syspath_prepend(str(tmp_path))
    (plugin,) = discover(
        entry_points=[importlib.metadata.EntryPoint("bilinear", "polyhead_contract_layer", "polyhead")]
    ).plugins
    assert plugin.state == "ok", plugin.reason
    (kind,) = plugin.modules
    spec = kind.spec("a", "b")
    rng = np.random.default_rng(0)
    weights = {each.name: rng.normal(size=each.shape).astype(np.float32) for each in spec.tensors(5)}
    x, out = rng.normal(size=(3, 5)).astype(np.float32), np.empty((3, 5), np.float32)
    scratch = {name: np.empty((3, size), np.float32) for name, size in spec.scratch(5).items()}
    assert kind.cpu(spec, weights)(x, out, scratch) is None
    np.testing.assert_allclose(out, (x @ weights["a"].T) * (x @ weights["b"].T), rtol=1e-6)


def test_the_case_on_the_page_describes_a_model():
    (example,) = [text for text in blocks() if "class TestQwen3" in text]
    (node,) = [
        each for each in ast.walk(ast.parse(example)) if isinstance(each, ast.Call) and ast.unparse(each.func) == "Case"
    ]
    case = eval(ast.unparse(node), {"Case": testing.Case})
    from polyhead.testing.subject import Subject

    subject = Subject("polyhead_qwen3", case)
    assert len(subject.variants) == 2
    for variant in subject.variants:
        subject.check(variant)
