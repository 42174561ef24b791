"""Draws roofline.png from the JSON files beside it: how near each test of ``polyhead bench`` came to the limits.

    pip install 'polyhead[docs]' && python docs/benchmarks/roofline.py

Upper panel: operations per second over operations per byte. The bytes are the least that a test must read, weights and
KV cache; the roof is what the same files measured of reading and of a large product. Lower panels: percent of the limit
as the files give it, bytes for decode, operations for prefill. Files of ``polyhead bench throughput`` hold other tests
and are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyhead.bench.shapes import SHAPES

HERE = Path(__file__).resolve().parent
_MODEL = re.compile(r"(?P<shape>\S+) with random (?P<quant>\S+) weights")
# Okabe and Ito's colours, which stay apart for colour-blind readers; the markers tell quantisations apart as well.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vPX*"
_INK, _FAINT = "#222222", "#6b6b6b"
_LINE = 0.215  # inches of a bar or a file's name
_REACHES = (11, 18, 28, 40, 55, 72, 92, 115, 140, 170, 200, 235, 270)  # pixels from a marker to its label


class Unfit(Exception):
    """A file does not hold what the picture needs; the message says which and what."""


@dataclass(frozen=True, slots=True)
class Point:
    """One test of one model. ``operations`` and ``bytes`` are those of a repetition that takes ``seconds``."""

    file: str
    device: str
    shape: str
    quant: str
    test: str
    kind: str
    operations: float
    bytes: float
    seconds: float
    tokens_per_second: float
    share: float
    read_limit: float
    flops_limit: float

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.bytes

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.operations / self.seconds

    @property
    def label(self) -> str:
        return f"{self.shape} {self.quant} {self.test}"


def points(folder: Path) -> list[Point]:
    """A point for each test in the JSON files of ``folder``. Raises Unfit, naming the file and what it lacks."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise Unfit(f"{folder}: no JSON files; write one with: polyhead bench --shape llama-8b -o json")
    found = [point for path in files for point in _file(path)]
    if not found:
        raise Unfit(f"{folder}: none of its {len(files)} JSON files holds tests of polyhead bench")
    return found


def _file(path: Path) -> Iterator[Point]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Unfit(f"{path.name}: not JSON: {error}") from None
    for report in data if isinstance(data, list) else [data]:
        if not isinstance(report, dict):
            raise Unfit(f"{path.name}: a report of polyhead bench is an object, not {type(report).__name__}")
        if "static" in report and "runs" in report:  # polyhead bench throughput
            print(f"roofline: {path.name} is of polyhead bench throughput: left out", file=sys.stderr)
            continue
        tests = _need(report, "tests", path.name, list)
        if not tests:
            raise Unfit(f"{path.name}: 'tests' is empty")
        for test in tests:
            yield _point(path, report, test)


