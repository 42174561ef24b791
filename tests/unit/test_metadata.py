"""Metadata: an architecture's typed view of a file. Kinds, bounds, values per layer, and what nobody read."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.arch import LinearScaling, Metadata, YarnScaling, read_rope
from polyhead.errors import ConfigError, MissingKeyError, TensorError

TENSORS = {"token_embd.weight": (10, 4), "norm.weight": (4,), "a": (1,), "b": (2,)}


def meta(architecture: str = "x", /, **values: Any) -> Metadata:
    """Metadata of ``x.key = value``; write ``a__b`` for ``a.b``."""
    full = {f"{architecture}.{key.replace('__', '.')}": value for key, value in values.items()}
    return Metadata({"general.architecture": architecture, **full}, TENSORS, architecture, "plug")


@pytest.mark.parametrize(
    ("kind", "value", "read"),
    [
        (int, 7, 7),
        (float, 0.5, 0.5),
        (float, 3, 3.0),
        (bool, True, True),
        (bool, False, False),
        (str, "a", "a"),
        (str, "", ""),
        (list, (1, 2), [1, 2]),
        (list, np.array([1, 2]).tolist(), [1, 2]),
    ],
)
def test_a_value_is_read_as_its_kind(kind, value, read):
    found = meta(key=value).get(kind, "key")
    assert found == read
    assert type(found) is type(read)


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "7", "an integer"),
        (int, 7.0, "an integer"),
        (int, True, "an integer"),
        (int, (7,), "an integer"),
        (float, True, "a number"),
        (float, "0.5", "a number"),
        (float, math.nan, "a finite number"),
        (float, math.inf, "a finite number"),
        (bool, 1, "bool"),
        (bool, "true", "bool"),
        (str, 5, "str"),
        (list, "ab", "a list"),
        (list, 5, "a list"),
    ],
)
def test_another_kind_is_refused_and_named(kind, value, expected):
    with pytest.raises(ConfigError) as error:
        meta(a__key=value).get(kind, "a.key")
    shown = "a list of 1 entries" if isinstance(value, tuple) else repr(value)
    assert str(error.value) == f"x.a.key is {shown}, expected {expected} (plugin plug)"


def test_the_message_about_a_long_value_stays_short():
    with pytest.raises(ConfigError) as error:
        meta(key="v" * 100_000).get(int, "key")
    assert len(str(error.value)) < 200


def test_bounds_are_inclusive_and_named():
    assert meta(key=3).get(int, "key", minimum=3, maximum=3) == 3
    with pytest.raises(ConfigError, match=r"^x\.key is 2, expected at least 3 \(plugin plug\)$"):
        meta(key=2).get(int, "key", minimum=3)
    with pytest.raises(ConfigError, match=r"^x\.key is 4, expected at most 3 \(plugin plug\)$"):
        meta(key=4).get(int, "key", maximum=3)


def test_an_absent_key_gives_the_default_as_it_is_or_an_error_that_names_key_and_plugin():
    assert meta().get(int, "key", None) is None
    assert meta().get(int, "key", -5, minimum=1) == -5
    with pytest.raises(MissingKeyError, match=r"no metadata key x\.key \(int\), which plugin plug needs"):
        meta().get(int, "key")


def test_full_keys_are_read_with_file_and_others_cannot_be_mistaken_for_own():
    data = Metadata({"general.file_type": 2, "xy.key": 1, "x.key": 5}, TENSORS, "x")
    assert data.file(int, "general.file_type") == 2
    assert data.get(int, "key") == 5
    assert data.file(int, "general.absent", 7) == 7
    assert data.unread() == []
    assert data.plugin == "x"  # until somebody says who reads


@given(values=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_a_list_gives_each_layer_its_value_and_a_number_gives_it_to_all(values):
    data = meta(block_count=len(values), each=tuple(values), all=6)
    assert [data.layer(int, "each", index) for index in range(len(values))] == values
    assert [data.layer(int, "all", index) for index in range(len(values))] == [6] * len(values)
    assert data.layer(int, "absent", 0, 3) == 3


def test_a_value_per_layer_is_checked_like_any_other():
    with pytest.raises(ConfigError, match=r"x\.each has 3 entries for 2 layers \(plugin plug\)"):
        meta(block_count=2, each=(1, 2, 3)).layer(int, "each", 0)
    with pytest.raises(ConfigError, match=r"x\.each\[1\] is 0, expected at least 1"):
        meta(block_count=2, each=(1, 0)).layer(int, "each", 1, minimum=1)
    with pytest.raises(ConfigError, match=r"x\.each\[0\] is 'a', expected an integer"):
        meta(block_count=1, each=("a",)).layer(int, "each", 0)
    with pytest.raises(MissingKeyError, match=r"x\.each"):
        meta(block_count=1).layer(int, "each", 0)


def test_arrays_of_an_open_file_are_read_as_lists(tmp_path):
    from polyhead.gguf import open_gguf

    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "x")
    writer.add_array("x.heads", [4, 2])
    writer.add_array("x.names", ["a", "b"])
    writer.add_uint32("x.block_count", 2)
    for name in ("a", "b"):
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(tmp_path / "x.gguf") as file:
        data = Metadata(file.metadata, {name: info.shape for name, info in file.tensors.items()}, "x")
        assert data.get(list, "heads") == [4, 2]
        assert data.get(list, "names") == ["a", "b"]
        assert [data.layer(int, "heads", index) for index in (0, 1)] == [4, 2]
        with pytest.raises(ConfigError, match="a list of 2 entries, expected an integer"):
            data.get(int, "heads")


def test_require_accepts_what_is_absent_or_equal_and_refuses_the_rest():
    data = meta(attention__causal=True, experts=0)
    data.require(attention__causal=True, experts=0, absent="anything")
    with pytest.raises(ConfigError, match=r"x\.experts is 0; plugin plug supports only 8\. .*wrong results"):
        data.require(experts=8)
    with pytest.raises(ConfigError, match=r"x\.attention\.causal is True; plugin plug supports only False"):
        data.require(attention__causal=False)


def test_a_key_is_read_by_get_layer_file_require_and_ignore_and_by_nothing_else():
    data = meta(block_count=1, got=1, each=(1,), filed=1, required=1, ignored__a=1, ignored__b=1, asked=1, left=1)
    data.get(int, "got")
    data.layer(int, "each", 0)
    data.file(int, "x.filed")
    data.require(required=1)
    data.ignore("ignored.*")
    assert data.has("asked")
    assert not data.has("absent")
    assert data.unread() == ["x.asked", "x.left"]
    # Keys of others are none of its business.
    assert "general.architecture" not in data.unread()


def test_a_key_that_was_refused_counts_as_read():
    data = meta(key="text")
    with pytest.raises(ConfigError):
        data.get(int, "key")
    assert data.unread() == []


def test_ignored_patterns_end_where_they_say():
    data = meta(rope=1, rope__scale=1, ropes=1)
    data.ignore("rope")
    assert data.unread() == ["x.rope.scale", "x.ropes"]


def test_the_count_of_layers_is_bounded_by_the_tensors_that_could_fill_them():
    assert meta(block_count=4).layers() == 4
    for wrong in (0, 5, 2**32 - 1):
        with pytest.raises(ConfigError, match=rf"x\.block_count is {wrong}, expected at (least 1|most 4)"):
            meta(block_count=wrong).layers()


def test_the_context_fits_positions_of_32_bits():
    assert meta(context_length=2**31 - 1).context() == 2**31 - 1
    for wrong in (0, 2**31):
        with pytest.raises(ConfigError, match=r"x\.context_length"):
            meta(context_length=wrong).context()


def test_a_vocab_size_may_leave_rows_for_padding_and_nothing_else():
    for fine in ({}, {"vocab_size": 1}, {"vocab_size": 10}):
        data = meta(**fine)
        assert data.vocab() == 10
        assert data.unread() == []
    for wrong in (0, -1, 11, 2**64 - 1, "10", 10.0, True, [10]):
        with pytest.raises(ConfigError, match=r"x\.vocab_size is .*expected"):
            meta(vocab_size=wrong).vocab()


def test_tensors_are_known_by_name_and_shape():
    data = meta()
    assert data.has_tensor("a")
    assert not data.has_tensor("z")
    assert data.optional("a") == "a"
    assert data.optional("z") is None
    assert data.tensor_shape("token_embd.weight") == (10, 4)
    assert data.vocab() == 10
    with pytest.raises(TensorError, match="no tensor z, which plugin plug needs"):
        data.tensor_shape("z")
    with pytest.raises(TensorError, match=r"norm\.weight has shape \[4\], expected two dimensions"):
        data.vocab("norm.weight")


def test_rope_is_read_with_defaults_for_what_the_file_lacks():
    plain = read_rope(meta(), 8, "half")
    assert (plain.theta, plain.dim, plain.pairing, plain.scaling, plain.factors) == (10000.0, 8, "half", None, None)
    full = read_rope(meta(rope__freq_base=5e5, rope__dimension_count=4), 8, "interleaved", factors="a")
    assert (full.theta, full.dim, full.factors) == (5e5, 4, "a")


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"type": "none"}, None),
        ({"type": "none", "factor": 8.0}, None),
        ({"factor": 1.0}, None),
        ({"factor": 0.0}, None),
        ({"factor": 4.0}, LinearScaling(4.0)),
        ({"type": "linear", "factor": 4.0, "finetuned": True}, LinearScaling(4.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32},
            YarnScaling(4.0, 32, magnitude=1 + 0.1 * math.log(4)),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 0.5, "yarn_beta_fast": 8.0},
            YarnScaling(4.0, 32, beta_fast=8.0, magnitude=0.5 * (1 + 0.1 * math.log(4))),
        ),
    ],
)
def test_rope_scaling_is_read_and_nothing_of_it_is_left_unread(keys, scaling):
    data = meta(**{f"rope__scaling__{key}": value for key, value in keys.items()})
    assert read_rope(data, 8, "half").scaling == scaling
    assert data.unread() == []


def test_the_old_key_for_linear_scaling_is_understood():
    assert read_rope(meta(rope__scale_linear=2.0), 8, "half").scaling == LinearScaling(2.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "longrope"}, r"x\.rope\.scaling\.type is 'longrope'; plugin plug supports none, linear, yarn"),
        ({"type": "yarn", "factor": 4.0}, r"no metadata key x\.rope\.scaling\.original_context_length"),
        ({"type": "yarn", "factor": 0.5, "original_context_length": 32}, r"YarnScaling: factor is 0\.5"),
        ({"type": "yarn", "factor": -1.0, "original_context_length": 32}, r"YarnScaling: factor is -1\.0"),
        ({"type": "linear", "factor": -2.0}, r"LinearScaling: factor is -2\.0"),
        ({"factor": math.inf}, r"x\.rope\.scaling\.factor is inf, expected a finite number"),
        ({"yarn_log_multiplier": 0.1}, r"yarn_log_multiplier is 0\.1; plugin plug supports only 0\.0"),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_ext_factor": 0.5},
            r"yarn_ext_factor is 0\.5; plugin plug supports only 1",
        ),
    ],
)
def test_rope_that_would_run_wrongly_is_refused_by_name(keys, message):
    with pytest.raises(ConfigError, match=message):
        read_rope(meta(**{f"rope__scaling__{key}": value for key, value in keys.items()}), 8, "half")
