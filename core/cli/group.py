"""The group of commands: imports one when it is called, asks plugins for more, turns errors into exit codes."""

from __future__ import annotations

import difflib
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..errors import PolyheadError
from .console import Console, lost_output

if TYPE_CHECKING:
    from ..plugins import Registry


class LazyCommand(click.Command):
    """The name of a command and its line in ``--help``. Its module, of the same name, holds it as ``command``."""

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(name, help=summary, short_help=summary)

    def load(self) -> click.Command:
        """Imports the module."""
        command: click.Command = import_module(f".{self.name}", __package__).command
        return command


class CommandGroup(click.Group):
    """``polyhead``. Plugins are asked for their commands only when one is called that is not built in."""

    _asked_plugins = False

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            self.ask_plugins(ctx.ensure_object(Console))
        command = self.commands.get(cmd_name)
        return command.load() if isinstance(command, LazyCommand) else command

    def ask_plugins(self, console: Console, registry: Registry | None = None) -> list[str]:
        """Lets plugins (those of ``registry``, or all) add their commands, once; the names of all not built in."""
        if not self._asked_plugins:
            from ..plugins import discover

            self._asked_plugins = True
            (registry or discover()).register_commands(self, console.warn)
        return sorted(name for name, command in self.commands.items() if not isinstance(command, LazyCommand))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # In the order of use, not of the alphabet.

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own would load every command to read its first line.
        with formatter.section("Commands"):
            formatter.write_dl([(name, item.get_short_help_str(80)) for name, item in self.commands.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-") and self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name, self.commands, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Commands: {', '.join(self.commands)}."
            ctx.fail(f"there is no command {name!r}.{hint}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        console = ctx.ensure_object(Console)
        try:
            value = super().invoke(ctx)
            # Here, where a closed pipe is still an ordinary error; at the interpreter's end it would print a traceback.
            sys.stdout.flush()
            return value
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except PolyheadError as error:
            # What the user can act on needs no traceback; what failed inside a plugin helps its author.
            self._fail(ctx, console, str(error), 2, error.__cause__)
        except (KeyboardInterrupt, click.Abort):
            ctx.exit(130)
        except (Exception, RecursionError) as error:
            if isinstance(error, OSError) and (lost := lost_output(error)):
                self._fail(ctx, console, lost, 2, error)
            advice = "" if console.verbose else " (run with -v for the traceback)"
            what = " ".join(str(error).split())
            message = f"internal error: {type(error).__name__}{': ' if what else ''}{what}{advice}"
            self._fail(ctx, console, message, 1, error)

    def _fail(
        self, ctx: click.Context, console: Console, message: str, code: int, cause: BaseException | None
    ) -> NoReturn:
        if cause is not None:
            console.detail("".join(traceback.format_exception(cause)).rstrip())
        console.error(message)
        ctx.exit(code)