def _point(path: Path, report: Mapping[str, Any], test: Mapping[str, Any]) -> Point:
    model = _need(report, "model", path.name, str)
    where = f"{path.name}, {model}"
    match = _MODEL.fullmatch(model)
    if match is None or match["shape"] not in SHAPES:
        raise Unfit(f"{where}: not a shape of polyhead bench --shape, so how much its attention computes is unknown")
    shape = SHAPES[match["shape"]]
    name = _need(test, "test", where, str)
    where = f"{where}, {name}"
    kind = _need(test, "kind", where, str)
    tokens, depth, batch = (int(_number(test, key, where, 0)) for key in ("tokens", "depth", "batch"))
    seconds = statistics.median(_need(test, "seconds", where, list) or [math.nan])
    if not seconds > 0:
        raise Unfit(f"{where}: 'seconds' holds no times")
    limits = _need(report, "limits", where, dict)
    read_limit, flops_limit = (_number(limits, key, f"{where}, limits") for key in ("read_bytes", "flops"))
    weight_bytes = _number(report, "weight_bytes_per_step", where)
    kv_bytes = _number(report, "kv_bytes_per_token", where)
    if kind == "tg":
        reached, limit = _number(test, "read_bytes_per_second", where), read_limit
        read = reached * seconds
        # The share of the stored bytes that a step reads is the share of the parameters that it multiplies with: 2
        # operations each. Attention: 4 for each component of a query, key and layer (one product each for k and v).
        used = _number(report, "parameters", where) * weight_bytes / _number(report, "stored_bytes", where)
        pairs = tokens * depth + tokens * (tokens + 1) // 2
        operations = batch * (2 * used * tokens + 4 * shape.layers * shape.heads * shape.head_dim * pairs)
    elif kind == "pp":
        reached, limit = _number(test, "flops_per_second", where), flops_limit
        operations = reached * seconds
        read = weight_bytes + batch * kv_bytes * (depth + tokens)
    else:
        raise Unfit(f"{where}: 'kind' is {kind!r}; known: 'tg', 'pp'")
    share = _number(test, "share_of_limit", where)
    if not math.isclose(share, reached / limit, rel_tol=1e-6):
        raise Unfit(f"{where}: 'share_of_limit' is {share:.4f}, but its rate over its limit is {reached / limit:.4f}")
    values = 2 * shape.layers * shape.kv_heads * shape.head_dim
    device = re.sub(r"^cuda:\d+ \((.*)\)$", r"\1", _need(report, "device", where, str))
    return Point(
        path.name, device, shape.name, match["quant"], name + (", fp8 KV" if kv_bytes < 1.5 * values else ""), kind,
        operations, read, seconds, _number(test, "tokens_per_second", where), share, read_limit, flops_limit,
    )  # fmt: skip


def _need(data: Mapping[str, Any], key: str, where: str, kind: type) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        raise Unfit(f"{where}: {key!r} is missing" if value is None else f"{where}: {key!r} is {value!r}")
    return value


def _number(data: Mapping[str, Any], key: str, where: str, least: float = 1e-300) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise Unfit(f"{where}: {key!r} is missing" if value is None else f"{where}: {key!r} is {value!r}")
    return value


def draw(found: Sequence[Point], path: Path) -> int:
    """Writes the picture; returns how many markers it has. Raises Unfit where they are too many to tell apart."""
    from matplotlib.figure import Figure  # draws without a display

    shapes, quants = (list(dict.fromkeys(getattr(point, name) for point in found)) for name in ("shape", "quant"))
    if len(shapes) > len(_COLOURS) or len(quants) > len(_MARKERS):
        raise Unfit(f"{len(shapes)} shapes and {len(quants)} quantisations are more than there are colours and markers")
    colours, markers = dict(zip(shapes, _COLOURS, strict=False)), dict(zip(quants, _MARKERS, strict=False))
    panels = [
        (left, group, title, _LINE * (len(group) + len({point.file for point in group})))
        for left, kind, title in (
            (0.23, "tg", "Decode, % of the read limit of its file"),
            (0.715, "pp", "Prefill, % of the product limit of its file"),
        )
        if (group := [point for point in found if point.kind == kind])
    ]
    lower = max(height for *_, height in panels) + 1.0  # inches, as all below
    total = 7.6 + lower
    figure = Figure(figsize=(12, total), dpi=100, facecolor="white")
    drawn = _roofline(figure.add_axes((0.068, (lower + 0.55) / total, 0.917, 6.6 / total)), found, colours, markers)
    for left, group, title, height in panels:
        ax = figure.add_axes((left, (lower - 0.55 - height) / total, 0.27, height / total))
        ax.set_title(title, fontsize=11, loc="left", color=_INK)
        _bars(ax, group, colours)
    if path.suffix != ".png":
        figure.savefig(path)
        return drawn
    from PIL import Image, PngImagePlugin  # which matplotlib needs

    buffer, note = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(buffer, format="png")
    note.add_text("Points", digest(found))
    Image.open(buffer).convert("RGB").quantize(128).save(path, optimize=True, pnginfo=note)
    return drawn


def digest(found: Sequence[Point]) -> str:
    """What the picture notes of its points, so that one that is older than the files can be told."""
    return hashlib.sha256("\n".join(map(repr, found)).encode()).hexdigest()


