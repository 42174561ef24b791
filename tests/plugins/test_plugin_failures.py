"""Every way a plugin can be broken: it is FAILED with a reason a person can act on, and nothing else suffers."""

from __future__ import annotations

import re

import pytest
from polyhead.errors import PluginError
from polyhead.plugins import Plugin, Registry, discover

GOOD = """
class Mine(LlamaGQA):
    name, gguf_names = "mine", ("mine",)

@hookimpl
def polyhead_register_architectures():
    return [Mine()]
"""
KIND = """
class Layer(Module):
    pass

@hookimpl
def polyhead_register_modules():
    return [{}]
"""


def returning(value: str) -> str:
    return GOOD.replace("return [Mine()]", value)


BROKEN = {
    "raises at import": ("raise RuntimeError('no\\nluck')", r"^RuntimeError: no luck$"),
    "exits at import": ("import sys; sys.exit(3)", r"^called sys\.exit\(3\) while it was loaded$"),
    "exits in a hook": (returning("raise SystemExit"), r"called sys\.exit\(None\)"),
    "raises in a hook": (returning("1 / 0"), r"^ZeroDivisionError: division by zero$"),
    "raises what cannot be shown": (
        "class Bad(Exception):\n    __str__ = None\nraise Bad",
        r"^Bad \(its message cannot be shown\)$",
    ),
    "raises no Exception": ("raise type('Odd', (BaseException,), {})('x')", r"^Odd: x$"),
    "skips itself as a test would": ("import pytest; pytest.skip('no', allow_module_level=True)", r"^Skipped: no$"),
    "is cancelled": ("import asyncio; raise asyncio.CancelledError", r"^CancelledError:"),
    "has a syntax error": ("def broken(:", r"SyntaxError: .*strange_module\.py, line \d+"),
    "needs a package that is absent": ("import surely_absent", r"ModuleNotFoundError: .*'surely_absent'"),
    "needs a name of a later polyhead": ("from polyhead.arch import Mamba", r"ImportError: .*'Mamba'"),
    "implements no hook": ("", r"implements no hook\. Hooks: polyhead_register_architectures, "),
    "forgets to decorate": (GOOD.replace("@hookimpl", ""), r"polyhead_register_architectures is not decorated"),
    "misspells a hook": (
        GOOD.replace("_architectures()", "_architecture()"),
        r"polyhead_register_architecture, which is not a hook; did you mean polyhead_register_architectures\?",
    ),
    "has a hook nothing is like": (
        GOOD + "@hookimpl\ndef frobnicate(): pass",
        r"frobnicate, which is not a hook\. Hooks: polyhead_register",
    ),
    "takes an argument that the hook lacks": (
        GOOD.replace("_architectures()", "_architectures(meta)"),
        r"'polyhead_register_architectures'.*'meta'.*can not be found in the hookspec",
    ),
    "gives an argument a default": (
        GOOD + "@hookimpl\ndef polyhead_register_commands(cli=None): pass",
        r"polyhead_register_commands gives cli a default",
    ),
    "returns nothing": (returning("pass"), r"architectures returned None, expected a list"),
    "returns one and no list": (returning("return Mine()"), r"returned <.*Mine.*>, expected a list"),
    "returns a string": (returning("return 'mine'"), r"returned 'mine', expected a list"),
    "returns bytes": (returning("return b'mine'"), r"returned b'mine', expected a list"),
    "yields": (returning("yield Mine()"), r"returned <generator .*>, expected a list"),
    "returns a class": (returning("return [Mine]"), r"mine is a class; return an instance of it, Mine\(\)"),
    "returns something else": (returning("return [3]"), r"int lacks name, gguf_names, api_version, decoder\(\), block"),
    "lacks the layer builder": (
        GOOD.replace("(LlamaGQA)", "") + "    ",
        r"architecture mine lacks api_version, decoder\(\), block\(\)$",
    ),
    "has a number for a name": (GOOD.replace('"mine", (', "5, ("), r"name is 5, expected a string"),
    "has a name that cannot be typed": (
        GOOD.replace('"mine", (', r'"a\nb", ('),
        r"name is 'a\\nb', expected a string that",
    ),
    "has a blank name": (GOOD.replace('"mine", (', '" ", ('), r"name is ' ', expected a string that can be typed"),
    "has a string for gguf_names": (GOOD.replace('("mine",)', '"mine"'), r"gguf_names is 'mine', expected a tuple"),
    "has no gguf_names": (GOOD.replace('("mine",)', "()"), r"gguf_names is \(\), expected a tuple of strings"),
    "has a blank among gguf_names": (GOOD.replace('("mine",)', '("mine", " ")'), r"gguf_names is \('mine', ' '\), exp"),
    "cannot be asked what it accepts": (
        GOOD.replace("(LlamaGQA):", "(LlamaGQA):\n    accepts = 5"),
        r"architecture mine: accepts is 5, expected a method",
    ),
    "has a string for a version": (
        GOOD.replace("(LlamaGQA):", "(LlamaGQA):\n    api_version = '1'"),
        r"architecture mine: api_version is '1', expected an integer, now 1",
    ),
    "has True for a version": (
        GOOD.replace("(LlamaGQA):", "(LlamaGQA):\n    api_version = True"),
        r"api_version is True, expected an integer",
    ),
    "has None for a version": (
        GOOD.replace("(LlamaGQA):", "(LlamaGQA):\n    api_version = None"),
        r"api_version is None, expected an integer",
    ),
    "claims a name twice": (returning("return [Mine(), Mine()]"), r"registers the gguf_name mine twice"),
    "was written for a later API": (
        GOOD.replace("(LlamaGQA):", "(LlamaGQA):\n    api_version = API_VERSION + 1"),
        r"written for plugin API version 2; this polyhead supports 1\. Upgrade the plugin or polyhead",
    ),
    "was written for a later API with other fields": (
        GOOD.replace("(LlamaGQA):", ":\n    api_version = 99"),
        r"written for plugin API version 99; this polyhead supports 1",
    ),
    "registers a layer and not a kind": (KIND.format("Layer"), r"returned <class .*Layer.*>.*expected ModuleKind"),
    "registers a kind for something else": (KIND.format("ModuleKind(int, print)"), r"spec is <class 'int'>"),
    "registers a kind for the base": (KIND.format("ModuleKind(Module, print)"), r"expected a subclass of polyhead"),
    "registers a kind that cannot run": (KIND.format("ModuleKind(Layer, None)"), r"for Layer: cpu is None"),
    "registers a layer twice": (
        KIND.format("ModuleKind(Layer, print), ModuleKind(Layer, print)"),
        r"registers the module Layer twice",
    ),
}


