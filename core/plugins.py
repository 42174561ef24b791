"""Discovery of plugins, each in isolation, and the registry that answers which architecture runs a model.

A broken plugin never takes the others down: it is listed as FAILED with its reason, logged as a warning, and becomes an
error only when it is the one needed.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata as importlib_metadata
from typing import TYPE_CHECKING, Any

import pluggy

from .arch import Decoder, Metadata, Module
from .architecture import Architecture
from .errors import MissingKeyError, PluginError, PolyheadError, UnknownMetadataError, summary
from .plugin_checks import check_commands, check_modules, read_plugin
from .plugin_loading import aside, contained, load
from .runtime.modules import ModuleKind

if TYPE_CHECKING:
    import click

GROUP = "polyhead"
GUIDE = "docs/plugins/tutorial.md"
_MOST_SHOWN = 10

_log = logging.getLogger("polyhead")


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
        return f"{self.name} ({f'{self.distribution} {self.version}'.strip()})"

    def fail(self, reason: str) -> None:
        """Marks it as FAILED; the reason becomes one line."""
        self.state, self.reason = "FAILED", _short(" ".join(reason.split()), 500)
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

    def find(
        self,
        gguf_name: str,
        wanted: str | None = None,
        accepts: Callable[[Plugin, Architecture], bool] | None = None,
    ) -> tuple[Plugin, Architecture]:
        """The architecture for a file's ``general.architecture``, or the one a config names if it agrees.

        ``accepts`` is asked where several answer to the name. Raises PluginError when none or several are left.
        """
        candidates = [pair for pair in self._architectures() if wanted in (None, pair[1].name)]
        if wanted is not None and not candidates:
            raise PluginError(self._unknown_name(wanted))
        found = [pair for pair in candidates if gguf_name in pair[1].gguf_names]
        if len(found) > 1 and accepts is not None:
            found = [pair for pair in found if accepts(*pair)] or found
        if len(found) == 1:
            return found[0]
        if found:
            raise PluginError(self._ambiguous(gguf_name, found))
        if wanted is None:
            raise PluginError(self._unknown_architecture(gguf_name))
        answers = ", ".join(name for _, architecture in candidates for name in architecture.gguf_names)
        raise PluginError(
            f"the config says architecture: {wanted}, which answers to {answers}, "
            f"but the file's general.architecture is {_short(repr(gguf_name))}"
        )

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
            raise MissingKeyError("the file has no metadata key general.architecture, so no plugin can be chosen")

        def accepts(plugin: Plugin, arch: Architecture) -> bool:
            asked = getattr(arch, "accepts", None)
            with _blaming(plugin):
                return asked is None or bool(asked(Metadata(values, tensors, name, arch.name)))

        plugin, arch = self.find(name, architecture, accepts)
        meta = Metadata(values, tensors, name, arch.name)
        with _blaming(plugin):
            decoder = arch.decoder(meta)
            if not isinstance(decoder, Decoder):
                raise PluginError(f"decoder() returned {type(decoder).__name__}, expected Decoder")
            check_modules(decoder)
            tuple(decoder.tensors())  # a leaf of the wrong type shows here, and not as a crash later
        unread = [key for key in meta.unread() if key not in ignore]
        if unread:
            shown = ", ".join(f"{_short(key)} = {_short(repr(values[key]))}" for key in unread[:_MOST_SHOWN])
            more = f" and {len(unread) - _MOST_SHOWN} more" if len(unread) > _MOST_SHOWN else ""
            problem = f"plugin {plugin.origin} does not know the metadata {shown}{more}; the model might run wrongly"
            advice = f"To run it all the same, set model.ignore_metadata: [{', '.join(unread[:_MOST_SHOWN])}]"
            raise UnknownMetadataError(problem, advice)
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
                with contained("while it added commands"):
                    plugin.manager.hook.polyhead_register_commands(cli=cli)
                    check_commands(before, cli.commands)
            except PolyheadError as error:
                cli.commands = before
                warn(f"plugin {plugin.origin}: its commands are left out: {error}")

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
            f"no plugin answers to general.architecture {_short(repr(gguf_name))}. Known:\n{self._known()}\n"
            f"A pip package can add it: {GUIDE} shows how, and `polyhead plugins new NAME` writes one to begin with"
        )

    def _unknown_name(self, wanted: str) -> str:
        close = difflib.get_close_matches(wanted, [arch.name for _, arch in self._architectures()], 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return f"no plugin provides architecture {wanted!r}.{hint} Known:\n{self._known()}"

    def _ambiguous(self, gguf_name: str, found: Sequence[tuple[Plugin, Architecture]]) -> str:
        claims = " and ".join(f"architecture {arch.name} of plugin {plugin.origin}" for plugin, arch in found)
        names = list(dict.fromkeys(arch.name for _, arch in found))
        choose = f"say which with architecture: {' or '.join(names)}, or " if len(names) == len(found) else ""
        handles = " or ".join(f"plugins.disable: [{self._handle(plugin)}]" for plugin, _ in found)
        return f"general.architecture {gguf_name!r} is claimed by {claims}; {choose}leave one out with {handles}"

    def _handle(self, plugin: Plugin) -> str:
        """What to write in ``plugins.disable`` for this plugin and no namesake."""
        alone = [other.name for other in self.plugins].count(plugin.name) == 1
        return plugin.name if alone else plugin.distribution


def discover(
    disable: Collection[str] = (),
    entry_points: Iterable[importlib_metadata.EntryPoint] | None = None,
    warn: bool = True,
) -> Registry:
    """Loads every plugin of the group ``polyhead``, each in isolation. Logs a warning for each that failed.

    ``disable`` holds names of entry points or distributions; a name that matches none is a PluginError.
    ``entry_points`` replaces the installed ones. ``warn=False`` is for who shows the reasons anyway.
    """
    disabled = {canonical(name) for name in disable}
    plugins: dict[tuple[str, str, str], Plugin] = {}
    for entry in _installed() if entry_points is None else entry_points:
        plugin = Plugin(entry.name, entry.value, *_distribution(entry))
        key = (plugin.name, plugin.module, plugin.distribution)
        if key in plugins:  # an editable install may be listed twice
            continue
        plugins[key] = plugin
        if disabled & {canonical(plugin.name), canonical(plugin.distribution)}:
            plugin.state = "disabled"
        else:
            _load(plugin, entry)
    ordered = sorted(plugins.values(), key=lambda plugin: (plugin.distribution != "polyhead", plugin.name))
    _refuse_unknown(disable, ordered)
    _refuse_shared_specs(ordered)
    for plugin in ordered:
        if warn and plugin.state == "FAILED":
            _log.warning("plugin %s is left out: %s", plugin.origin, plugin.reason)
    return Registry(ordered)


@contextmanager
def _blaming(plugin: Plugin) -> Iterator[None]:
    """Errors of a plugin's own code name it; those it raises on purpose about the file stay as they are."""
    try:
        with aside():
            yield
    except PluginError as error:
        raise PluginError(f"plugin {plugin.origin}: {error}") from error
    except (PolyheadError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise PluginError(f"plugin {plugin.origin} failed on this file: {summary(error)}") from error


def _installed() -> Iterator[importlib_metadata.EntryPoint]:
    try:
        yield from importlib_metadata.entry_points(group=GROUP)
        return
    except Exception as error:  # one distribution with unreadable metadata; the others need not suffer
        _log.warning("an installed package has broken entry points (%s)", summary(error))
    for distribution in importlib_metadata.distributions():
        try:
            yield from [entry for entry in distribution.entry_points if entry.group == GROUP]
        except Exception:
            continue


def _distribution(entry: importlib_metadata.EntryPoint) -> tuple[str, str]:
    try:
        if entry.dist is not None:
            return str(entry.dist.name), str(entry.dist.version)
    except Exception:  # a dist-info folder without METADATA
        pass
    return "unknown distribution", ""


def _load(plugin: Plugin, entry: importlib_metadata.EntryPoint) -> None:
    try:
        with contained("while it was loaded"):
            plugin.manager, plugin.architectures, plugin.modules = read_plugin(load(entry), plugin.name)
    except PolyheadError as error:
        plugin.fail(str(error))
    except KeyboardInterrupt:
        _log.warning("interrupted while plugin %s was loaded", plugin.origin)
        raise


def _refuse_unknown(disable: Collection[str], plugins: Sequence[Plugin]) -> None:
    known = sorted({plugin.name for plugin in plugins} | {plugin.distribution for plugin in plugins})
    by_name = {canonical(name): name for name in known}
    for name in disable:
        if canonical(name) not in by_name:
            close = difflib.get_close_matches(canonical(name), by_name, 1)
            hint = f" Did you mean {by_name[close[0]]}?" if close else ""
            raise PluginError(
                f"plugins.disable names {name!r}, which is not installed.{hint} Installed: {', '.join(known) or 'none'}"
            )


def _refuse_shared_specs(plugins: Sequence[Plugin]) -> None:
    owners: dict[type[Module], Plugin] = {}
    for plugin in plugins:
        for kind in list(plugin.modules):
            first = owners.setdefault(kind.spec, plugin)
            if first is not plugin:
                plugin.fail(f"registers module {kind.spec.__name__}, which {first.origin} registers too")
                break


def canonical(name: str) -> str:
    """To compare by: names are equal whatever their case and whichever of ``-``, ``_`` and ``.`` they use (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
