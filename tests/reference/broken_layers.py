"""As broken_plugins.py, for a plugin with a layer of its own: in NumPy, and with CUDA source."""

from __future__ import annotations

from broken_plugins import SOUND, Fault

_MLP = SOUND[
    SOUND.index("mlp=MLP(") : SOUND.index('activation="silu",\n            ),')
    + len('activation="silu",\n            ),')
]
LAYERED = (
    SOUND.replace(
        _MLP, 'mlp=Square(meta.get(int, "feed_forward_length", minimum=1), name("ffn_up"), name("ffn_down")),'
    )
    + """
from dataclasses import dataclass

@dataclass(frozen=True)
class Square(Module):
    size: int
    up: str
    down: str

    def tensors(self, hidden):
        yield TensorSpec(self.up, (self.size, hidden), "up")
        yield TensorSpec(self.down, (hidden, self.size), "down")

    def scratch(self, hidden):
        return {"inner": self.size}

def load(spec, weights):
    up, down = weights[spec.up], weights[spec.down]
    kept = []

    def run(x, out, scratch):
        inner = scratch["inner"]
        inner[...] = x @ up.T
        inner *= abs(inner)
        out[...] = inner @ down.T

    return run

@hookimpl
def polyhead_register_modules():
    return [ModuleKind(Square, load)]
"""
)

ON_CUDA = (
    LAYERED.replace("ModuleKind(Square, load)", "ModuleKind(Square, load, Cuda)")
    + """
SOURCE = '''#include "prelude.cuh"
extern "C" __global__ void square(const act_t* x, float* out, float* inner, int size) {
    const int at = blockIdx.x * size + threadIdx.x;
    inner[at] = out[at] = ph_to_float(x[at]) * ph_to_float(x[at]);
}
'''

class Cuda:
    def __init__(self, spec, setup):
        self.file = setup.source("square.cu", SOURCE)
        setup.compile(self.file, "square")
        self.up, self.down = setup.matrix(spec.up), setup.matrix(spec.down)

    def __call__(self, x, out, scratch, gpu):
        rows, hidden = x.shape
        inner = scratch["inner"].view("f32", rows, self.up.rows)
        gpu.linear(x, self.up, inner)
        gpu.launch(self.file, "square", (rows, 1, 1), hidden, x, out, inner, hidden)
"""
)

_MATTERS = "test_every_weight_matters"
_LAYER = "test_a_layer_of_its_own_writes_each_row_from_that_row_alone"
_KERNELS = "test_kernels_of_its_own_compile"
_CAUSAL = "test_a_changed_token_changes_later_logits_and_no_earlier_ones"
_CHUNKS = "test_prefill_equals_decode"
_BATCH = "test_a_batch_changes_no_sequence"
_ROWS = "        out[...] = inner @ down.T\n"

LAYER_FAULTS = {
    "claims a tensor that its layer never reads": Fault(
        _MATTERS,
        "        inner *= abs(inner)\n        out[...] = inner @ down.T",
        "        out[...] = inner[:, :1] * x",
        r"changes no logit: blk\.0\.ffn_down\.weight \(blocks\[0\]\.mlp\.down\), blk\.1\.ffn_down\.weight",
        LAYERED,
    ),
    "sees the future": Fault(
        _CAUSAL,
        _ROWS,
        _ROWS + "        out += x.mean(axis=0)\n",
        "on cpu, with all optional tensors, changing token 6 changes the logits of tokens before it: a row",
        LAYERED,
    ),
    "adds to what out holds": Fault(
        _LAYER,
        _ROWS,
        _ROWS.replace("=", "+="),
        r"a Square, .* leaves 4160 of 4160 values of out unwritten, or adds",
        LAYERED,
    ),
    "reads scratch before it writes it": Fault(
        _LAYER, "inner[...] = x @ up.T", "inner[:, 1:] = x @ up.T[:, 1:]", "or reads scratch that it has not", LAYERED
    ),
    "writes to its input": Fault(_LAYER, _ROWS, _ROWS + "        x[...] = 0\n", "a Square, .* writes to x", LAYERED),
    "is random": Fault(
        _LAYER,
        _ROWS,
        _ROWS + "        import numpy; out += numpy.random.default_rng().random(out.shape)\n",
        "gives something else when it is called again",
        LAYERED,
    ),
    "mixes rows where there are many": Fault(
        _LAYER,
        _ROWS,
        _ROWS + "        out[64:-1] += x[65:]\n",
        r"gives 64 of 130 rows by themselves 0\.\d+ otherwise than among the others",
        LAYERED,
    ),
    "fails for one row": Fault(_LAYER, _ROWS, _ROWS + "        x[1]\n", "fails for 1 rows: IndexError", LAYERED),
    "has a layer that equals all others": Fault(
        _LAYER,
        "@dataclass(frozen=True)\n",
        "@dataclass(frozen=True, eq=False)\n",
        r"compares equal to any other of its kind: decorate Square with @dataclass\(frozen=True\)",
        LAYERED,
    ),
    "registers no implementation": Fault(
        _LAYER, "[ModuleKind(Square, load)]", "[]", "has no ModuleKind: polyhead_register_modules", LAYERED
    ),
    "fails to load on a GPU": Fault(
        _KERNELS,
        "setup.matrix(spec.down)",
        "setup.vector(spec.down)",
        r"blocks\[0\]\.mlp, a Square, with matrices of F16 and f16 activations, does not run on a GPU: DeviceError: .*"
        r"lists no vector blk\.0\.ffn_down\.weight",
        ON_CUDA,
    ),
    "takes more scratch on a GPU than it asked for": Fault(
        _KERNELS,
        '.view("f32", rows,',
        '.view("f32", 2 * rows,',
        r"f32 \[2, 64\] is more than the array f32 \[1, 64\]",
        ON_CUDA,
    ),
    "launches with an empty grid": Fault(
        _KERNELS, "(rows, 1, 1)", "(rows // 2, 1, 1)", r"square is launched with grid \(0, 1, 1\)", ON_CUDA
    ),
    "multiplies what does not fit on a GPU": Fault(
        _KERNELS, "gpu.linear(x, self.up", "gpu.linear(x, self.down", r"linear of x \[1, 32\], .*cols=64", ON_CUDA
    ),
    "returns its result on a GPU": Fault(
        _KERNELS,
        "out, inner, hidden)\n",
        "out, inner, hidden)\n        return out\n",
        "it returned _Array; it must",
        ON_CUDA,
    ),
    "keeps something from call to call": Fault(
        _CHUNKS,
        _ROWS,
        _ROWS + "        kept.append(1)\n        out *= len(kept)\n",
        r"the prompt token by token is [\d.e+]+ off the prompt at once, expected less than 1e-05: does a layer keep",
        LAYERED,
    ),
    "depends on its neighbours": Fault(
        _BATCH,
        _ROWS,
        _ROWS + "        out *= len(x)\n",
        r"sequence 0 of a batch of 3 is [\d.]+ off the same sequence alone, expected less than 1e-05: a layer mixes",
        LAYERED,
    ),
}