def strange(registry: Registry, name: str = "strange") -> Plugin:
    return next(plugin for plugin in registry.plugins if plugin.name == name)


@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that(case, install, caplog):
    source, reason = BROKEN[case]
    install(source)
    registry = discover()
    plugin = strange(registry)
    assert plugin.state == "FAILED"
    assert re.search(reason, plugin.reason), plugin.reason
    assert "\n" not in plugin.reason
    assert not plugin.architectures
    # One line of warning, which says whom to blame.
    assert [record.getMessage() for record in caplog.records] == [
        f"plugin strange (stranger 1.2) is left out: {plugin.reason}"
    ]
    # Who does not need it does not notice.
    assert registry.find("llama")[0].name == "llama_gqa"
    # Who does need it learns what happened to it.
    with pytest.raises(PluginError) as error:
        registry.find("mine")
    assert f"FAILED: plugin strange (stranger 1.2): {plugin.reason}" in str(error.value)


def test_an_entry_point_without_its_attribute_fails_alone(install):
    install(GOOD, value="strange_module:absent")
    assert re.search(r"AttributeError: .*'absent'", strange(discover()).reason)


@pytest.mark.parametrize("value", ["not a module!!", ".strange_module", "strange_module:"])
def test_an_entry_point_that_names_no_module_says_so(install, value):
    install(GOOD, value=value)
    reason = strange(discover()).reason
    assert reason == f"its entry point names {value!r}, expected a module, such as polyhead_strange"


