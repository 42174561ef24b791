"""Plugins' layers on a GPU, as far as it goes without one: what they take of its memory, and who is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from polyhead import ModuleKind
from polyhead.arch import Attention, Block, Decoder, Embedding, Linear, Module, RMSNorm, SplitQKV, TensorSpec
from polyhead.errors import ConfigError, DeviceError, PluginError
from polyhead.plugin_checks import read_plugin
from polyhead.runtime.contract import RuntimeOptions
from polyhead.runtime.cuda.formats import flat_shape, matrix_bytes
from polyhead.runtime.cuda.memory import Array
from polyhead.runtime.cuda.modules import Stack, kinds_of, with_act
from polyhead.runtime.cuda.ops.linear_wide import room_bytes
from polyhead.runtime.cuda.plan import check, narrow_bytes, scratch_bytes, unpack_rows
from polyhead.runtime.cuda.weights import matrix_names, resident_bytes
from polyhead.runtime.modules import is_matrix
from polyhead.runtime.program import Apply, Program, lower

HIDDEN = 256


@dataclass(frozen=True)
class Several(Module):
    """Tensors of one, two, three and four dimensions."""

    experts: int = 6
    size: int = 64

    def tensors(self, hidden):
        yield TensorSpec("vector", (hidden,))
        yield TensorSpec("row", (1, hidden))
        yield TensorSpec("matrix", (512, hidden))
        yield TensorSpec("stack", (self.experts, self.size, hidden))
        yield TensorSpec("more", (2, 2, 3, 5))

    def scratch(self, hidden):
        return {"some": 10}


def program(module: Module | None = None, norm: bool = True) -> Program:
    attn = Attention(1, 1, 16, SplitQKV(Linear("q"), Linear("k"), Linear("v")), Linear("o"))
    mlp_norm = RMSNorm("m", 1e-5) if norm else None
    block = Block(RMSNorm("n", 1e-5), attn, mlp_norm, module or Several())
    return lower(Decoder(HIDDEN, 40, 64, Embedding("e"), (block,), None))


def types(name: str) -> str:
    return {"stack": "Q4_K", "matrix": "Q8_0"}.get(name, "F32")


def padded(nbytes: int) -> int:
    return -(-nbytes // 256) * 256


def test_tensors_of_two_and_three_dimensions_are_matrices_and_the_others_float32():
    found = program()
    assert {spec.name for spec in Several().tensors(HIDDEN) if is_matrix(spec)} == {"row", "matrix", "stack"}
    assert {"row", "matrix", "stack"} < matrix_names(found)
    assert not {"vector", "more"} & matrix_names(found)


def test_the_plan_counts_a_modules_weights_as_they_are_kept():
    without = lower(Decoder(HIDDEN, 40, 64, Embedding("e"), program(Plain()).decoder.blocks, None))
    wanted = [
        padded(4 * HIDDEN),  # vector
        padded(2 * HIDDEN),  # row, as float16
        padded(matrix_bytes("Q8_0", 512, HIDDEN)),
        padded(6 * matrix_bytes("Q4_K", 64, HIDDEN)),
        padded(4 * 2 * 2 * 3 * 5),
    ]
    assert resident_bytes(program(), types) - resident_bytes(without, types) == sum(wanted)


@dataclass(frozen=True)
class Plain(Module):
    """A module without tensors."""

    def tensors(self, hidden):
        return iter(())


def test_scratch_is_float32_on_every_runtime():
    (step,) = (step for step in program().steps if isinstance(step, Apply))
    assert [(key, buffer.columns, buffer.wide) for key, buffer in step.scratch] == [("some", 10, True)]


@pytest.mark.parametrize("norm", [True, False])
def test_the_plan_has_room_to_unpack_a_modules_matrices(norm):
    options = RuntimeOptions(max_tokens=64)
    narrow = 0 if norm else narrow_bytes(64, HIDDEN)
    need = narrow + 2 * HIDDEN * unpack_rows(HIDDEN, 512)
    assert scratch_bytes(program(norm=norm), types, options, 132) == max(need, 4 * 64 * HIDDEN)
    assert need > 4 * 64 * HIDDEN


@dataclass(frozen=True)
class Narrow(Module):
    """A quantised matrix of few rows, which takes little room unpacked."""

    def tensors(self, hidden):
        yield TensorSpec("matrix", (16, hidden))


@pytest.mark.parametrize("tokens", [33, 64, 300, 512, 2048])
def test_the_plan_has_room_to_put_a_modules_activations_in_order(tokens):
    options = RuntimeOptions(max_tokens=tokens, max_batch=1)
    assert scratch_bytes(program(Narrow()), types, options, 132) >= room_bytes(min(tokens, 512), HIDDEN)


@pytest.mark.parametrize("act", ["f16", "bf16"])
def test_macros_that_a_plugin_changes_later_are_another_object(act):
    """Kernels are found by the identity of their macros, so a plugin's own dict must never be what is kept."""
    own = {"PH_N": 1}
    given = with_act(own, act)
    own["PH_N"] = 2
    assert given["PH_N"] == 1
    assert with_act(own, act) is not own


