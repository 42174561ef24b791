"""Arguments and options that several commands share. Settings become ``key=value`` overrides of the configuration."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

source_argument = click.argument("source", metavar="CONFIG|MODEL")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")

# option -> (its flags, the setting it writes, help)
_DEVICE = {"device": (("--device",), "device", "auto, cpu, cuda or cuda:N.")}
_SAMPLING = {
    "max_tokens": (("-n", "--max-tokens"), "sampling.max_tokens", "Most tokens to generate."),
    "temperature": (("--temperature",), "sampling.temperature", "0 takes the likeliest token; above, more variety."),
    "top_p": (("--top-p",), "sampling.top_p", "Keep the likeliest tokens up to this probability sum."),
    "seed": (("--seed",), "sampling.seed", "Same seed, same output."),
}


_MOST_REPETITIONS = 1_000_000


def check_repetitions(number: int) -> None:
    """Raises BadParameter for a number of runs that cannot be."""
    if not 1 <= number <= _MOST_REPETITIONS:
        raise click.BadParameter(f"must be from 1 to {_MOST_REPETITIONS:,}, got {number:,}", param_hint="-r")


def settings(*, sampling: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds ``--set`` and shorthands for settings; the command receives them as ``overrides``, a list of ``key=value``.

    Values stay text: the configuration's schema is the one place that checks them.
    """
    shorthands = {**_DEVICE, **_SAMPLING} if sampling else _DEVICE

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, assignments: tuple[str, ...], **kwargs: Any) -> Any:
            overrides = list(assignments)
            for name, (_, key, _) in shorthands.items():
                value = kwargs.pop(name)
                if value is not None:
                    overrides.append(f"{key}={value}")
            return function(*args, overrides=overrides, **kwargs)

        decorated: Callable[..., Any] = wrapper
        for name, (flags, key, text) in reversed(shorthands.items()):
            metavar = key.rpartition(".")[2].upper()
            decorated = click.option(*flags, name, metavar=metavar, help=f"{text} Short for --set {key}=…")(decorated)
        return click.option(
            "--set",
            "assignments",
            multiple=True,
            metavar="KEY=VALUE",
            help="Change a setting, as in runtime.context=2048. May be repeated.",
        )(decorated)

    return decorate