def test_what_a_plugin_prints_is_no_result_and_what_it_does_to_stdout_is_undone(install, capsys):
    install("import sys\nprint('at import')\nsys.stdout.close()\n" + returning("print('in a hook'); return [Mine()]"))
    install("import sys\nsys.stdout = None\n" + GOOD.replace("mine", "other"), name="other", distribution="others")
    registry = discover()
    assert {strange(registry, name).state for name in ("strange", "other")} == {"ok"}
    print("a result")
    assert capsys.readouterr() == ("a result\n", "at import\nin a hook\n")


def test_an_interruption_is_the_user_s_and_the_warning_names_the_plugin_it_waited_for(install, caplog):
    install("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        discover()
    assert [record.getMessage() for record in caplog.records] == [
        "interrupted while plugin strange (stranger 1.2) was loaded"
    ]
    assert strange(discover(disable=["strange"])).state == "disabled"


def test_the_same_plugin_unbroken_is_found_and_warns_of_nothing(install, caplog):
    install(GOOD)
    plugin, architecture = discover().find("mine")
    assert (plugin.state, plugin.origin, architecture.name) == ("ok", "strange (stranger 1.2)", "mine")
    assert not caplog.records


def test_a_hook_of_a_later_polyhead_may_be_marked_optional(install):
    install(GOOD + "\n@hookimpl(optionalhook=True)\ndef polyhead_register_dreams(): pass\n")
    assert discover().find("mine")[0].state == "ok"


def test_a_reason_is_one_line_of_bounded_length(install):
    install("raise RuntimeError('dear\\n' * 100_000)")
    reason = strange(discover()).reason
    assert "\n" not in reason
    assert len(reason) <= 500


@pytest.mark.parametrize("file", ["METADATA", "entry_points.txt"])
def test_a_damaged_dist_info_hurts_no_other_plugin(install, tmp_path, file):
    install(GOOD)
    install(GOOD.replace("mine", "other"), name="second", distribution="damaged", version="9")
    damaged = tmp_path / "site" / "damaged-9.dist-info" / file
    if file == "METADATA":
        damaged.unlink()
    else:
        damaged.write_text("[polyhead]\nthere is no equals sign here\n")
    registry = discover()
    assert registry.find("mine")[0].distribution == "stranger"
    assert registry.find("llama")[0].distribution == "polyhead"


def test_two_plugins_that_implement_one_layer_do_not_replace_each_other(install):
    install(KIND.format("ModuleKind(Layer, print)"))
    install(
        "from strange_module import Layer\n@hookimpl\ndef polyhead_register_modules():\n"
        "    return [ModuleKind(Layer, print)]\n",
        name="thief",
        distribution="thieves",
    )
    registry = discover()
    assert strange(registry).state == "ok"
    assert strange(registry, "thief").reason == "registers module Layer, which strange (stranger 1.2) registers too"


COMMANDS = "import click\n@hookimpl\ndef polyhead_register_commands(cli):\n    {}\n"


def test_a_plugin_adds_a_command(install):
    import click

    install(COMMANDS.format("cli.add_command(click.Command('dream', callback=lambda: None))"))
    cli, warnings = click.Group("polyhead"), []
    discover().register_commands(cli, warnings.append)
    assert "dream" in cli.commands
    assert not warnings


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("cli.add_command(click.Command('run'))", "redefines the command run"),
        ("cli.commands.pop('run')", "redefines the command run"),
        ("cli.add_command(click.Command('half')); raise KeyError('x')", "KeyError"),
        ("import sys; sys.exit(1)", "called sys.exit(1) while it added commands"),
        ("raise BaseException('x')", "BaseException: x"),
        ("cli.commands = None", "puts None in place of the commands"),
        ("cli.commands[5] = click.Command('half')", "as 5, expected a click.Command with a name"),
        ("cli.commands['half'] = print", "as 'half', expected a click.Command with a name"),
    ],
)
def test_commands_of_a_plugin_that_misbehaves_are_left_out(install, body, problem):
    import click

    install(COMMANDS.format(body))
    run = click.Command("run")
    cli, warnings = click.Group("polyhead", {"run": run}), []
    discover().register_commands(cli, warnings.append)
    assert cli.commands == {"run": run}
    assert len(warnings) == 1
    assert "strange (stranger 1.2)" in warnings[0]
    assert problem in warnings[0]
