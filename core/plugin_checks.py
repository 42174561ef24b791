"""What a plugin must look like: its hooks, what they return, and the layers of its own in a Decoder.

Every fault is a PluginError that says what is wrong and what was expected. Knows nothing of discovery or of files.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .arch import Decoder, Module, TensorSpec
from .architecture import API_VERSION, SUPPORTED_API_VERSIONS, Architecture
from .errors import PluginError
from .runtime.modules import ModuleKind

if TYPE_CHECKING:
    import click

PROJECT = "polyhead"
HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("polyhead_"))


def read_plugin(target: object, name: str) -> tuple[pluggy.PluginManager, list[Architecture], list[ModuleKind]]:
    """Registers what an entry point named, calls its hooks and checks what they return.

    Raises PluginError, and whatever the plugin's own code raises.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(target, name)
    except pluggy.PluginValidationError as error:
        raise PluginError(str(error)) from error
    _check_hooks(manager, target)
    architectures = _returned(manager, "polyhead_register_architectures")
    kinds = _returned(manager, "polyhead_register_modules")
    for architecture in architectures:
        _check_architecture(architecture)
    for kind in kinds:
        _check_module_kind(kind)
    _check_no_repeats("gguf_name", [name for architecture in architectures for name in architecture.gguf_names])
    _check_no_repeats("module", [kind.spec.__name__ for kind in kinds])
    return manager, architectures, kinds


def check_modules(decoder: Decoder) -> None:
    """Checks what the plugin's own layers in a Decoder say of themselves, before anything relies on it."""
    for index, block in enumerate(decoder.blocks):
        module = block.mlp
        if not isinstance(module, Module):
            continue
        where = f"blocks[{index}].mlp, a {type(module).__name__},"
        specs = module.tensors(decoder.hidden)
        if not isinstance(specs, Iterable) or isinstance(specs, str):
            raise PluginError(f"{where} returns {_short(specs)} from tensors(), expected to yield each TensorSpec")
        for spec in specs:
            if not isinstance(spec, TensorSpec):
                raise PluginError(f"{where} yields {_short(spec)}, expected a TensorSpec")
        scratch = module.scratch(decoder.hidden)
        if not isinstance(scratch, Mapping):
            raise PluginError(f"{where} returns {_short(scratch)} from scratch(), expected a dict of names and sizes")
        for name, size in scratch.items():
            if not isinstance(name, str):
                raise PluginError(f"{where} names scratch {_short(name)}, expected a string")
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise PluginError(
                    f"{where} wants {_short(size)} values of scratch {name!r}, expected an integer above 0"
                )


def check_commands(before: Mapping[str, click.Command], commands: object) -> None:
    """Checks what a plugin made of the command line's table of commands: all of ``before``, and others by name."""
    import click

    if not isinstance(commands, dict):
        raise PluginError(f"puts {_short(commands)} in place of the commands")
    taken = [name for name, command in before.items() if commands.get(name) is not command]
    if taken:
        raise PluginError(f"redefines the command {', '.join(taken)}")
    for name, command in commands.items():
        if not _is_name(name) or not isinstance(command, click.Command):
            raise PluginError(f"adds {_short(command)} as {_short(name)}, expected a click.Command with a name")


def _check_hooks(manager: pluggy.PluginManager, target: object) -> None:
    callers = manager.get_hookcallers(target) or []
    for caller in callers:
        for impl in caller.get_hookimpls():
            if not caller.has_spec() and not impl.optionalhook:
                close = difflib.get_close_matches(caller.name, HOOKS, 1)
                hint = f"; did you mean {close[0]}?" if close else "."
                raise PluginError(f"implements {caller.name}, which is not a hook{hint} Hooks: {', '.join(HOOKS)}")
            if impl.kwargnames:  # pluggy would pass the default and never the value
                raise PluginError(f"{caller.name} gives {impl.kwargnames[0]} a default; hook arguments must have none")
    implemented = {caller.name for caller in callers}
    undecorated = [name for name in HOOKS if hasattr(target, name) and name not in implemented]
    if undecorated:
        raise PluginError(f"{undecorated[0]} is not decorated with polyhead.hookimpl, so it would never be called")
    if not callers:
        raise PluginError(f"implements no hook. Hooks: {', '.join(HOOKS)}")


def _returned(manager: pluggy.PluginManager, hook: str) -> list[Any]:
    items: list[Any] = []
    caller: pluggy.HookCaller = getattr(manager.hook, hook)
    for impl in caller.get_hookimpls():
        value = impl.function()  # not caller(): pluggy drops a None without a word
        if isinstance(value, str | bytes) or not isinstance(value, Sequence):
            raise PluginError(f"{hook} returned {_short(value)}, expected a list")
        items += value
    return items


def _check_architecture(architecture: Any) -> None:
    label = f"architecture {getattr(architecture, 'name', None) or type(architecture).__name__}"
    if isinstance(architecture, type):
        raise PluginError(f"{label} is a class; return an instance of it, {architecture.__name__}()")
    # First, because another version of the contract may ask for other fields.
    version = getattr(architecture, "api_version", None)
    if hasattr(architecture, "api_version") and type(version) is not int:
        raise PluginError(f"{label}: api_version is {_short(version)}, expected an integer, now {API_VERSION}")
    if version is not None and version not in SUPPORTED_API_VERSIONS:
        supported = ", ".join(map(str, SUPPORTED_API_VERSIONS))
        raise PluginError(
            f"{label} was written for plugin API version {version!r}; "
            f"this polyhead supports {supported}. Upgrade the plugin or polyhead"
        )
    missing = [name for name in ("name", "gguf_names", "api_version") if not hasattr(architecture, name)]
    missing += [f"{name}()" for name in ("decoder", "block") if not callable(getattr(architecture, name, None))]
    if missing:
        raise PluginError(f"{label} lacks {', '.join(missing)}")
    name, names = architecture.name, architecture.gguf_names
    if not _is_name(name):
        raise PluginError(f"{label}: name is {_short(name)}, expected a string that can be typed")
    if not isinstance(names, list | tuple) or not names or not all(map(_is_name, names)):
        raise PluginError(f"{label}: gguf_names is {_short(names)}, expected a tuple of strings that can be typed")
    accepts = getattr(architecture, "accepts", None)
    if accepts is not None and not callable(accepts):
        raise PluginError(f"{label}: accepts is {_short(accepts)}, expected a method")


def _is_name(value: object) -> bool:
    """Lists and messages show it on one line, and users type it."""
    return isinstance(value, str) and value.isprintable() and value.strip() == value != ""


def _check_module_kind(kind: Any) -> None:
    if not isinstance(kind, ModuleKind):
        raise PluginError(f"polyhead_register_modules returned {_short(kind)} in its list, expected ModuleKind")
    spec: Any = kind.spec
    if not isinstance(spec, type) or not issubclass(spec, Module) or spec is Module:
        raise PluginError(f"ModuleKind: spec is {_short(spec)}, expected a subclass of polyhead.arch.Module")
    if not callable(kind.cpu):
        raise PluginError(f"ModuleKind for {spec.__name__}: cpu is {_short(kind.cpu)}, expected a callable")
    if kind.cuda is not None and not callable(kind.cuda):
        raise PluginError(f"ModuleKind for {spec.__name__}: cuda is {_short(kind.cuda)}, expected a callable or None")


def _check_no_repeats(noun: str, names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise PluginError(f"registers the {noun} {', '.join(repeated)} twice")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
