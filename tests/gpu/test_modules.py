"""Layers of plugins on the GPU: what a module is given and how errors name it; polyhead-moe's experts against NumPy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import memory_source
import numpy as np
import pytest
import tolerance
from numpy.typing import NDArray
from polyhead import ModuleKind
from polyhead.arch import Attention, Block, Decoder, Embedding, Linear, Module, RMSNorm, SplitQKV, TensorSpec
from polyhead.errors import DeviceError, PluginError
from polyhead.generation import Generation
from polyhead.runtime.contract import RuntimeOptions
from polyhead.runtime.cpu.model import CpuModel
from polyhead.runtime.cuda.context import Context
from polyhead.runtime.cuda.formats import DenseMatrix, Matrix, QuantMatrix, flat_shape
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.modules import Modules
from polyhead.runtime.cuda.ops.repack import repack
from polyhead.runtime.modules import is_matrix
from polyhead.runtime.program import Apply, Buffer
from random_blocks import LAYOUTS, random_blocks

from gguf import GGMLQuantizationType, quants

sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "plugins" / "polyhead-moe"))
from polyhead_moe import Experts, load_on_cpu, load_on_cuda
from polyhead_moe.cuda import columns_for, most_tiles
from polyhead_moe.layer import SharedExpert

pytestmark = pytest.mark.gpu
Put = Callable[..., Array]
Get = Callable[[Array], Any]
F32 = NDArray[np.float32]


@pytest.fixture
def load(ctx: Context, put: Put, poisoned: Put, get: Get) -> Callable[..., Any]:
    """``load(kind, spec, hidden, types)``: a module on the device with random weights, and these in float32.

    ``types`` are GGML types by tensor name, float16 by default; 1-D tensors are float32. ``zero`` is all zeros.
    """

    def make(
        kind: ModuleKind,
        spec: Module,
        hidden: int,
        types: Mapping[str, str] | None = None,
        act: str = "f16",
        zero: str = "",
    ) -> tuple[Apply, Modules, dict[str, F32]]:
        arrays: dict[str, Array | Matrix] = {}
        values: dict[str, F32] = {}
        for n, item in enumerate(spec.tensors(hidden)):
            type_ = (types or {}).get(item.name, act)
            if is_matrix(item) and type_ in LAYOUTS:
                raw = random_blocks(np.random.PCG64(n), item.shape, type_, 1.5 / np.sqrt(item.shape[-1]))
                shape = flat_shape(type_, item.shape)
                arrays[item.name] = QuantMatrix(type_, *shape, poisoned(QuantMatrix.shape_of(type_, *shape), "u8"))
                repack(ctx, type_, put(raw.reshape(-1)), arrays[item.name])
                values[item.name] = quants.dequantize(raw, GGMLQuantizationType[type_]).reshape(item.shape)
                continue
            drawn = np.random.default_rng(n).standard_normal(item.shape).astype(np.float32) * 1.5
            drawn *= (item.name != zero) / np.float32(np.sqrt(item.shape[-1]))
            array = put(drawn, act if is_matrix(item) else "f32")
            values[item.name] = get(array).astype(np.float32)
            arrays[item.name] = DenseMatrix(array.reshape(*flat_shape("F16", item.shape))) if is_matrix(item) else array
        step = Apply("blk.0.mlp", Buffer("x", hidden), Buffer("out", hidden, wide=True), spec, ())
        modules = Modules(ctx, None, poisoned((1 << 20,), "u8"), [(step, kind)], arrays.__getitem__, act, True)
        return step, modules, values

    return make


@pytest.fixture
def run(put: Put, poisoned: Put, get: Get) -> Callable[..., F32]:
    """``run(step, modules, x)``: what the module makes of the rows of x; its scratch is full of NaN before."""

    def call(step: Apply, modules: Modules, x: Array) -> F32:
        rows, hidden = x.shape
        scratch = {name: poisoned((rows, size), "f32") for name, size in step.module.scratch(hidden).items()}
        out = poisoned((rows, hidden), "f32")
        modules.apply(step, x, out, scratch)
        return get(out)

    return call


def on_cpu(spec: Experts, values: Mapping[str, F32], x: F32) -> F32:
    scratch = {name: np.empty((len(x), size), np.float32) for name, size in spec.scratch(x.shape[1]).items()}
    out = np.empty_like(x)
    load_on_cpu(spec, values)(x, out, scratch)
    return out


def inputs(put: Put, get: Get, rows: int, hidden: int, dtype: str = "f16") -> tuple[Array, F32]:
    x = put(np.random.default_rng(rows + hidden).standard_normal((rows, hidden)).astype(np.float32), dtype)
    return x, get(x).astype(np.float32)


EXPERTS = ModuleKind(Experts, load_on_cpu, load_on_cuda)
NAMES = ("router", "gate", "up", "down")
NAMES_OF_SHARED = ("switch", "shared_gate", "shared_up", "shared_down")


@pytest.mark.parametrize("kind", ["f16", *LAYOUTS])
def test_experts_of_every_type_agree_with_numpy(kind, load, run, put, get):
    hidden, size = (256, 512) if LAYOUTS.get(kind) and LAYOUTS[kind].weights == 256 else (96, 160)
    spec = Experts(6, 2, size, *NAMES)
    step, modules, values = load(EXPERTS, spec, hidden, dict.fromkeys(NAMES[1:], kind))
    for rows in (1, 3, 40):
        x, seen = inputs(put, get, rows, hidden)
        assert tolerance.error(run(step, modules, x), on_cpu(spec, values, seen)) < tolerance.CUDA_NORM


@pytest.mark.parametrize(
    ("gate", "up", "down"),
    [("Q4_K", "Q6_K", "Q5_0"), ("Q8_0", "f16", "Q4_0"), ("f16", "Q3_K", "f16"), ("Q5_K", "Q5_K", "Q8_0")],
)
@pytest.mark.parametrize("act", ["f16", "bf16"])
def test_experts_of_mixed_types_agree_with_numpy(gate, up, down, act, load, run, put, get):
    spec = Experts(4, 2, 288, *NAMES, normalise=False, scale=1.5)
    types = {"gate": gate, "up": up, "down": down, "router": "Q8_0"}
    step, modules, values = load(EXPERTS, spec, 256, types, act)
    for rows in (1, 21):
        x, seen = inputs(put, get, rows, 256, act)
        limit = tolerance.CUDA_NORM * (8 if act == "bf16" else 1)
        assert tolerance.error(run(step, modules, x), on_cpu(spec, values, seen)) < limit


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 33, 130])
@pytest.mark.parametrize("shape", [(1, 1, 8, 24), (5, 5, 40, 36), (33, 3, 37, 20), (128, 8, 16, 32)])
def test_any_number_of_rows_and_experts_agrees_with_numpy(rows, shape, load, run, put, get):
    count, used, size, hidden = shape
    spec = Experts(count, used, size, *NAMES)
    step, modules, values = load(EXPERTS, spec, hidden)
    x, seen = inputs(put, get, rows, hidden)
    assert tolerance.error(run(step, modules, x), on_cpu(spec, values, seen)) < tolerance.CUDA_NORM


@pytest.mark.parametrize("flat", [True, False])
def test_a_shared_expert_is_added(flat, load, run, put, get):
    spec = Experts(5, 2, 64, *NAMES, normalise=False, shared=SharedExpert(96, *NAMES_OF_SHARED, flat=flat))
    types = {"gate": "Q4_0", "up": "Q4_0", "down": "Q8_0", "shared_down": "Q5_1"}
    step, modules, values = load(EXPERTS, spec, 64, types)
    for rows in (1, 19):
        x, seen = inputs(put, get, rows, 64)
        assert tolerance.error(run(step, modules, x), on_cpu(spec, values, seen)) < tolerance.CUDA_NORM


@pytest.mark.parametrize("kind", ["Q4_K", "f16"])
def test_a_row_is_bit_equal_whatever_rows_stand_beside_it(kind, load, run, put, get):
    spec = Experts(8, 2, 256, *NAMES)
    step, modules, _ = load(EXPERTS, spec, 256, dict.fromkeys(NAMES[1:], kind))
    x, values = inputs(put, get, 100, 256)  # 100 rows make tiles of 16 tokens, few rows tiles of 8
    whole = run(step, modules, x)
    for start, stop in ((0, 1), (99, 100), (3, 9), (40, 80)):
        np.testing.assert_array_equal(run(step, modules, put(values[start:stop], "f16")), whole[start:stop])
    np.testing.assert_array_equal(run(step, modules, put(values[::-1].copy(), "f16")), whole[::-1])


@pytest.mark.parametrize("rows", [1, 50])
@pytest.mark.parametrize("count", [5, 70])
def test_equal_scores_choose_the_first_experts(count, rows, load, run, put, get):
    spec = Experts(count, 3, 48, *NAMES)
    step, modules, values = load(EXPERTS, spec, 32, zero="router")
    x, seen = inputs(put, get, rows, 32)
    assert tolerance.error(run(step, modules, x), on_cpu(spec, values, seen)) < tolerance.CUDA_NORM


def test_all_rows_may_go_to_the_same_experts(load, run, put, get):
    spec = Experts(40, 3, 48, *NAMES)
    step, modules, values = load(EXPERTS, spec, 32)
    x = put(np.tile(np.random.default_rng(2).standard_normal(32).astype(np.float32), (50, 1)), "f16")
    found = run(step, modules, x)
    assert tolerance.error(found, on_cpu(spec, values, get(x).astype(np.float32))) < tolerance.CUDA_NORM
    np.testing.assert_array_equal(found, found[:1].repeat(50, axis=0))


def test_scores_that_are_no_numbers_choose_experts_all_the_same(load, run, put, get):
    spec = Experts(6, 2, 48, *NAMES)
    step, modules, _ = load(EXPERTS, spec, 32)
    values = np.random.default_rng(0).standard_normal((20, 32)).astype(np.float32)
    clean = run(step, modules, put(values, "f16"))
    values[4] = np.nan
    found = run(step, modules, put(values, "f16"))
    assert np.isnan(found[4]).all()
    np.testing.assert_array_equal(np.delete(found, 4, 0), np.delete(clean, 4, 0))


def test_tiles_suffice_whichever_experts_are_chosen():
    rng = np.random.default_rng(0)
    for _ in range(300):
        pairs, experts = int(rng.integers(1, 300)), int(rng.integers(1, 40))
        size = 8 * columns_for(pairs, experts)
        counts = np.bincount(rng.integers(0, experts, pairs) ** 2 % experts, minlength=experts)
        assert (-(-counts // size)).sum() <= most_tiles(pairs, experts, size) <= pairs


@dataclass(frozen=True)
class Bilinear(Module):
    """(x Aᵀ) · (x Bᵀ) + c: a module of the tests' own, whose CUDA source is an argument."""

    a: str
    b: str
    c: str

    def tensors(self, hidden):
        yield TensorSpec(self.a, (hidden, hidden), "a")
        yield TensorSpec(self.b, (hidden, hidden), "b")
        yield TensorSpec(self.c, (hidden,), "c")

    def scratch(self, hidden):
        return {"right": hidden}