def _roofline(ax: Any, found: Sequence[Point], colours: Mapping[str, str], markers: Mapping[str, str]) -> int:
    from matplotlib.lines import Line2D

    reads, products = [p.read_limit / 1e12 for p in found], [p.flops_limit / 1e12 for p in found]
    places = [(point.intensity, point.rate / 1e12) for point in found]
    left, right = 0.4 * min(x for x, _ in places), 2.2 * max(x for x, _ in places)
    ridge = max(products) / max(reads)
    corners = [(left, left * max(reads)), (ridge, max(products)), (right, max(products))]
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(0.55 * min(y for _, y in places), 2.4 * max(products)))
    grid = [left * (right / left) ** (step / 400) for step in range(401)]
    low, high = ([min(x * extreme(reads), extreme(products)) for x in grid] for extreme in (min, max))
    ax.fill_between(grid, low, high, color="#c4c4c4", linewidth=0)
    ax.plot(*zip(*corners, strict=True), color=_INK, linewidth=1.3)
    ax.grid(True, color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xlabel("operations per byte of weights and KV cache that must be read", fontsize=11)
    ax.set_ylabel("TFLOP/s reached", fontsize=11)
    devices = ", ".join(dict.fromkeys(point.device for point in found))
    ax.set_title(f"{devices}: each test below the limits that were measured with it", fontsize=13, loc="left")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
    pixels = ax.transData.transform(places)
    drawn = 0
    for index, (point, place) in enumerate(zip(found, places, strict=True)):
        # One that others will lie on is drawn larger, so that it shows around them.
        under = sum(math.dist(pixels[index], other) < 5 for other in pixels[index + 1 :])
        drawn += len(
            ax.plot(
                *place, marker=markers[point.quant], color=colours[point.shape], markersize=8 + 5 * under,
                markeredgecolor="white", markeredgewidth=0.8, linestyle="none", zorder=5,
            )
        )  # fmt: skip
    dot = {"linestyle": "none", "markersize": 8}
    kinds = [Line2D([], [], marker="o", color=colour, label=shape, **dot) for shape, colour in colours.items()]
    kinds += [Line2D([], [], marker=marker, color=_FAINT, label=quant, **dot) for quant, marker in markers.items()]
    legend = ax.legend(handles=kinds, loc="lower right", fontsize=10, framealpha=1, edgecolor="#cccccc")
    ends = ax.transData.transform(corners)
    angle = math.degrees(math.atan2(ends[1][1] - ends[0][1], ends[1][0] - ends[0][0]))
    note = {"fontsize": 10, "color": _INK, "va": "bottom"}
    x = left * (ridge / left) ** 0.6
    slant = ax.text(
        x, 1.16 * x * max(reads), f"reading, {_range(reads, '.2f')} TB/s", rotation=angle, rotation_mode="anchor",
        ha="center", **note,
    )  # fmt: skip
    flat = ax.text(1.7 * ridge, 1.1 * max(products), f"float16 product, {_range(products, '.0f')} TFLOP/s", **note)
    ax.figure.draw_without_rendering()
    busy = [legend.get_window_extent(), flat.get_window_extent(), *_along(slant.get_window_extent())]
    _labels(ax, found, pixels, colours, busy, [(ends[0], ends[1]), (ends[1], ends[2])])
    return drawn


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def _along(box: Any) -> list[Any]:
    """Small boxes along a box's diagonal: what text that slants upwards covers of it."""
    from matplotlib.transforms import Bbox

    steps = [step / 20 for step in range(21)]
    return [Bbox.from_bounds(box.x0 + t * box.width - 9, box.y0 + t * box.height - 9, 18, 18) for t in steps]


def _labels(
    ax: Any, found: Sequence[Point], pixels: Sequence[Any], colours: Mapping[str, str], busy: list[Any], roof: list[Any]
) -> None:
    """A label for each marker, at the nearest place where it covers no marker, label, line to a label, or the roof.

    The most crowded markers choose first. Lines to labels cross markers and lines, and then labels, only where nothing
    else is left. All in pixels until a place is found.
    """
    from matplotlib.transforms import Bbox

    markers = [Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in pixels]
    leads: list[Any] = []
    frame, back = ax.bbox, ax.transData.inverted().transform
    crowd = [sorted(math.dist(a, b) for b in pixels)[1:4] for a in pixels]
    for index in sorted(range(len(found)), key=lambda i: crowd[i]):
        point, (x, y) = found[index], pixels[index]
        text = ax.text(1, 1, point.label, fontsize=8.8, color=_INK, va="center", zorder=6)
        extent = text.get_window_extent()
        wide, high = extent.width, extent.height
        best: Any = None
        for care, reach, turn in itertools.product((2, 1, 0), _REACHES, range(0, 360, 10)):
            if best is not None and reach != best[1]:
                break
            dx, dy = reach * math.cos(math.radians(turn)), reach * math.sin(math.radians(turn))
            corner = x + dx - (0 if dx > 4 else wide if dx < -4 else wide / 2)
            box = Bbox.from_bounds(corner, y + dy - high / 2, wide, high).padded(1.5)
            lead = ((x, y), (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)))
            if (
                frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
                and not any(box.overlaps(other) for other in (*busy, *markers))
                and not any(_cuts(line, box) for line in (*roof, *(leads if care else ())))
                and not (care > 1 and any(_cross(lead, line) for line in leads))
                and not (care > 1 and any(_cuts(lead, m) for m in markers if not m.contains(x, y)))
                and not (care > 0 and any(_cuts(lead, other) for other in busy))
            ):  # fmt: skip
                cost = reach + 0.12 * abs(dy) + (4 if dx < -4 else 0)  # to the right rather than elsewhere
                if best is None or cost < best[0]:
                    best = (cost, reach, corner, y + dy, box, lead)
        if best is None:
            raise Unfit(f"no room for the label {point.label!r}: the picture has too many tests")
        _, reach, corner, middle, box, lead = best
        text.set_position(back((corner, middle)))
        busy.append(box)
        if reach > _REACHES[0]:
            ax.plot(*back(lead).T, color=colours[point.shape], linewidth=0.8, zorder=4)
            leads.append(lead)


