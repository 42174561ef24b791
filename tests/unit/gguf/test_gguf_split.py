"""Split models: the shards beside the first are one model; a shard that is absent or foreign is named."""

from __future__ import annotations

import numpy as np
import pytest
from polyhead.errors import CorruptFileError, MissingShardError, NotGGUFError
from polyhead.gguf import open_gguf

import gguf


def shards(make, count=3, changes=None, prefix="m"):
    """Writes ``count`` shards with two tensors each; ``changes`` maps (shard, key) to another value or None."""
    paths = []
    for i in range(count):
        claims = {"split.no": i, "split.count": count, "split.tensors.count": 2 * count}
        claims |= {key: value for (shard, key), value in (changes or {}).items() if shard == i}
        metadata = [make.number("llama.block_count", "uint32", 5)] if i == 0 else []
        metadata += [make.number(key, "uint16", value) for key, value in claims.items() if value is not None]
        tensors = [make.f32(f"t{i}.a", [i] * 3), make.f32(f"t{i}.b", [10 + i])]
        paths.append(make.write(make.file(metadata, tensors), f"{prefix}-{i + 1:05d}-of-{count:05d}.gguf"))
    return paths


def test_all_shards_open_as_one_model(make):
    paths = shards(make)
    with open_gguf(paths[0]) as file:
        assert file.paths == tuple(paths)
        assert file.metadata["llama.block_count"] == 5
        assert list(file.tensors) == ["t0.a", "t0.b", "t1.a", "t1.b", "t2.a", "t2.b"]
        assert [info.shard for info in file.tensors.values()] == [0, 0, 1, 1, 2, 2]
        for i in range(3):
            assert file.dequantise(f"t{i}.a").tolist() == [i] * 3
            assert file.dequantise(f"t{i}.b").tolist() == [10 + i]


def test_what_the_gguf_package_splits_is_one_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama", split_max_tensors=2)
    weights = {f"w{i}": np.full((2, 4), i, np.float32) for i in range(5)}
    for name, values in weights.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "big-00001-of-00003.gguf") as file:
        assert file.metadata["general.architecture"] == "llama"
        assert list(file.tensors) == list(weights)
        for name, values in weights.items():
            assert np.array_equal(file.dequantise(name), values)


def test_shards_are_looked_for_beside_a_link_not_beside_its_target(make, tmp_path):
    paths = shards(make)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for i, path in enumerate(paths):
        path.symlink_to(path.rename(blobs / f"blob{i}"))
    with open_gguf(paths[0]) as file:
        assert len(file.tensors) == 6


@pytest.mark.parametrize("which", [1, 2])
def test_opening_another_shard_names_the_first(make, which):
    paths = shards(make)
    with pytest.raises(MissingShardError, match=rf"part {which + 1} of 3 .*open the first, .*m-00001-of-00003\.gguf"):
        open_gguf(paths[which])


def test_absent_shards_are_named(make):
    paths = shards(make)
    paths[2].unlink()
    with pytest.raises(MissingShardError, match=r"1 of the other parts .*m-00003-of-00003\.gguf"):
        open_gguf(paths[0])


def test_a_renamed_first_shard_says_what_its_name_must_end_in(make):
    paths = shards(make)
    for name in ("renamed.gguf", "m-00001-of-00004.gguf", "m-00002-of-00003.gguf"):
        with pytest.raises(MissingShardError, match=r"-00001-of-00003\.gguf"):
            open_gguf(paths[0].rename(paths[0].with_name(name)))
        paths[0].with_name(name).rename(paths[0])


@pytest.mark.parametrize(
    ("shard", "key", "value", "found"),
    [
        (1, "split.no", 2, "2, expected 1"),
        (1, "split.no", None, "missing, expected 1"),
        (2, "split.count", 4, "4, expected 3"),
        (2, "split.tensors.count", 7, "7, expected 6"),
        (0, "split.tensors.count", None, "missing, expected 6"),
    ],
)
def test_a_shard_that_says_it_is_another_is_refused(make, shard, key, value, found):
    paths = shards(make, changes={(shard, key): value})
    with pytest.raises(MissingShardError) as caught:
        open_gguf(paths[0])
    assert f"{paths[shard]} does not belong" in str(caught.value)
    assert f"its {key} is {found}" in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(make):
    paths = shards(make, count=2)
    metadata = [make.number(f"split.{key}", "uint16", n) for key, n in (("no", 1), ("count", 2), ("tensors.count", 4))]
    make.write(make.file(metadata, [make.f32("t0.a", [1]), make.f32("x", [1])]), paths[1].name)
    with pytest.raises(MissingShardError, match=r"'t0\.a' is in m-00001-of-00002\.gguf already"):
        open_gguf(paths[0])


def test_an_error_in_a_shard_names_that_shard(make):
    paths = shards(make)
    paths[1].write_bytes(b"<html>")
    with pytest.raises(NotGGUFError, match=r"m-00002-of-00003\.gguf is not a GGUF"):
        open_gguf(paths[0])


def test_impossible_numbers_are_corrupt(make):
    for changes in ({(0, "split.no"): 3}, {(0, "split.count"): 0, (0, "split.no"): 1}):
        with pytest.raises(CorruptFileError, match="part number"):
            open_gguf(shards(make, changes=changes)[0])
    content = make.file([make.number("split.count", "int32", -1)])
    with pytest.raises(CorruptFileError, match=r"split\.count is -1"):
        open_gguf(make.write(content))
    with pytest.raises(CorruptFileError, match="of 4294967296"):
        open_gguf(make.write(make.file([make.number("split.count", "uint64", 1 << 32)])))


def test_a_count_of_one_is_not_split(make):
    with open_gguf(make.write(make.file([make.number("split.count", "uint16", 1)], [make.f32("w", [1])]))) as file:
        assert file.dequantise("w").tolist() == [1]