SOURCE = """#include "prelude.cuh"
extern "C" __global__ void multiply(float* left, const float* right, const float* c, int columns) {
  const int at = blockIdx.x * columns + threadIdx.x;
  if (threadIdx.x < columns) left[at] = left[at] * right[at] + c[threadIdx.x];
}
"""


def bilinear_cpu(spec, weights):
    def run(x, out, scratch):
        np.matmul(x, weights[spec.a].T, out=out)
        np.matmul(x, weights[spec.b].T, out=scratch["right"])
        out *= scratch["right"]
        out += weights[spec.c]

    return run


def bilinear_cuda(source: str = SOURCE, name: str = "bilinear.cu", **change: Any) -> Callable[..., Any]:
    if source != SOURCE:
        name = f"other_{name}"
    how = {"kernel": "multiply", "block": 64, "args": 4, "returned": None, **change}

    def load(spec, setup):
        file = setup.source(name, source)
        a, b, c = setup.matrix(spec.a), setup.matrix(spec.b), setup.vector(spec.c)

        def run(x, out, scratch, gpu):
            gpu.linear(x, a, out)
            gpu.linear(x, b, scratch["right"])
            arguments = (out, scratch["right"], c, x.shape[1])[: how["args"]]
            gpu.launch(file, how["kernel"], x.shape[0], how["block"], *arguments)
            return how["returned"]

        return run

    return load


