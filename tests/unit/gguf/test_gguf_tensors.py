"""Tensors: the index, raw bytes, and weights of every block format against the gguf package."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from polyhead.errors import TensorError, UnsupportedTypeError
from polyhead.gguf import BLOCK_TYPES, SUPPORTED_TYPES, open_gguf

import gguf

NUMBER = {kind.name: int(kind) for kind in gguf.GGMLQuantizationType}
PACKAGED = sorted(set(NUMBER) & SUPPORTED_TYPES)


def random_blocks(kind, weights, seed=0):
    size = BLOCK_TYPES[kind]
    return np.random.default_rng(seed).integers(0, 256, weights // size.weights * size.nbytes, np.uint8)


def tensor(name, kind, dims, seed=0):
    return name, dims, NUMBER[kind], None, random_blocks(kind, int(np.prod(dims)), seed).tobytes()


def expected(kind, data, shape):
    if kind == "F32":
        return data.view("<f4").reshape(shape)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]).reshape(shape)


def same(a, b):
    """Equal bit for bit, except that any NaN equals any other."""
    return a.shape == b.shape and bool(np.all((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))))


def test_block_sizes_and_numbers_are_those_of_the_gguf_package():
    known = {kind.name: tuple(size) for kind, size in gguf.GGML_QUANT_SIZES.items() if kind.name in BLOCK_TYPES}
    assert {name: tuple(BLOCK_TYPES[name]) for name in known} == known
    assert len(known) >= 30
    assert set(BLOCK_TYPES) >= SUPPORTED_TYPES


@pytest.mark.parametrize("kind", sorted(NUMBER.keys() & BLOCK_TYPES.keys()))
def test_the_index_names_type_size_and_shape(make, kind):
    with open_gguf(make.write(make.file(tensors=[tensor("w", kind, (512, 3, 2))]))) as file:
        info = file.tensors["w"]
        assert (info.name, info.type, info.shape, info.n_elements) == ("w", kind, (2, 3, 512), 3072)
        assert info.nbytes == 3072 // BLOCK_TYPES[kind].weights * BLOCK_TYPES[kind].nbytes
        assert np.array_equal(file.data("w"), random_blocks(kind, 3072))
        assert info.supported == (kind in SUPPORTED_TYPES)


# 768 weights: less than a piece; 2^18 + 1536: a piece and a rest that does not fill a row of the decoder
@pytest.mark.parametrize("dims", [(768, 1), (512, 515), (256, 4096)])
@pytest.mark.parametrize("kind", PACKAGED)
def test_weights_equal_those_of_the_gguf_package(make, kind, dims):
    data = random_blocks(kind, dims[0] * dims[1])
    with open_gguf(make.write(make.file(tensors=[tensor("w", kind, dims)]))) as file:
        weights = file.dequantise("w")
    assert weights.dtype == np.float32
    assert same(weights, expected(kind, data.reshape(dims[1], -1), dims[::-1]))


@pytest.mark.parametrize("kind", PACKAGED)
@pytest.mark.parametrize("rows", [slice(2, 5), slice(None, 1), slice(-2, None), slice(3, 3), slice(5, 2)], ids=str)
def test_a_range_of_rows_is_that_range_of_the_whole(make, kind, rows):
    with open_gguf(make.write(make.file(tensors=[tensor("w", kind, (256, 2, 7))]))) as file:
        assert same(file.dequantise("w", rows=rows), file.dequantise("w")[rows])


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q4_1", "Q8_0", "Q6_K"])
def test_out_may_be_rows_of_a_larger_array_and_nothing_else_is_touched(make, kind):
    with open_gguf(make.write(make.file(tensors=[tensor("w", kind, (256, 6))]))) as file:
        whole = np.full((20, 256), 7, np.float32)
        part = whole[3:9]
        assert file.dequantise("w", out=part) is part
        assert same(part, file.dequantise("w"))
        assert same(file.dequantise("w", out=whole[10:12], rows=slice(4, 6)), part[4:6])
        assert np.all(whole[:3] == 7)
        assert np.all(whole[9] == 7)
        assert np.all(whole[12:] == 7)


def test_out_that_does_not_fit_is_refused(make):
    with open_gguf(make.write(make.file(tensors=[tensor("w", "Q4_1", (64, 4))]))) as file:
        fixed = np.zeros((4, 64), np.float32)
        fixed.flags.writeable = False
        bad = [np.zeros((4, 64)), np.zeros((64, 4), np.float32), np.zeros((4, 128), np.float32)[:, ::2], fixed]
        for out in bad:
            with pytest.raises(ValueError, match="must be writeable"):
                file.dequantise("w", out=out)
        with pytest.raises(ValueError, match="step 1"):
            file.dequantise("w", rows=slice(None, None, 2))


def test_rows_of_a_vector_end_where_blocks_end(make):
    tensors = [tensor("q", "Q8_0", (128,)), make.f32("v", [1, 2, 3]), make.f32("m", [4, 5, 6])]
    with open_gguf(make.write(make.file(tensors=tensors))) as file:
        assert same(file.dequantise("q", rows=slice(32, 96)), file.dequantise("q")[32:96])
        assert file.dequantise("v", rows=slice(1, 2)).tolist() == [2]
        for rows in (slice(1, 33), slice(1, 32), slice(32, 65)):
            with pytest.raises(ValueError, match="block ends"):
                file.dequantise("q", rows=rows)


def test_a_tensor_without_dimensions_is_one_number(make):
    content = make.file(tensors=[("s", (), 0, None, np.float32(2.5).tobytes())])
    with open_gguf(make.write(content)) as file:
        assert file.tensors["s"].shape == ()
        assert file.dequantise("s") == 2.5
        with pytest.raises(ValueError, match="no rows"):
            file.dequantise("s", rows=slice(0, 1))


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
@pytest.mark.parametrize("kind", ["uint32", "uint64"])
def test_the_alignment_in_the_metadata_places_the_tensors(make, alignment, kind):
    tensors = [make.f32("a", [1, 2, 3]), make.f32("b", [4])]
    metadata = [make.number("general.alignment", kind, alignment)]
    with open_gguf(make.write(make.file(metadata, tensors, alignment=alignment))) as file:
        assert file.dequantise("a").tolist() == [1, 2, 3]
        assert file.dequantise("b").tolist() == [4]
        assert file.tensors["b"].offset - file.tensors["a"].offset == max(alignment, -(-12 // alignment) * alignment)
        assert file.tensors["a"].offset % alignment == 0


def test_tensors_keep_file_order_whatever_their_offsets(make):
    tensors = [make.f32("z", [1], offset=64), make.f32("a", [2], offset=0)]
    content = make.header(tensors=tensors)
    content += bytes(-len(content) % 32) + np.float32(2).tobytes() + bytes(60) + np.float32(1).tobytes()
    with open_gguf(make.write(content)) as file:
        assert list(file.tensors) == ["z", "a"]
        assert [float(file.dequantise(name)[0]) for name in file.tensors] == [1, 2]


def test_a_file_may_have_no_tensors(make):
    with open_gguf(make.write(make.file([make.number("a", "uint8", 1)]))) as file:
        assert dict(file.tensors) == {}
        assert file.metadata["a"] == 1
    with open_gguf(make.write(make.file())) as file:
        assert len(file.metadata) == len(file.tensors) == 0


def test_data_is_a_read_only_view_that_outlives_the_file(make):
    file = open_gguf(make.write(make.file(tensors=[make.f32("a", [1, 2])])))
    view = file.data("a")
    assert view.dtype == np.uint8
    assert not view.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    file.close()
    file.close()
    assert view.view("<f4").tolist() == [1, 2]
    for read in (file.data, file.dequantise):
        with pytest.raises(ValueError, match="is closed"):
            read("a")


def test_close_unmaps_the_file(make):
    path = make.write(make.file(tensors=[make.f32("a", [1, 2])]), "unmapped-or-not.gguf")

    def mapped():
        with open("/proc/self/maps") as maps:
            return path.name in maps.read()

    file = open_gguf(path)
    view = file.data("a")
    assert mapped()
    file.close()
    assert mapped()  # the view still needs it
    del view
    gc.collect()
    assert not mapped()
    with open_gguf(path) as again:
        assert mapped()
    assert not mapped()
    assert again.tensors["a"].shape == (2,)


def test_a_tensor_info_is_frozen_and_can_be_pickled(make):
    with open_gguf(make.write(make.file(tensors=[make.f32("a", [1])]))) as file:
        info = file.tensors["a"]
    with pytest.raises(FrozenInstanceError):
        info.name = "b"
    assert pickle.loads(pickle.dumps(info)) == info


def test_an_unknown_name_is_an_error_that_suggests_a_known_one(make):
    with open_gguf(make.write(make.file(tensors=[make.f32("blk.0.attn_q.weight", [1])]))) as file:
        for read in (file.info, file.data, file.dequantise):
            with pytest.raises(TensorError, match=r"Did you mean 'blk\.0\.attn_q\.weight'"):
                read("blk.0.attn_q.weigth")


def test_types_without_decoder_open_and_are_refused_all_at_once(make):
    tensors = [tensor("ints", "I32", (4,)), make.f32("fine", [1]), tensor("acts", "Q8_K", (256,))]
    with open_gguf(make.write(make.file(tensors=tensors))) as file:
        assert [info.supported for info in file.tensors.values()] == [False, True, False]
        assert file.data("ints").nbytes == 16
        with pytest.raises(UnsupportedTypeError) as caught:
            file.check_supported()
        assert all(word in str(caught.value) for word in ("2 tensors", "'ints' (I32)", "'acts' (Q8_K)", "Q4_K, Q5_K"))
        assert "fine" not in str(caught.value)
        with pytest.raises(UnsupportedTypeError, match=r"'ints' \(I32\)"):
            file.dequantise("ints")
        file.check_supported([file.tensors["fine"]])


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_memory_beside_the_result_stays_bounded(make, kind):
    dims = (2048, 8192)
    with open_gguf(make.write(make.file(tensors=[tensor("w", kind, dims)]))) as file:
        out = np.empty(dims[::-1], np.float32)
        file.dequantise("w", out=out[:1], rows=slice(0, 1))  # imports what it needs
        tracemalloc.start()
        try:
            file.dequantise("w", out=out)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 16 << 20 < out.nbytes


def test_threads_get_the_same_weights(make):
    kinds = ["Q4_1", "Q8_0", "Q4_K", "IQ2_XS", "F16", "Q4_0", "IQ4_NL", "BF16"]
    tensors = [tensor(f"{kind}.{i}", kind, (256, 64), seed=i) for i in range(4) for kind in kinds]
    with open_gguf(make.write(make.file(tensors=tensors))) as file, ThreadPoolExecutor(8) as pool:
        alone = {name: file.dequantise(name) for name in file.tensors}
        names = list(file.tensors) * 3
        for name, weights in zip(names, pool.map(file.dequantise, names), strict=True):
            assert same(weights, alone[name])
