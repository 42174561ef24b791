"""docs/benchmarks/roofline.py: every row of the committed results is a marker at the place that arithmetic gives it."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"


@pytest.fixture(scope="module")
def roofline():
    spec = importlib.util.spec_from_file_location("roofline", RESULTS / "roofline.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["roofline"]


def rows():
    """(file, model, test) of every row of ``polyhead bench``."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text())
        for report in data if isinstance(data, list) else [data]:
            found += [(path.name, report["model"], test["test"]) for test in report.get("tests", ())]
    return found


def report(name, number=0):
    data = json.loads((RESULTS / name).read_text())
    return data[number] if isinstance(data, list) else data


def test_every_row_is_a_point(roofline):
    found = roofline.points(RESULTS)
    said = [(p.file, f"{p.shape} with random {p.quant} weights", p.test.removesuffix(", fp8 KV")) for p in found]
    assert said == rows()
    assert len(said) > 20


def llama_8b_point(roofline, kind, quant="F16"):
    (point,) = [p for p in roofline.points(RESULTS) if (p.file, p.kind, p.quant) == ("h100-llama-8b.json", kind, quant)]
    return point


# Of llama-8b: 32 layers of q, k, v, o and gate, up, down, and the head, in values.
LAYERS = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
HEAD = 4096 * 128256


def test_a_decode_point_is_where_arithmetic_puts_it(roofline):
    """Nothing here is read from the file but times: 2 bytes a weight, 128 KiB of keys and values a token."""
    point = llama_8b_point(roofline, "tg")
    mean_context = (128 + 1) / 2
    operations = 2 * (LAYERS + HEAD) + 4 * 32 * 4096 * mean_context  # of a token
    read = 2 * (LAYERS + HEAD) + 128 * 1024 * mean_context
    seconds = statistics.median(report("h100-llama-8b.json")["tests"][1]["seconds"]) / 128
    assert point.intensity == pytest.approx(operations / read, rel=1e-3)  # norms count with weights there
    assert point.rate == pytest.approx(operations / seconds, rel=1e-3)
    assert point.share == pytest.approx(read / seconds / report("h100-llama-8b.json")["limits"]["read_bytes"], rel=1e-3)


def test_a_prefill_point_is_where_arithmetic_puts_it(roofline):
    point = llama_8b_point(roofline, "pp")
    operations = 2 * LAYERS * 512 + 4 * 32 * 4096 * 512 * 513 / 2 + 2 * HEAD
    read = 2 * (LAYERS + HEAD) + 128 * 1024 * 512
    seconds = statistics.median(report("h100-llama-8b.json")["tests"][0]["seconds"])
    assert point.intensity == pytest.approx(operations / read, rel=1e-3)
    assert point.rate == pytest.approx(operations / seconds, rel=1e-3)
    assert point.share == pytest.approx(operations / seconds / report("h100-llama-8b.json")["limits"]["flops"])


def test_sequences_share_the_weights_but_not_the_context(roofline):
    eight, *_ = [p for p in roofline.points(RESULTS) if p.test == "tg64 x8" and p.quant == "F16"]
    mean_context = (64 + 1) / 2
    operations = 8 * (2 * (LAYERS + HEAD) + 4 * 32 * 4096 * mean_context)
    assert eight.intensity == pytest.approx(
        operations / (2 * (LAYERS + HEAD) + 8 * 128 * 1024 * mean_context), rel=1e-3
    )


def test_depth_adds_to_operations_and_bytes(roofline):
    (deep,) = [p for p in roofline.points(RESULTS) if p.test == "tg64 @ d4096"]
    mean_context = 4096 + (64 + 1) / 2
    operations = 2 * (LAYERS + HEAD) + 4 * 32 * 4096 * mean_context
    read = report("h100-llama-8b-depth-4096.json")["weight_bytes_per_step"] + 128 * 1024 * mean_context
    assert deep.intensity == pytest.approx(operations / read, rel=1e-3)


def test_no_point_is_above_the_roof(roofline):
    for point in roofline.points(RESULTS):
        assert point.rate < min(point.intensity * point.read_limit, point.flops_limit), point.label


def test_results_of_bench_throughput_are_left_out_and_named(roofline, tmp_path, capsys):
    (tmp_path / "one.json").write_text(json.dumps(report("h100-llama-8b.json")))
    (tmp_path / "many.json").write_text(json.dumps({"model": "llama-8b", "static": [], "runs": []}))
    assert [point.file for point in roofline.points(tmp_path)] == ["one.json", "one.json"]
    assert "many.json is of polyhead bench throughput" in capsys.readouterr().err


def without(key):
    def change(data):
        del data[key]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("weight_bytes_per_step"), "'weight_bytes_per_step' is missing"),
        (without("limits"), "'limits' is missing"),
        (lambda data: data["limits"].update(read_bytes=0), "limits: 'read_bytes' is 0"),
        (lambda data: data["tests"][1].pop("read_bytes_per_second"), "tg128: 'read_bytes_per_second' is missing"),
        (lambda data: data["tests"][0].update(seconds=[]), "pp512: 'seconds' holds no times"),
        (lambda data: data["tests"][1].update(share_of_limit=0.99), "'share_of_limit' is 0.9900, but"),
        (lambda data: data.update(model="mine"), "mine: not a shape"),
        (lambda data: data.update(tests=[]), "'tests' is empty"),
    ],
)
def test_a_file_that_lacks_something_is_named(roofline, tmp_path, capsys, change, said):
    data = report("h100-llama-8b.json")
    change(data)
    (tmp_path / "run.json").write_text(json.dumps(data))
    assert roofline.main(["--results", str(tmp_path), "--out", str(tmp_path / "out.png")]) == 1
    message = capsys.readouterr().err
    assert message.startswith("roofline: run.json")
    assert said in message


def test_the_committed_picture_is_of_the_committed_results(roofline):
    drawn = (RESULTS / "roofline.png").read_bytes()
    assert len(drawn) < 300_000
    assert roofline.digest(roofline.points(RESULTS)).encode() in drawn, "run docs/benchmarks/roofline.py again"


@pytest.mark.parametrize("name", ["roofline.png", "roofline.svg"])
def test_every_row_becomes_a_marker(roofline, tmp_path, name, capsys):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib, which the extra docs brings")
    assert roofline.main(["--results", str(RESULTS), "--out", str(tmp_path / name)]) == 0
    assert f"{len(rows())} tests" in capsys.readouterr().out
    assert (tmp_path / name).stat().st_size > 10_000


def test_every_row_has_a_bar_and_a_label(roofline, tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="the picture needs matplotlib, which the extra docs brings")
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # text stays text
        roofline.main(["--results", str(RESULTS), "--out", str(tmp_path / "roofline.svg")])
    drawn = (tmp_path / "roofline.svg").read_text()
    labels = Counter(point.label for point in roofline.points(RESULTS))
    for label, count in labels.items():
        assert drawn.count(f">{label}</text>") == 2 * count, label  # beside its marker and beside its bar