BILINEAR = Bilinear("a", "b", "c")


def test_a_module_of_any_plugin_agrees_with_numpy(load, run, put, get):
    step, modules, w = load(ModuleKind(Bilinear, bilinear_cpu, bilinear_cuda()), BILINEAR, 24)
    for rows in (1, 5, 40):
        x, v = inputs(put, get, rows, 24)
        assert tolerance.error(run(step, modules, x), (v @ w["a"].T) * (v @ w["b"].T) + w["c"]) < tolerance.CUDA_NORM


def test_rows_of_the_residual_stream_are_narrowed_first(load, run, put, get):
    step, modules, w = load(ModuleKind(Bilinear, bilinear_cpu, bilinear_cuda()), BILINEAR, 24)
    v = np.random.default_rng(1).standard_normal((9, 24)).astype(np.float32)
    x, rounded = put(v), v.astype(np.float16).astype(np.float32)
    expected = (rounded @ w["a"].T) * (rounded @ w["b"].T) + w["c"]
    assert tolerance.error(run(step, modules, x), expected) < tolerance.CPU_LOGITS
    np.testing.assert_array_equal(get(x), v)


@pytest.mark.parametrize(
    ("cuda", "error", "message"),
    [
        (bilinear_cuda(SOURCE.replace("left[at] *", "no[at] *")), DeviceError, r"test_modules/other_bilinear\.cu\(4\)"),
        (bilinear_cuda(kernel="divide"), DeviceError, r"test_modules/bilinear\.cu .*has no kernel divide"),
        (bilinear_cuda(block=2048), DeviceError, r"test_modules/bilinear\.cu:multiply \(grid 3x1x1, block 2048"),
        (bilinear_cuda(args=3), DeviceError, r"the arguments have .* bytes, the kernel wants"),
        (bilinear_cuda(returned=1), PluginError, "returned int; it must write its result to out"),
        (bilinear_cuda(name="bilinear.txt"), DeviceError, "ends in .cu or .cuh"),
        (lambda spec, setup: setup.matrix(spec.c), DeviceError, r"c \[24\] is to be had by setup.vector"),
        (lambda spec, setup: setup.vector("d"), DeviceError, "does not list the tensor d; it lists a, b, c"),
        (lambda spec, setup: {}["no"], PluginError, "KeyError"),
    ],
)
def test_a_fault_names_step_module_and_plugin(cuda, error, message, load, run, put, get, monkeypatch):
    monkeypatch.setattr(Bilinear, "__module__", "test_modules.layer")  # as if of a package of this name

    def load_and_run() -> None:
        step, modules, _ = load(ModuleKind(Bilinear, bilinear_cpu, cuda), BILINEAR, 24)
        run(step, modules, inputs(put, get, 3, 24)[0])

    with pytest.raises(error, match=rf"(?s)blk\.0\.mlp: module Bilinear of test_modules failed.*{message}"):
        load_and_run()


