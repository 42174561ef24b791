"""``polyhead bench``: speed, memory, and how near they are to what this machine can do."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from . import facts
from .console import Console, pass_console, verbosity
from .loading import load_settings
from .options import check_repetitions, settings

if TYPE_CHECKING:
    from ..bench import Limits, Report, Result
    from .subject import Subject


_LENGTHS = "-p, -n or -d"


class _Bench(click.Command):
    """The command, and ``bench throughput``, which stands where a model's name would."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] == ["throughput"]:
            from .bench_throughput import command as throughput

            return throughput.make_context(f"{info_name} throughput", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


@click.command("bench", cls=_Bench)
@click.argument("source", metavar="[CONFIG|MODEL]", required=False)
@click.option(
    "--shape", metavar="NAME[:QUANT]", help="Random weights of a known shape instead of a file; ? lists them."
)
@click.option("--quant", metavar="Q[,Q]", help="With --shape: the quantisations to measure, one after the other.")
@click.option("-p", "--prompt-tokens", default=512, show_default=True, help="Prompt tokens of the pp test; 0: none.")
@click.option("-n", "--gen-tokens", default=128, show_default=True, help="Generated tokens of the tg test; 0: none.")
@click.option("-d", "--depth", default=0, show_default=True, help="Tokens of context before each test.")
@click.option("-b", "--batch", default="1", show_default=True, metavar="N[,N]", help="Sequences at once.")
@click.option("-r", "--repetitions", default=5, show_default=True, help="Runs of each test; the median counts.")
@click.option("-o", "--output", type=click.Choice(["md", "json"]), default="md", show_default=True, help="Form.")
@settings(sampling=False)
@verbosity
@pass_console
def command(
    console: Console,
    source: str | None,
    shape: str | None,
    quant: str | None,
    prompt_tokens: int,
    gen_tokens: int,
    depth: int,
    batch: str,
    repetitions: int,
    output: str,
    overrides: list[str],
) -> None:
    """Measure speed and memory of a model.

    pp512 takes in a prompt of 512 tokens, tg128 generates 128 tokens one by one, sampling included; "@ d1024" means
    after 1024 tokens of context, "x8" for eight sequences at once (tokens of all are counted). Prompts are random, the
    same every time. Prefill is compared with the device's rate of matrix products, decode with how fast it
    reads memory; both are measured in the same run. Close other programs first.

    polyhead bench throughput measures many sequences at once: static batches, and requests that arrive.
    """
    from ..bench import cases, measure, measure_limits
    from .subject import open_model, open_shape, say_batch, shape_list, shape_names

    if shape == "?":
        console.result(shape_list())
        return
    shapes = shape_names(source, shape, quant)
    tests = cases(prompt_tokens, gen_tokens, depth, _numbers(batch))
    check_repetitions(repetitions)
    # A shape needs no model, yet its other settings are checked like those of one.
    loaded = load_settings(console, source if source is not None else "shape.gguf", overrides)
    if loaded.config.runtime.speculation is not None:
        console.note(
            "polyhead: measured without runtime.speculation: every step is a token for each. "
            "polyhead bench throughput --requests N measures with it"
        )
    say_batch(console, tests, loaded.config)
    limits: Limits | None = None
    found = []
    for name in shapes:
        with ExitStack() as stack:
            with console.loading() as progress:
                if name is not None:
                    subject = open_shape(stack, loaded.config, name, tests, progress, _LENGTHS)
                else:
                    subject = open_model(stack, loaded.config, tests, progress, _LENGTHS)
            with console.counting("polyhead: measuring") as tick:
                report = measure(subject.runtime, tests, repeats=repetitions, tick=tick)
        # Afterwards, so that its arrays do not count as the model's peak memory.
        limits = limits or measure_limits(subject.device)
        found.append(_Outcome(subject, report, limits))
        if output == "md":
            console.result(found[-1].as_markdown() + ("\n" if name != shapes[-1] else ""))
    if output == "json":
        console.json([outcome.as_dict() for outcome in found] if quant is not None else found[0].as_dict())


@dataclass(frozen=True)
class _Outcome:
    """What was found, as Markdown or as data."""

    subject: Subject
    report: Report
    limits: Limits

    def as_dict(self) -> dict[str, Any]:
        subject = self.subject
        return {
            "polyhead": __version__,
            "model": subject.name,
            "architecture": subject.architecture,
            "parameters": facts.parameters(subject.tensors),
            "stored_bytes": sum(info.nbytes for info in subject.tensors),
            "device": subject.note,
            "load_seconds": subject.load_seconds,
            "peak_bytes": self.report.peak_bytes,
            "weight_bytes_per_step": round(self.report.weight_bytes_per_step),
            "kv_bytes_per_token": self.subject.runtime.plan.kv_bytes_per_token,
            "limits": asdict(self.limits),
            "tests": [self._test(result) for result in self.report.results],
        }

    def _test(self, result: Result) -> dict[str, Any]:
        return {
            "test": result.case.label,
            **asdict(result.case),
            "tokens_per_second": result.rate,
            "spread": result.spread,
            "seconds": list(result.seconds),
            ("read_bytes_per_second" if result.case.kind == "tg" else "flops_per_second"): result.reached,
            "share_of_limit": result.share(self.limits),
        }

    def as_markdown(self) -> str:
        subject = self.subject
        size = sum(info.nbytes for info in subject.tensors)
        lines = [
            f"- model: {subject.name}, {facts.count_text(facts.parameters(subject.tensors))} parameters in "
            f"{size / 1e6:,.1f} MB ({facts.mix_text(facts.type_mix(subject.tensors))}), {subject.architecture}",
            f"- device: {subject.note}; loaded in {subject.load_seconds:.2f} s; "
            f"peak memory {self.report.peak_bytes / 1e6:,.0f} MB",
            f"- read per decode step: {self.report.weight_bytes_per_step / 1e6:,.1f} MB of weights, and "
            f"{self.subject.runtime.plan.kv_bytes_per_token:,} bytes of KV cache per token of context",
        ]
        lines.append(
            f"- limits of this machine: {self.limits.read_bytes / 1e9:.1f} GB/s read, "
            f"{self.limits.flops / 1e9:,.0f} GFLOP/s {self.limits.dtype} ({self.limits.remark})"
        )
        rows = [("test", "tok/s", "±", "reached", "of the limit"), ("---", "---:", "---:", "---:", "---:")]
        rows += [self._row(result) for result in self.report.results]
        wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        cells = (" | ".join(cell.ljust(wide[at]) for at, cell in enumerate(row)) for row in rows)
        return "\n".join((*lines, "", *(f"| {line} |" for line in cells)))

    def _row(self, result: Result) -> tuple[str, str, str, str, str]:
        unit = "GB/s" if result.case.kind == "tg" else "GFLOP/s"
        return (
            result.case.label,
            f"{result.rate:,.2f}",
            f"{result.spread:,.2f}",
            f"{result.reached / 1e9:,.1f} {unit}",
            f"{100 * result.share(self.limits):.0f} %",
        )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers such as 1,8", param_hint="-b") from None
