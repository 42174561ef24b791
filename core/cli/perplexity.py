"""``polyhead perplexity``: how well a model predicts a text."""

from __future__ import annotations

import dataclasses

import click

from .console import Console, pass_console, table, verbosity
from .loading import load_settings, look_for_model, open_llm
from .options import json_option, settings, source_argument
from .prompts import read_text


@click.command("perplexity")
@source_argument
@click.argument("file", metavar="FILE|-")
@click.option("--context", type=click.IntRange(min=2), metavar="N", help="Tokens of a window. Default 512.")
@click.option(
    "--stride", type=click.IntRange(min=1), metavar="N", help="How far windows advance. Default half a window."
)
@json_option
@settings(sampling=False)
@verbosity
@pass_console
def command(
    console: Console,
    source: str,
    file: str,
    context: int | None,
    stride: int | None,
    as_json: bool,
    overrides: list[str],
) -> None:
    """Measure how well a model predicts the text in FILE: the lower, the better.

    The text is read in overlapping windows; every token is scored once. Where the model was trained with a BOS token,
    each window begins with it; the result says so. Compare only results of equal context, stride and tokenizer.
    """
    from ..bench import perplexity

    if context is not None:
        overrides = [*overrides, f"runtime.context={context}"]
    loaded = load_settings(console, source, overrides)
    look_for_model(loaded)
    text = read_text(file, strip=False)
    with open_llm(console, loaded) as llm, console.counting("polyhead: predicting") as tick:
        found = perplexity(llm, text, context=context, stride=stride, tick=tick)
    if as_json:
        console.json(dataclasses.asdict(found))
        return
    rate = found.tokens / found.seconds if found.seconds else 0.0
    begins = (
        "every window begins with BOS"
        if found.bos
        else "no BOS (the model has none by default); the first token is not scored"
    )
    console.result(
        table(
            [
                ("perplexity", f"{found.perplexity:.4f}"),
                ("mean NLL", f"{found.nll:.6f} ± {found.error:.6f} nats per token"),
                ("tokens", f"{found.tokens:,} scored of {found.text_tokens:,}; {begins}"),
                ("windows", f"{found.windows:,} of up to {found.context:,} tokens, stride {found.stride:,}"),
                ("speed", f"{rate:,.1f} tok/s scored, {found.seconds:.2f} s"),
            ]
        )
    )