def decoder_of(module: Module, norm: bool, hidden: int = 32) -> Decoder:
    def block(i: int) -> Block:
        attn = Attention(2, 1, 16, SplitQKV(*(Linear(f"{i}.{n}") for n in "qkv")), Linear(f"{i}.o"))
        mine = type(module)(**{k: f"{i}.{v}" if isinstance(v, str) else v for k, v in vars(module).items()})
        return Block(RMSNorm(f"{i}.n", 1e-5), attn, RMSNorm(f"{i}.m", 1e-5) if norm else None, mine)

    return Decoder(hidden, 50, 256, Embedding("e"), (block(0), block(1)), RMSNorm("n", 1e-5), Linear("h"))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("module", [BILINEAR, Experts(6, 2, 40, *NAMES)], ids=["bilinear", "experts"])
def test_a_model_with_modules_agrees_with_the_cpu_runtime(module, norm, ctx):
    from polyhead.runtime.cuda.model import CudaModel

    decoder = decoder_of(module, norm)
    weights = memory_source.random_weights(decoder, 3)
    for name in weights:
        if name.endswith(".c"):
            weights[name] = weights[name] * np.float32(0.1)
    source = memory_source.MemorySource(weights)
    kinds = {Bilinear: ModuleKind(Bilinear, bilinear_cpu, bilinear_cuda()), Experts: EXPERTS}
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 50, 70)]
    options = RuntimeOptions(block_size=8, max_tokens=64, max_batch=8)
    reference = CpuModel(decoder, source, options, kinds)
    expected = Generation(reference, None).logits(ids)
    reference.close()
    for deterministic in (False, True):
        options = RuntimeOptions(block_size=8, max_tokens=64, max_batch=8, deterministic=deterministic)
        model = CudaModel(decoder, source, options, kinds=kinds)
        try:
            found = Generation(model, None).logits(ids)
        finally:
            model.close()
        # A row whose second and third expert are nearly equal may be sent elsewhere in half precision.
        rows = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.median(rows) < tolerance.CUDA_LOGITS
        assert (rows > 3 * tolerance.CUDA_LOGITS).mean() < 0.1