def test_a_stack_is_one_matrix_whose_parts_begin_tiles():
    assert flat_shape("Q4_K", (6, 64, 256)) == (384, 256)
    assert flat_shape("F16", (6, 7, 5)) == (42, 5)
    assert flat_shape("Q8_0", (1, 7, 32)) == flat_shape("Q8_0", (7, 32)) == (7, 32)
    with pytest.raises(DeviceError, match=r"stack of Q8_0 matrices \[24, 32\].*tiles of 16 rows; set device: cpu"):
        flat_shape("Q8_0", (2, 24, 32))


@pytest.mark.parametrize("kind", ["Q4_K", "F16"])
def test_strides_of_a_stack_lead_from_matrix_to_matrix(kind):
    from polyhead.runtime.cuda.formats import DenseMatrix, QuantMatrix

    rows, cols = flat_shape(kind, (6, 64, 512))
    if kind == "F16":
        whole = DenseMatrix(Array(4096, (rows, cols), "f16"))
    else:
        whole = QuantMatrix(kind, rows, cols, Array(4096, QuantMatrix.shape_of(kind, rows, cols), "u8"))
    stack = Stack(whole, 6)
    assert (stack.count, stack.rows, stack.cols) == (6, 64, 512)
    assert stack.item_bytes == matrix_bytes(kind, 64, 512)
    assert stack.tile_bytes * math.ceil(64 / 16) == stack.item_bytes
    for index in (1, 5):
        part = whole.slice_rows(64 * index, 64 * (index + 1))
        assert part.data.ptr == whole.data.ptr + index * stack.item_bytes


def test_a_module_without_cuda_code_is_refused_by_name():
    both = ModuleKind(Several, cpu=lambda spec, weights: None, cuda=lambda spec, setup: None)
    assert [(step.name, kind) for step, kind in kinds_of(program(), {Several: both})] == [("blk.0.mlp", both)]
    check(program())
    with pytest.raises(PluginError, match=r"blk\.0\.mlp is a Several.*no CUDA implementation.*set device: cpu"):
        kinds_of(program(), {Several: ModuleKind(Several, cpu=lambda spec, weights: None)})
    with pytest.raises(PluginError, match=r"Several, for which no plugin registers a ModuleKind"):
        kinds_of(program(), {})


def test_a_cuda_that_cannot_be_called_is_refused():
    from polyhead import hookimpl

    class Plugin:
        @staticmethod
        @hookimpl
        def polyhead_register_modules():
            return [ModuleKind(Several, cpu=lambda spec, weights: None, cuda="several.cu")]

    with pytest.raises(PluginError, match=r"Several: cuda is 'several\.cu', expected a callable or None"):
        read_plugin(Plugin(), "several")


def test_head_sizes_are_still_checked():
    attn = Attention(1, 1, 512, SplitQKV(Linear("q"), Linear("k"), Linear("v")), Linear("o"))
    block = Block(RMSNorm("n", 1e-5), attn, None, Several())
    with pytest.raises(ConfigError, match="head_dim is 512"):
        check(lower(Decoder(HIDDEN, 40, 64, Embedding("e"), (block,), None)))
