"""Discovery of plugins, each in isolation, and the registry that answers which architecture runs a model.

A broken plugin never takes the others down: it is listed as FAILED with its reason, and becomes an error only when it
is the one needed.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata as importlib_metadata
from typing import TYPE_CHECKING, Any

import pluggy

from . import hookspecs
from .arch import Decoder, Metadata, Module
from .architecture import SUPPORTED_API_VERSIONS, Architecture
from .errors import ConfigError, PluginError, PolyheadError
from .runtime.modules import ModuleKind

if TYPE_CHECKING:
    import click

GROUP = "polyhead"
GUIDE = "docs/plugins.md"


@dataclass
class Plugin:
    """One entry point of the group ``polyhead``: where it comes from, what it provides, or why it failed."""

    name: str
    module: str
    distribution: str
    version: str
    state: str = "ok"  # ok | FAILED | disabled
    reason: str = ""
    architectures: list[Architecture] = field(default_factory=list)
    modules: list[ModuleKind] = field(default_factory=list)
    manager: pluggy.PluginManager | None = None

    @property
    def origin(self) -> str:
        return f"{self.name} ({self.distribution} {self.version})"

    def fail(self, reason: str) -> None:
        self.state, self.reason = "FAILED", reason
        self.architectures, self.modules, self.manager = [], [], None


class Registry:
    """The plugins of this process. Built once by :func:`discover`; never changes afterwards."""

    def __init__(self, plugins: Sequence[Plugin]) -> None:
        self.plugins = tuple(plugins)

    @property
    def failures(self) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.state == "FAILED"]

    def _architectures(self) -> Iterator[tuple[Plugin, Architecture]]:
        for plugin in self.plugins:
            for architecture in plugin.architectures:
                yield plugin, architecture

    def find(self, gguf_name: str, wanted: str | None = None) -> tuple[Plugin, Architecture]:
        """The architecture for a file's ``general.architecture``, or the one a config names if it agrees.

        Raises PluginError when none or several answer.
        """
        if wanted is not None:
            named = [pair for pair in self._architectures() if pair[1].name == wanted]
            if not named:
                raise PluginError(self._unknown_name(wanted))
            found = [pair for pair in named if gguf_name in pair[1].gguf_names]
            if not found:
                _, architecture = named[0]
                raise PluginError(
                    f"the config says architecture: {wanted}, which answers to "
                    f"{', '.join(architecture.gguf_names)}, but the file's general.architecture is {gguf_name!r}"
                )
            advice = f"disable one with plugins.disable: [{found[0][0].name}]"
        else:
            found = [pair for pair in self._architectures() if gguf_name in pair[1].gguf_names]
            if not found:
                raise PluginError(self._unknown_architecture(gguf_name))
            advice = (
                f"say which in the config, such as architecture: {found[0][1].name}, "
                f"or disable one with plugins.disable: [{found[0][0].name}]"
            )
        if len(found) > 1:
            claims = " and ".join(f"{arch.name} of {plugin.origin}" for plugin, arch in found)
            what = f"architecture {wanted}" if wanted else f"general.architecture {gguf_name!r}"
            raise PluginError(f"{what} is claimed by {claims}; {advice}")
        return found[0]

    def decoder(
        self,
        values: Mapping[str, Any],
        tensors: Mapping[str, Sequence[int]],
        *,
        architecture: str | None = None,
        ignore: Collection[str] = (),
    ) -> tuple[Decoder, Plugin, Architecture]:
        """The Decoder for a file with this metadata and these tensor shapes (NumPy order), and who built it.

        ``ignore`` are full metadata keys that the user accepts to leave out of account. Raises PluginError and
        ConfigError.
        """
        name = values.get("general.architecture")
        if not isinstance(name, str):
            raise ConfigError("the file has no metadata key general.architecture, so no plugin can be chosen")
        plugin, arch = self.find(name, architecture)
        meta = Metadata(values, tensors, name, arch.name)
        try:
            decoder = arch.decoder(meta)
        except PolyheadError:
            raise
        except Exception as error:
            raise PluginError(f"plugin {plugin.origin} failed on this file: {type(error).__name__}: {error}") from error
        if not isinstance(decoder, Decoder):
            raise PluginError(f"plugin {plugin.origin}: decoder() returned {type(decoder).__name__}, expected Decoder")
        unread = [key for key in meta.unread() if key not in ignore]
        if unread:
            shown = ", ".join(f"{key} = {values[key]!r:.60}" for key in unread)
            raise ConfigError(
                f"plugin {plugin.origin} does not know the metadata {shown}; the model might run wrongly. "
                f"To run it all the same, set model.ignore_metadata: [{', '.join(unread)}]"
            )
        return decoder, plugin, arch

    def module_kinds(self) -> dict[type[Module], ModuleKind]:
        """The implementation of every registered Module subclass."""
        return {kind.spec: kind for plugin in self.plugins for kind in plugin.modules}

    def register_commands(self, cli: click.Group, warn: Callable[[str], None]) -> None:
        """Lets plugins add commands. One that fails or collides is left out with a warning."""
        for plugin in self.plugins:
            if plugin.manager is None:
                continue
            before = dict(cli.commands)
            try:
                plugin.manager.hook.polyhead_register_commands(cli=cli)
                taken = [name for name, command in before.items() if cli.commands.get(name) is not command]
                problem = f"redefines the command {', '.join(taken)}" if taken else ""
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                cli.commands.clear()
                cli.commands.update(before)
                warn(f"plugin {plugin.origin}: its commands are left out: {problem}")

    def _known(self) -> str:
        lines = [
            f"  {', '.join(arch.gguf_names)}: {arch.name}, plugin {plugin.origin}"
            for plugin, arch in self._architectures()
        ]
        lines += [f"  FAILED: plugin {plugin.origin}: {plugin.reason}" for plugin in self.failures]
        lines += [f"  disabled: plugin {plugin.origin}" for plugin in self.plugins if plugin.state == "disabled"]
        return "\n".join(lines) or "  none"

    def _unknown_architecture(self, gguf_name: str) -> str:
        return (
            f"no plugin answers to general.architecture {gguf_name!r}. Known:\n{self._known()}\n"
            f"A pip package can add it: {GUIDE} shows how"
        )

    def _unknown_name(self, wanted: str) -> str:
        names = [arch.name for _, arch in self._architectures()]
        close = difflib.get_close_matches(wanted, names, 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return f"no plugin provides architecture {wanted!r}.{hint} Known:\n{self._known()}"


def discover(
    disable: Collection[str] = (), entry_points: Iterable[importlib_metadata.EntryPoint] | None = None
) -> Registry:
    """Loads every plugin of the group ``polyhead``, each in isolation.

    ``disable`` holds names of entry points or distributions; a name that matches none is a PluginError.
    ``entry_points`` replaces the installed ones.
    """
    found = importlib_metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    plugins: dict[tuple[str, str, str], Plugin] = {}
    for entry in found:
        plugin = Plugin(
            entry.name,
            entry.value,
            entry.dist.name if entry.dist else "unknown distribution",
            entry.dist.version if entry.dist else "",
        )
        key = (plugin.name, plugin.module, plugin.distribution)
        if key in plugins:  # an editable install may be listed twice
            continue
        plugins[key] = plugin
        if plugin.name in disable or plugin.distribution in disable:
            plugin.state = "disabled"
        else:
            _load(plugin, entry)
    ordered = sorted(plugins.values(), key=lambda plugin: (plugin.distribution != "polyhead", plugin.name))
    known = {plugin.name for plugin in ordered} | {plugin.distribution for plugin in ordered}
    for name in disable:
        if name not in known:
            raise PluginError(
                f"plugins.disable names {name!r}, which is not installed; "
                f"installed: {', '.join(sorted(known)) or 'none'}"
            )
    _refuse_shared_specs(ordered)
    return Registry(ordered)


def _load(plugin: Plugin, entry: importlib_metadata.EntryPoint) -> None:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    try:
        manager.register(entry.load(), plugin.name)
        manager.check_pending()
        architectures = [item for items in manager.hook.polyhead_register_architectures() for item in items]
        modules = [item for items in manager.hook.polyhead_register_modules() for item in items]
        for architecture in architectures:
            _check_architecture(architecture)
        for kind in modules:
            _check_module_kind(kind)
    except pluggy.PluginValidationError as error:
        plugin.fail(_explain_hook(error))
    except PluginError as error:
        plugin.fail(str(error))
    except Exception as error:
        plugin.fail(f"{type(error).__name__}: {error}")
    except SystemExit as error:  # a module that calls sys.exit() at import must not end the command
        plugin.fail(f"called sys.exit({error.code!r}) while it was loaded")
    else:
        plugin.architectures, plugin.modules, plugin.manager = architectures, modules, manager


def _check_architecture(architecture: object) -> None:
    label = getattr(architecture, "name", None) or type(architecture).__name__
    missing = [
        name for name in ("name", "gguf_names", "api_version", "decoder", "block") if not hasattr(architecture, name)
    ]
    if missing or not isinstance(architecture, Architecture):
        raise PluginError(f"architecture {label} lacks {', '.join(missing)}")
    names = architecture.gguf_names
    if not isinstance(architecture.name, str) or not architecture.name:
        raise PluginError(f"architecture {label}: name is {architecture.name!r}, expected a string")
    if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
        raise PluginError(f"architecture {label}: gguf_names is {names!r}, expected a tuple of strings")
    if architecture.api_version not in SUPPORTED_API_VERSIONS:
        supported = ", ".join(map(str, SUPPORTED_API_VERSIONS))
        raise PluginError(
            f"architecture {label} was written for plugin API version {architecture.api_version!r}; "
            f"this polyhead supports {supported}. Upgrade the plugin or polyhead"
        )


def _check_module_kind(kind: object) -> None:
    if not isinstance(kind, ModuleKind):
        raise PluginError(f"polyhead_register_modules returned {type(kind).__name__}, expected ModuleKind")
    if not (isinstance(kind.spec, type) and issubclass(kind.spec, Module)) or not callable(kind.cpu):
        raise PluginError(f"{kind!r}: spec must be a subclass of polyhead.arch.Module and cpu a callable")


def _explain_hook(error: pluggy.PluginValidationError) -> str:
    known = [name for name in vars(hookspecs) if name.startswith("polyhead_")]
    words = str(error).replace("'", " ").split()
    unknown = next((word for word in words if word.startswith("polyhead_") and word not in known), None)
    if unknown is None:
        return " ".join(str(error).split())
    close = difflib.get_close_matches(unknown, known, 1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"implements {unknown}, which is not a hook{hint} Hooks: {', '.join(known)}"


def _refuse_shared_specs(plugins: Sequence[Plugin]) -> None:
    owners: dict[type[Module], Plugin] = {}
    for plugin in plugins:
        for kind in list(plugin.modules):
            first = owners.setdefault(kind.spec, plugin)
            if first is not plugin:
                plugin.fail(f"registers module {kind.spec.__name__}, which {first.origin} registers too")
                break