def _cross(a: Any, b: Any) -> bool:
    def side(p: Any, q: Any, r: Any) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return side(*a, b[0]) * side(*a, b[1]) < 0 and side(*b, a[0]) * side(*b, a[1]) < 0


def _cuts(line: Any, box: Any) -> bool:
    corners = [(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)]
    return any(_cross(line, (corners[i - 1], corners[i])) for i in range(4)) or any(box.contains(*end) for end in line)


def _bars(ax: Any, found: Sequence[Point], colours: Mapping[str, str]) -> None:
    """Percent of the limit, a bar for each test, the tests of a file together under its name."""
    line, rows = 0, []
    for file in dict.fromkeys(point.file for point in found):
        ax.text(0, line, file, fontsize=8.5, color=_FAINT, ha="right", va="center", style="italic")
        for point in (point for point in found if point.file == file):
            line += 1
            rows.append((line, point.label))
            ax.barh(line, 100 * point.share, height=0.74, color=colours[point.shape])
            for at, text in ((122, f"{100 * point.share:.0f} %"), (192, f"{point.tokens_per_second:,.0f} tokens/s")):
                ax.text(at, line, text, fontsize=9, va="center", ha="right", color=_INK)
        line += 1
    ax.set(xlim=(0, 192), ylim=(line - 0.5, -0.5), xticks=range(0, 101, 25))
    ax.set_yticks([at for at, _ in rows], [label for _, label in rows])
    ax.tick_params(labelsize=9, length=0)
    ax.axvline(100, color=_INK, linewidth=1)
    ax.grid(True, axis="x", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE, help="folder of JSON files (default: this one)")
    parser.add_argument("--out", type=Path, default=HERE / "roofline.png", help=".png, .svg or .pdf")
    given = parser.parse_args(arguments)
    try:
        found = points(given.results)
        drawn = draw(found, given.out)
    except Unfit as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("roofline: drawing needs matplotlib: pip install 'polyhead[docs]'", file=sys.stderr)
        return 1
    print(f"{given.out}: {drawn} tests of {len({point.file for point in found})} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
