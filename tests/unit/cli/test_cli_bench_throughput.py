"""polyhead bench throughput on tiny models: its arithmetic, what it notes of the loop, its output, what it refuses."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from polyhead import LLM
from polyhead.bench import Case, Limits
from polyhead.bench.requests import Load, Span
from polyhead.bench.serving import percentiles, serve
from polyhead.bench.static import StaticCase, StaticResult, measure_static, static_cases
from polyhead.bench.watch import Watched
from polyhead.errors import CapacityError, RequestError

Invoke = Callable[..., Result]
CPU = ("--device", "cpu")


@pytest.fixture
def llm(llama: str):
    settings = {"model": llama, "device": "cpu"}
    settings["runtime"] = {"max_batch": 8, "block_size": 4, "max_tokens_per_step": 24, "context": 64}
    with LLM(settings) as llm:
        yield llm


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_requests_depend_on_the_seed_alone_and_arrivals_scale_with_the_rate(count, low, more, seed):
    load = Load(count, Span(low, low + more), Span(2, 5), seed=seed, shared=low // 2)
    once, slow, fast = load.planned(97), load.planned(97, 2.0), load.planned(97, 8.0)
    assert [each.prompt for each in once] == [each.prompt for each in slow] == [each.prompt for each in fast]
    assert all(low <= len(each.prompt) <= low + more and 2 <= each.output <= 5 for each in once)
    assert len({each.prompt[: low // 2] for each in once}) == 1
    assert {each.arrival for each in once} == {0.0}
    arrivals = [each.arrival for each in slow]
    assert arrivals == sorted(arrivals)
    assert arrivals == pytest.approx([4 * each.arrival for each in fast])


def test_requests_arrive_as_often_as_the_rate_says():
    gaps = np.diff([each.arrival for each in Load(20_000, Span(1, 1), Span(1, 1)).planned(97, 50.0)])
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # of an exponential distribution both are alike


@pytest.mark.parametrize("text", ["", "a", "5:4", "0:3", "1:2:3", "-1", "1:9999999"])
def test_impossible_spans_are_refused(text):
    with pytest.raises(RequestError, match="--input"):
        Span.of(text, "--input")


def test_limits_of_a_static_batch_are_the_tighter_of_memory_and_arithmetic():
    result = StaticResult(StaticCase(4, 10, 5), (1.0, 2.0, 4.0), (0.5, 0.25, 1.0), 100.0, 400.0, 800.0, 0.0)
    assert result.decode_rate == 4 * 5 / 0.5
    assert result.decode_spread == (4 * 5 / 0.25 - 4 * 5 / 1.0) / 2
    assert result.prefill_rate == 4 * 10 / 2.0
    assert result.whole_rate == 4 * 5 / 2.25
    assert result.decode_limit(Limits(10.0, 100.0, "")) == (4 * 5 / 10.0, "memory")
    assert result.decode_limit(Limits(1000.0, 100.0, "")) == (4 * 5 / 4.0, "arithmetic")
    assert result.prefill_limit(Limits(10.0, 100.0, "")) == 4 * 10 / 8.0


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_every_sequence_of_a_static_batch_decodes_in_every_counted_step(llm, batch, monkeypatch):
    """Prompts are longer than a step, so the first sequences decode while the others are prefilled."""
    case = StaticCase(batch, 20, 6)
    sizes = []
    model = llm._generation.model
    real = model.submit

    def counting(step, *args, **kwargs):
        sizes.append((len(step.tokens), len(step.logit_rows)))
        return real(step, *args, **kwargs)

    monkeypatch.setattr(model, "submit", counting)
    (result,) = measure_static(model, llm.tokenizer, [case], repeats=2)
    assert len(result.decode_seconds) == len(result.prefill_seconds) == 2
    runs = [sizes[at : at + len(sizes) // 3] for at in range(0, len(sizes), len(sizes) // 3)]
    assert runs[0] == runs[1] == runs[2]  # and the prompts of the second were not found in the cache
    assert runs[0][-6:] == [(batch, batch)] * 6
    assert sum(tokens for tokens, _ in runs[0]) >= batch * (20 + 6)
    assert case.longest(24) <= case.needs(24, 4).context


def test_static_batches_that_do_not_fit_are_refused_with_the_number(llm):
    model = llm._generation.model
    for case, words in (
        (StaticCase(9, 4, 4), "9 sequences"),
        (StaticCase(2, 40, 30), "need a context of"),
    ):
        with pytest.raises(RequestError, match=words):
            measure_static(model, None, [case])
    with pytest.raises(RequestError, match="batch"):
        static_cases([0], 4, 4)


def with_blocks(model, blocks: int) -> Watched:
    """The model, with fewer KV blocks than it has."""
    watched = Watched(model)
    plan = {name: getattr(model.plan, name) for name in model.plan.__slots__}
    watched.plan = SimpleNamespace(**plan | {"num_blocks": blocks})
    return watched


def test_a_cache_that_is_too_small_is_refused(llm):
    with pytest.raises(CapacityError, match="KV blocks"):
        measure_static(with_blocks(llm._generation.model, 20), None, [StaticCase(4, 20, 4)])


def test_serving_counts_tokens_gaps_hits_and_preemptions(llm):
    load = Load(30, Span(12, 20), Span(1, 30), seed=4, shared=8)
    planned = load.planned(97)
    run = serve(llm._generation.model, llm.tokenizer, planned)
    assert run.input_tokens == sum(len(each.prompt) for each in planned)
    assert run.output_tokens == sum(each.output for each in planned)
    assert len(run.first) == len(run.whole) == 30
    assert len(run.gaps) == run.output_tokens - 30
    assert sum(moment.tokens for moment in run.moments) == run.output_tokens
    assert run.output_rate == run.output_tokens / run.seconds
    assert run.cached_tokens >= 8 * (30 - 8)  # at the least all that came after the first batch
    assert max(run.whole) <= run.seconds
    assert 0 < run.kv_mean <= run.kv_max <= 1
    assert len(run.host) == len(run.moments) == len(run.notes.submits)
    low, high = run.idle
    assert 0 < low <= high < 1
    assert run.waited == 0
    without = serve(llm._generation.model, None, planned, prefix_cache=False)
    assert (without.cached_tokens, without.output_tokens) == (0, run.output_tokens)


def test_preemptions_are_counted(llm):
    small = with_blocks(llm._generation.model, 20)
    run = serve(small, None, Load(12, Span(8, 8), Span(40, 40)).planned(97), prefix_cache=False)
    assert run.preemptions > 0
    assert run.output_tokens == 12 * 40
    assert run.kv_max > 0.8


def test_requests_are_not_served_before_they_arrive(llm):
    load = Load(12, Span(4, 8), Span(2, 4), seed=2)
    planned = load.planned(97, 60.0)
    run = serve(llm._generation.model, llm.tokenizer, planned, rate=60.0)
    assert run.seconds >= planned[-1].arrival
    assert run.waited > 0
    assert all(value > 0 for value in run.first)
    assert run.idle[1] < 1


def test_a_request_beyond_the_context_is_refused(llm):
    with pytest.raises(RequestError, match="90 tokens"):
        serve(llm._generation.model, None, Load(1, Span(60, 60), Span(30, 30)).planned(97))


class Device:
    """A device whose steps take 10 units each, with a clock that both sides share; ``ahead``: it takes two at once."""

    decoder = plan = None
    runs_ahead = True

    def __init__(self):
        self.now = 0.0
        self.free_at = 0.0

    def submit(self, batch, rows, after=None):
        self.free_at = ends = max(self.now, self.free_at) + 10

        class Pending:
            @property
            def done(this):
                return SimpleNamespace(is_done=self.now >= ends)

            def result(this):
                self.now = max(self.now, ends)
                return []

        return Pending()


def test_gaps_with_nothing_under_way_count_as_idle():
    device = Device()
    watched = Watched(device, clock=lambda: device.now)
    watched.resume()
    for pause in (3, 4, 0):
        device.now += pause
        watched.submit(None, []).result()
    assert (watched.notes.empty, watched.notes.perhaps, watched.notes.late) == (7, 7, 3)
    assert watched.notes.waits == [10, 10, 10]
    watched.pause()
    device.now += 100  # no request was there
    watched.resume()
    device.now += 1
    watched.submit(None, []).result()
    assert (watched.notes.empty, watched.notes.perhaps) == (8, 8)


def test_a_step_handed_over_in_time_leaves_no_gap_and_a_late_one_is_bounded():
    device = Device()
    watched = Watched(device, clock=lambda: device.now)
    watched.resume()
    under_way = watched.submit(None, [])
    for work in (2, 2, 2):  # the host is quicker than the device
        following = watched.submit(None, [], under_way)
        under_way.result()
        device.now += work
        under_way = following
    assert (watched.notes.empty, watched.notes.perhaps, watched.notes.late) == (0, 0, 1)
    device.now += 20  # the step under way ended 12 units ago
    following = watched.submit(None, [], under_way)
    under_way.result()
    following.result()
    assert watched.notes.empty == 0
    assert watched.notes.late == 2
    assert watched.notes.perhaps == 22  # the device was last seen busy when the step before gave its tokens
    assert watched.notes.perhaps >= 12


def test_percentiles_are_interpolated_and_absent_without_values():
    assert percentiles([0.0, 1.0]) == pytest.approx({"p50": 0.5, "p95": 0.95, "p99": 0.99})
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}


def test_json_has_static_batches_and_runs(invoke: Invoke, llama: str) -> None:
    args = ("-b", "2,3", "-p", "9", "-n", "4", "-r", "2", "--requests", "7", "--rate", "200,400")
    args = (*args, "--input", "3:9", "--output", "2:4", "--no-warm-up", "-o", "json", *CPU)
    result = invoke("bench", "throughput", llama, *args)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [each["batch"] for each in found["static"]] == [2, 3]
    for each in found["static"]:
        assert each["decode_tokens_per_second"] == pytest.approx(each["batch"] * 4 / np.median(each["decode_seconds"]))
        assert each["decode_share_of_limit"] == pytest.approx(each["decode_tokens_per_second"] / each["decode_limit"])
        assert each["host_microseconds_per_step"] > 0
    assert [run["rate"] for run in found["runs"]] == [200, 400]
    for run in found["runs"]:
        assert run["requests"] == 7
        assert run["time_to_first_token_seconds"]["p50"] <= run["time_to_first_token_seconds"]["p99"]
        assert run["device_idle_between_steps"]["at_least"] <= run["device_idle_between_steps"]["at_most"]
    assert found["load"]["inputs"] == {"low": 3, "high": 9}


def test_guesses_take_part_where_requests_are_served_and_are_reported(invoke: Invoke, llama: str) -> None:
    spec = ("--set", "runtime.speculation={max_tokens: 3, ngram_max: 1, ngram_min: 1}")
    load = ("--requests", "6", "--input", "4:20", "--output", "20:40", "--device", "cpu")
    args = ("bench", "throughput", llama, *load, "-b", "2", "-p", "8", "-n", "4", "-r", "1")
    (plain,), (run,) = (json.loads(invoke(*args, "-o", "json", *more).stdout)["runs"] for more in ((), spec))
    assert plain["drafted_tokens"] == 0
    assert run["drafted_tokens"] >= run["accepted_tokens"] > 0
    assert run["output_tokens"] == plain["output_tokens"]
    told = invoke(*args, *spec)
    assert "guessed tokens that were right" in told.stdout
    assert "measured without runtime.speculation" in told.stderr


def test_markdown_has_a_row_for_every_batch_and_a_column_for_every_run(invoke: Invoke, llama: str) -> None:
    args = ("--requests", "5", "--input", "4", "--output", "3:5", "--no-warm-up", "-b", "1,2", "-p", "4", "-n", "3")
    result = invoke("bench", "throughput", llama, *args, "-r", "1", *CPU)
    assert result.exit_code == 0, result.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in result.stdout.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:4]] == ["1 x (4 + 3)", "2 x (4 + 3)"]
    assert rows[4][1:] == ["all at once"]
    names = [row[0] for row in rows]
    for part in ("time to first token, ms (p50 / p95 / p99)", "preemptions", "KV cache in use, mean / max"):
        assert part in names
    assert "static batch" not in invoke("bench", "throughput", llama, *args[:7], *CPU).stdout


def test_a_shape_needs_no_file_and_no_tokenizer(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyhead.bench import shapes

    tiny = shapes.Shape("tiny", "llama", 2, 32, 4, 2, 8, 64, 97, 128, tied=True)
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    args = ("--shape", "tiny", "--quant", "F32,F16", "-b", "2", "-p", "8", "-n", "2", "-r", "1", "-o", "json", *CPU)
    found = json.loads(invoke("bench", "throughput", *args).stdout)
    assert [each["model"] for each in found] == ["tiny with random F32 weights", "tiny with random F16 weights"]


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("-b", "x"), "'x'"),
        (("-b", "0"), "batch"),
        (("-b", "2", "-p", "60", "-n", "10"), "Lower -p or -n"),
        (("-b", "2", "-p", "4", "-n", "2", "-r", "0"), "from 1 to 1,000,000, got 0"),
        (("-b", " "), "' '"),
        (("-b", ""), "''"),
        (("--rate", ""), "--rate"),
        (("--requests", "2", "--input", "60:60", "--output", "5:5"), "Lower --input or --output"),
        (("--requests", "0"), "requests"),
        (("--rate", "0"), "above 0"),
        (("--rate", "nan"), "above 0"),
        (("--requests", "2", "--input", "40", "--output", "40"), "made for 64"),
        (("--requests", "2", "--input", "4:2"), "--input"),
        (("--requests", "2", "--input", "4", "--shared", "5"), "shared"),
        (("--plot", "picture.txt"), ".png"),
        (("--plot", "no/such/picture.png"), "cannot be written"),
        (("--plot", 300 * "x" + ".png"), "cannot be written"),
        (("--shape", "tiny"), "not both"),
        (("-b", "2", "--input", "4"), "--input is for requests"),
        (("-b", "2", "--seed", "1"), "--seed is for requests"),
        (("--requests", "2", "-p", "4"), "-p is for static batches"),
        (("--rate", "2", "-r", "1"), "-r is for static batches"),
    ],
)
def test_what_cannot_be_measured_is_refused(invoke: Invoke, llama: str, args: tuple[str, ...], word: str) -> None:
    short = ("--output", "4") if "--requests" in args or "--rate" in args else ()
    result = invoke("bench", "throughput", llama, *short, *args, *CPU)
    assert result.exit_code == 2, result.stdout
    assert word in result.stderr
    assert "Traceback" not in result.stderr


def test_requests_run_as_many_at_once_as_configured_whatever_the_static_batches(invoke: Invoke, llama: str) -> None:
    lengths = ("--requests", "6", "--input", "4", "--output", "4", "--no-warm-up", "-o", "json", *CPU)
    static = ("-b", "5", "-p", "4", "-n", "2", "-r", "1")
    steps = {}
    for batch in ("1", "6"):
        found = invoke("bench", "throughput", llama, *static, *lengths, "--set", f"runtime.max_batch={batch}")
        assert found.exit_code == 0, found.stderr
        assert ("5 sequences" in found.stderr) == (batch == "1")
        steps[batch] = json.loads(found.stdout)["runs"][0]["steps"]
    assert steps["1"] >= 6 * 4 > steps["6"]


def test_a_batch_of_one_may_fill_the_context(invoke: Invoke, llama: str) -> None:
    for block in ("16", "1024"):
        args = ("-b", "1", "-p", "59", "-n", "2", "-r", "1", "--set", f"runtime.block_size={block}", *CPU)
        found = invoke("bench", "throughput", llama, *args)
        assert found.exit_code == 0, found.stderr


def test_loads_that_never_end_or_fill_the_memory_are_refused() -> None:
    short = Span(4, 60)
    Load(1_000_000, Span(1, 33), short).check()
    with pytest.raises(RequestError, match="60,000,000; at most 33,554,432"):
        Load(1_000_000, short, short).check()
    Load(86_400, short, short, rates=[1.0]).check()
    with pytest.raises(RequestError, match="at 1e-09 a second arrive for 555,556 hours; at most 24"):
        Load(2, short, short, rates=[5.0, 1e-9]).check()


def test_shapes_are_listed_as_bench_lists_them(invoke: Invoke) -> None:
    found = invoke("bench", "throughput", "--shape", "?")
    assert found.exit_code == 0
    assert found.stdout == invoke("bench", "--shape", "?").stdout


def test_a_plot_without_matplotlib_says_how_to_get_it(invoke: Invoke, llama: str, tmp_path, monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    result = invoke("bench", "throughput", llama, "--plot", str(tmp_path / "x.png"), *CPU)
    assert result.exit_code == 2
    assert "pip install 'polyhead[docs]'" in result.stderr


def test_a_plot_is_drawn(invoke: Invoke, llama: str, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "x.png"
    args = ("-b", "1,2", "-p", "4", "-n", "3", "-r", "1", "--rate", "400", "--requests", "5", "--input", "4")
    result = invoke("bench", "throughput", llama, *args, "--output", "3", "--plot", str(picture), *CPU)
    assert result.exit_code == 0, result.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bench_itself_is_as_before(invoke: Invoke, llama: str) -> None:
    assert "throughput" in invoke("bench", "--help").stdout
    assert "--requests" in invoke("bench", "throughput", "--help").stdout
    assert Case("tg", 4, 2, 3).label == "tg4 @ d2 x3"
