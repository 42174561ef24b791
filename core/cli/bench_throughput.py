"""``polyhead bench throughput``: many sequences at once, in static batches or as requests that arrive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.core import ParameterSource

from .console import Console, pass_console, verbosity
from .loading import load_settings
from .options import check_repetitions, settings

if TYPE_CHECKING:
    from ..bench.requests import Load
    from ..bench.serving import Served
    from ..config import RuntimeConfig
    from .subject import Subject

Number = TypeVar("Number", int, float)

_BATCHES = "8,32,128"
_REQUESTS = 256


@click.command("throughput")
@click.argument("source", metavar="[CONFIG|MODEL]", required=False)
@click.option(
    "--shape", metavar="NAME[:QUANT]", help="Random weights of a known shape instead of a file; ? lists them."
)
@click.option("--quant", metavar="Q[,Q]", help="With --shape: the quantisations to measure, one after the other.")
@click.option("-b", "--batch", metavar="N[,N]", help=f"Static batches of so many sequences. Default {_BATCHES}.")
@click.option("-p", "--prompt-tokens", default=128, show_default=True, help="Prompt tokens in a static batch.")
@click.option("-n", "--gen-tokens", default=64, show_default=True, help="Generated tokens in a static batch.")
@click.option("-r", "--repetitions", default=5, show_default=True, help="Runs of each static batch; the median counts.")
@click.option(
    "--requests", type=int, metavar="N", help="Requests of mixed lengths, all at once unless --rate is given."
)
@click.option("--rate", metavar="R[,R]", help=f"Requests per second, arriving at random; {_REQUESTS} of them.")
@click.option("--input", "inputs", default="100:1024", show_default=True, metavar="A:B", help="Prompt tokens of each.")
@click.option(
    "--output", "outputs", default="100:1024", show_default=True, metavar="A:B", help="Tokens each generates."
)
@click.option("--shared", default=0, show_default=True, metavar="N", help="Tokens that all prompts begin with.")
@click.option(
    "--seed", default=1, show_default=True, type=click.IntRange(0, 2**32 - 1), help="Of lengths and arrivals."
)
@click.option("--warm-up/--no-warm-up", default=True, show_default=True, help="Run the requests once uncounted first.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw a picture, too (matplotlib).")
@click.option("-o", "--form", type=click.Choice(["md", "json"]), default="md", show_default=True, help="Form.")
@settings(sampling=False)
@verbosity
@pass_console
def command(
    console: Console,
    source: str | None,
    shape: str | None,
    quant: str | None,
    batch: str | None,
    prompt_tokens: int,
    gen_tokens: int,
    repetitions: int,
    requests: int | None,
    rate: str | None,
    inputs: str,
    outputs: str,
    shared: int,
    seed: int,
    warm_up: bool,
    plot: Path | None,
    form: str,
    overrides: list[str],
) -> None:
    """Measure a model with many sequences at once.

    Static batches (-b) take in prompts of -p tokens and generate -n tokens of each, counted as llama.cpp's
    batched-bench does. --requests N serves N requests of random lengths, all there from the start; with --rate they
    arrive at random, R in a second on average. Prompts, lengths and arrivals are the same for the same --seed;
    tokens are chosen greedily and no end token ends a request. Set runtime.max_batch for how many run at once.
    """
    from ..bench.machine import measure_limits
    from ..bench.plot import check_plot, draw
    from ..bench.requests import Load, Span
    from ..bench.static import measure_static, static_cases
    from ..runtime.contract import MAX_TOKENS
    from .bench_tables import Outcome
    from .subject import open_model, open_shape, say_batch, shape_list, shape_names

    if shape == "?":
        console.result(shape_list())
        return
    shapes = shape_names(source, shape, quant)
    check_repetitions(repetitions)
    if plot is not None:
        if len(shapes) > 1:
            raise click.UsageError("--plot shows one model; give one --quant")
        check_plot(plot)
    serves = requests is not None or rate is not None
    batches = _numbers(batch if batch is not None else None if serves else _BATCHES, "-b", int)
    _refuse_unused(static=bool(batches), serves=serves)
    cases = static_cases(batches, prompt_tokens, gen_tokens) if batches else []
    load = None
    if serves:
        rates = _numbers(rate, "--rate", float)
        count = _REQUESTS if requests is None else requests
        load = Load(count, Span.of(inputs, "--input"), Span.of(outputs, "--output"), seed, shared, rates, warm_up)
    loaded = load_settings(console, source if source is not None else "shape.gguf", overrides)
    runtime = loaded.config.runtime
    if cases and runtime.speculation is not None:
        console.note(
            "polyhead: static batches are measured without runtime.speculation: every step is a token for each"
        )
    # In longer steps, which a GPU may take unasked, the same cases need less.
    tests = [case.needs(runtime.max_tokens_per_step or MAX_TOKENS, runtime.block_size) for case in cases]
    if tests:
        say_batch(console, tests, loaded.config)
    if load is not None:
        load.check()
        tests.append(load.needs(runtime.max_batch))
    lower = " or ".join(["-p or -n"] * bool(cases) + ["--input or --output"] * (load is not None))
    limits = None
    found = []
    for name in shapes:
        with ExitStack() as stack:
            with console.loading() as progress:
                if name is not None:
                    subject = open_shape(stack, loaded.config, name, tests, progress, lower)
                else:
                    subject = open_model(stack, loaded.config, tests, progress, lower)
            with console.counting("polyhead: measuring") as tick:
                statics = measure_static(
                    subject.runtime, subject.tokenizer, cases,
                    repeats=repetitions, prefix_cache=runtime.prefix_cache, tick=tick,
                )  # fmt: skip
                runs = [] if load is None else _serve(subject, load, runtime, tick)
        # Afterwards, so that its arrays do not stand beside the model's.
        limits = limits or measure_limits(subject.device)
        found.append(Outcome(subject, statics, load, runs, limits))
        if form == "md":
            console.result(found[-1].as_markdown() + ("\n" if name != shapes[-1] else ""))
        if plot is not None:
            draw(plot, f"{subject.name}, {subject.note}", statics, runs, limits)
            console.note(f"polyhead: wrote {plot}")
    if form == "json":
        console.json([outcome.as_dict() for outcome in found] if quant is not None else found[0].as_dict())


def _serve(subject: Subject, load: Load, runtime: RuntimeConfig, tick: Callable[[int, int, str], None]) -> list[Served]:
    """A run for each rate, or one of all requests at once; that is also the one that is not counted."""
    from ..bench.serving import serve
    from ..llm import speculation_of

    vocab = subject.runtime.decoder.vocab

    def run(rate: float | None) -> Served:
        return serve(
            subject.runtime, subject.tokenizer, load.planned(vocab, rate),
            rate=rate, prefix_cache=runtime.prefix_cache, speculation=speculation_of(runtime),
            max_batch=runtime.max_batch, tick=tick,
        )  # fmt: skip

    if load.warm_up:
        run(None)
    return [run(rate) for rate in load.rates or (None,)]


def _refuse_unused(*, static: bool, serves: bool) -> None:
    """Raises UsageError for an option that was given and that nothing measured here listens to."""
    context = click.get_current_context()
    for names, used, instead in (
        (("prompt_tokens", "gen_tokens", "repetitions"), static, "static batches; give -b N, too"),
        (("inputs", "outputs", "shared", "seed", "warm_up"), serves, "requests; give --requests N or --rate R, too"),
    ):
        for option in () if used else context.command.params:
            if option.name in names and context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"{option.opts[0]} is for {instead}")


def _numbers(text: str | None, option: str, kind: Callable[[str], Number]) -> list[Number]:
    try:
        return [] if text is None else [kind(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of numbers such as 1,8", param_hint=option) from None
