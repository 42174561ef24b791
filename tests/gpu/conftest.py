"""What GPU tests share: an open device, arrays on it, and a record of the run.

A test that asks for ``ctx`` is skipped, with the reason, where there is no GPU or a package is missing. With
``--record PATH`` the run is written to a file that says which sources passed on which device, which tests/unit checks.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cuda_sources
import numpy as np
import pytest
from polyhead.errors import DeviceError
from polyhead.runtime.contract import SampledToken, SamplingRow
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.formats import DenseMatrix, Matrix, QuantMatrix
from polyhead.runtime.cuda.memory import Array, Pool
from polyhead.runtime.cuda.ops.repack import repack
from polyhead.runtime.cuda.probe import probe
from polyhead.runtime.cuda.sampler import Sampler
from random_blocks import random_blocks
from sampling_rows import F32, Run

_PACKAGES = ("cuda-core", "cuda-bindings", "nvmath-python", "nvidia-cuda-nvrtc", "nvidia-cublas", "numpy")
_OUTCOMES = {"passed": 0, "failed": 0, "skipped": 0, "deselected": 0}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --record, known when tests/gpu is named on the command line."""
    parser.addoption("--record", metavar="PATH", help="write what passed on which device, driver and sources to PATH")


@pytest.fixture(scope="session")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Context]:
    """A context on the first GPU. Its compiled kernels go to the user's cache, as in a run."""
    found = probe()
    if found.problem:
        pytest.skip(f"no GPU: {found.problem}")
    try:
        context = Context.open(0)
    except DeviceError as error:
        pytest.skip(f"no GPU: {error}")
    with context:
        yield context


@pytest.fixture
def pool(ctx: Context) -> Iterator[Pool]:
    """Memory that is returned after the test."""
    with Pool(ctx.device, "test") as pool:
        yield pool


@pytest.fixture
def put(ctx: Context, pool: Pool) -> Callable[..., Array]:
    """``put(values, dtype)``: the values on the device; the dtype defaults to that of the values."""
    names = {"f4": "f32", "f2": "f16", "i4": "i32", "u4": "u32", "i8": "i64", "u8": "u64", "u1": "u8", "i1": "i8"}

    def upload(values: Any, dtype: str | None = None) -> Array:
        values = np.asarray(values)
        array = pool.array(values.shape, dtype or names[values.dtype.str[1:]])
        ctx.device.upload(array, values)
        return array

    return upload


@pytest.fixture
def poisoned(ctx: Context, pool: Pool) -> Callable[..., Array]:
    """``poisoned(shape, dtype)``: an output full of 0xFF bytes (NaN, or -1), so that what is not written shows."""

    def make(shape: tuple[int, ...] | int, dtype: str) -> Array:
        array = pool.array(shape, dtype)
        ctx.device.fill(array, 0xFF)
        return array

    return make


@pytest.fixture
def get(ctx: Context) -> Callable[[Array], Any]:
    """``get(array)``: the values, bf16 as float32, after all work has finished."""
    return ctx.device.download


@pytest.fixture
def weights(
    ctx: Context, put: Callable[..., Array], poisoned: Callable[..., Array], get: Callable[[Array], Any]
) -> Callable[..., tuple[Matrix, Any]]:
    """``weights(kind, rows, cols)``: a random matrix on the device (f16 and bf16: dense), and its values in float64."""

    from gguf import GGMLQuantizationType, quants

    def make(kind: str, rows: int, cols: int) -> tuple[Matrix, Any]:
        if kind in ("f16", "bf16"):
            dense = put(np.random.default_rng(cols).standard_normal((rows, cols)).astype(np.float32) * 0.02, kind)
            return DenseMatrix(dense), get(dense).astype(np.float64)
        raw = random_blocks(np.random.PCG64(rows + cols), (rows, cols), kind, 0.02)
        matrix = QuantMatrix(kind, rows, cols, poisoned(QuantMatrix.shape_of(kind, rows, cols), "u8"))
        repack(ctx, kind, put(raw.reshape(-1)), matrix)
        return matrix, quants.dequantize(raw, GGMLQuantizationType[kind]).astype(np.float64)

    return make


@pytest.fixture
def make_sampler(ctx: Context, pool: Pool) -> Iterator[Callable[..., Sampler]]:
    """``make_sampler(vocab, max_rows, max_seen)``: a Sampler, closed after the test."""
    made: list[Sampler] = []

    def build(vocab: int, max_rows: int = 64, max_seen: int = 20_000) -> Sampler:
        made.append(Sampler(ctx, pool, max_rows, vocab, max_seen))
        return made[-1]

    yield build
    for sampler in made:
        sampler.close()


@pytest.fixture
def sampled(ctx: Context, make_sampler: Callable[..., Sampler]) -> Run:
    """Samples on the device, with one sampler per vocabulary, and checks that the logits stay as they are."""
    samplers: dict[int, Sampler] = {}

    def sample(logits: F32, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        vocab = logits.shape[1]
        if vocab not in samplers:
            samplers[vocab] = make_sampler(vocab, 256)
        with Pool(ctx.device, "logits") as pool:
            array = pool.array(logits.shape, "f32")
            ctx.device.upload(array, logits)
            tokens = samplers[vocab].sample(array, rows)
            assert np.array_equal(ctx.device.download(array), logits, equal_nan=True)
        chosen = ctx.device.download(samplers[vocab].tokens)[: len(rows)].tolist()
        assert chosen == [token.id for token in tokens], "the next step's input"
        return tokens

    return sample


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Counts a test once: where it ran, or where its setup failed or skipped."""
    if not report.nodeid.startswith("tests/gpu/"):
        return
    if report.when == "call" or (report.when == "setup" and not report.passed):
        _OUTCOMES[report.outcome] += 1
    elif report.failed:
        _OUTCOMES["failed"] += 1


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """A run of some of the tests is no record of all."""
    _OUTCOMES["deselected"] += sum(item.nodeid.startswith("tests/gpu/") for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the record, if it was asked for and a GPU was there."""
    path = session.config.getoption("--record", default=None)
    if not path or hasattr(session.config, "workerinput"):  # a part of the tests, counted by the whole
        return
    found = probe()
    if not found.devices:
        raise pytest.UsageError(f"--record: nothing ran on a GPU: {found.problem}")
    device = found.devices[0]
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    record = {
        "device": device.name,
        "compute_capability": "{}.{}".format(*device.cc),
        "driver_cuda": "{}.{}".format(*(found.driver or (0, 0))),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions,
        **_OUTCOMES,
        "sources_sha256": cuda_sources.digest(),
    }
    Path(path).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
