"""What ``polyhead bench throughput`` found, as Markdown or as data."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import __version__
from . import facts

if TYPE_CHECKING:
    from ..bench.machine import Limits
    from ..bench.requests import Load
    from ..bench.serving import Served
    from ..bench.static import StaticResult
    from .subject import Subject


@dataclass(frozen=True)
class Outcome:
    """A model's static batches and its runs of requests, beside the limits of the machine."""

    subject: Subject
    statics: Sequence[StaticResult]
    load: Load | None
    runs: Sequence[Served]
    limits: Limits

    def as_dict(self) -> dict[str, Any]:
        subject, plan = self.subject, self.subject.runtime.plan
        return {
            "polyhead": __version__,
            "model": subject.name,
            "architecture": subject.architecture,
            "parameters": facts.parameters(subject.tensors),
            "stored_bytes": sum(info.nbytes for info in subject.tensors),
            "device": subject.note,
            "max_batch": plan.max_batch,
            "max_tokens_per_step": plan.max_tokens,
            "kv_tokens": plan.num_blocks * plan.block_size,
            "limits": dataclasses.asdict(self.limits),
            "static": [self._static(result) for result in self.statics],
            "load": None if self.load is None else dataclasses.asdict(self.load),
            "runs": [self._run(run) for run in self.runs],
        }

    def _static(self, result: StaticResult) -> dict[str, Any]:
        most, bound = result.decode_limit(self.limits)
        return {
            **dataclasses.asdict(result.case),
            "decode_tokens_per_second": result.decode_rate,
            "decode_spread": result.decode_spread,
            "decode_seconds": list(result.decode_seconds),
            "decode_limit": most,
            "decode_bound": bound,
            "decode_share_of_limit": result.decode_rate / most,
            "prefill_tokens_per_second": result.prefill_rate,
            "prefill_seconds": list(result.prefill_seconds),
            "prefill_share_of_limit": result.prefill_rate / result.prefill_limit(self.limits),
            "output_tokens_per_second_with_prefill": result.whole_rate,
            "host_microseconds_per_step": 1e6 * result.host_seconds,
        }

    def _run(self, run: Served) -> dict[str, Any]:
        from ..bench.serving import percentiles

        low, high = run.idle
        return {
            "requests": run.requests,
            "rate": run.rate,
            "seconds": run.seconds,
            "input_tokens": run.input_tokens,
            "output_tokens": run.output_tokens,
            "output_tokens_per_second": run.output_rate,
            "total_tokens_per_second": run.total_rate,
            "requests_per_second": run.requests / run.seconds,
            "time_to_first_token_seconds": percentiles(run.first),
            "inter_token_latency_seconds": percentiles(run.gaps),
            "request_seconds": percentiles(run.whole),
            "steps": len(run.moments),
            "kv_usage_mean": run.kv_mean,
            "kv_usage_max": run.kv_max,
            "preemptions": run.preemptions,
            "cached_tokens": run.cached_tokens,
            "drafted_tokens": run.drafted_tokens,
            "accepted_tokens": run.accepted_tokens,
            "seconds_without_requests": run.waited,
            "device_idle_between_steps": {"at_least": low, "at_most": high},
            "steps_handed_over_late": run.notes.late,
            "host_microseconds_per_step": 1e6 * statistics.median(run.host),
            "submit_microseconds_per_step": 1e6 * statistics.median(run.notes.submits),
        }

    def as_markdown(self) -> str:
        subject, plan = self.subject, self.subject.runtime.plan
        size = sum(info.nbytes for info in subject.tensors)
        lines = [
            f"- model: {subject.name}, {facts.count_text(facts.parameters(subject.tensors))} parameters in "
            f"{size / 1e6:,.1f} MB ({facts.mix_text(facts.type_mix(subject.tensors))}), {subject.architecture}",
            f"- device: {subject.note}; up to {plan.max_batch} sequences and {plan.max_tokens:,} tokens in a step, "
            f"KV cache of {plan.num_blocks * plan.block_size:,} tokens",
            f"- limits of this machine: {self.limits.read_bytes / 1e9:.1f} GB/s read, "
            f"{self.limits.flops / 1e9:,.0f} GFLOP/s {self.limits.dtype} ({self.limits.remark})",
        ]
        if self.statics:
            lines += ["", *_markdown(self._static_rows(), left=1)]
        if self.load is not None:
            load = self.load
            shared = f", the first {load.shared:,} of all the same" if load.shared else ""
            lines += [
                "",
                f"{load.count:,} requests, {load.inputs.low:,} to {load.inputs.high:,} tokens in{shared}, "
                f"{load.outputs.low:,} to {load.outputs.high:,} out, seed {load.seed}:",
                "",
                *_markdown(self._run_rows(), left=1),
            ]
        return "\n".join(lines)

    def _static_rows(self) -> list[list[str]]:
        head = "static batch|decode tok/s|±|limit|by|of it|prefill tok/s|of its limit|both tok/s|host µs a step"
        rows = [head.split("|")]
        for result in self.statics:
            case, (most, bound) = result.case, result.decode_limit(self.limits)
            rows.append([
                f"{case.batch} x ({case.prompt} + {case.generated})",
                f"{result.decode_rate:,.1f}",
                f"{result.decode_spread:,.1f}",
                f"{most:,.0f}",
                bound,
                f"{100 * result.decode_rate / most:.0f} %",
                f"{result.prefill_rate:,.0f}",
                f"{100 * result.prefill_rate / result.prefill_limit(self.limits):.0f} %",
                f"{result.whole_rate:,.1f}",
                f"{1e6 * result.host_seconds:,.0f}",
            ])  # fmt: skip
        return rows

    def _run_rows(self) -> list[list[str]]:
        """A column for each run."""
        rows = [["" if run.rate is None else f"{run.rate:g} requests/s" for run in self.runs]]
        rows[0] = [text or "all at once" for text in rows[0]]
        found = [self._run(run) for run in self.runs]
        names = ["", "output tok/s", "total tok/s", "requests/s", "time to first token, ms (p50 / p95 / p99)"]
        rows.append([f"{each['output_tokens_per_second']:,.1f}" for each in found])
        rows.append([f"{each['total_tokens_per_second']:,.1f}" for each in found])
        rows.append([f"{each['requests_per_second']:,.2f}" for each in found])
        for key, name in (
            ("time_to_first_token_seconds", None),
            ("inter_token_latency_seconds", "between tokens, ms (p50 / p95 / p99)"),
            ("request_seconds", "whole request, ms (p50 / p95 / p99)"),
        ):
            names += [name] if name else []
            rows.append([_milliseconds(each[key]) for each in found])
        names += ["KV cache in use, mean / max", "preemptions", "prompt tokens found in the cache"]
        rows.append([f"{100 * each['kv_usage_mean']:.0f} % / {100 * each['kv_usage_max']:.0f} %" for each in found])
        rows.append([f"{each['preemptions']:,}" for each in found])
        rows.append([
            f"{each['cached_tokens']:,} ({100 * each['cached_tokens'] / each['input_tokens']:.0f} %)" for each in found
        ])  # fmt: skip
        if any(run.drafted_tokens for run in self.runs):
            names += ["guessed tokens that were right"]
            rows.append([
                f"{run.accepted_tokens:,} of {run.drafted_tokens:,} "
                f"({100 * run.accepted_tokens / max(1, run.drafted_tokens):.0f} %)"
                for run in self.runs
            ])  # fmt: skip
        names += ["device idle between steps, at least / at most", "steps handed over late", "host µs a step"]
        rows.append([
            f"{100 * each['device_idle_between_steps']['at_least']:.1f} % / "
            f"{100 * each['device_idle_between_steps']['at_most']:.1f} %"
            for each in found
        ])  # fmt: skip
        rows.append([f"{each['steps_handed_over_late']:,} of {each['steps']:,}" for each in found])
        rows.append([
            f"{each['host_microseconds_per_step']:,.0f} and {each['submit_microseconds_per_step']:,.0f} to hand over"
            for each in found
        ])  # fmt: skip
        return [[name, *cells] for name, cells in zip(names, rows, strict=True)]


def _milliseconds(values: dict[str, float | None]) -> str:
    return " / ".join("–" if value is None else f"{1e3 * value:,.1f}" for value in values.values())


def _markdown(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """A table; the first ``left`` columns are flush left, the others right."""
    rule = ["---" if column < left else "---:" for column in range(len(rows[0]))]
    lines = [rows[0], rule, *rows[1:]]
    wide = [max(len(line[column]) for line in lines) for column in range(len(rule))]
    return [f"| {' | '.join(cell.ljust(wide[at]) for at, cell in enumerate(line))} |" for line in lines]
