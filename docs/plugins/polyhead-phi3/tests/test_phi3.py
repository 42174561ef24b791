"""Phi-3: the conformance kit on three members of the family, their reference against transformers, and refusals."""

from __future__ import annotations

import numpy as np
import phi3_reference
import polyhead_phi3
import pytest
from phi3_reference import CASES, IDS, MINI, PHI4, PHI4_MINI
from polyhead.arch import Metadata
from polyhead.errors import ConfigError, MissingKeyError, TensorError
from polyhead.testing import Case, ConformanceTests

FACTORS = {"rope_factors_short.weight": (3,), "rope_factors_long.weight": (3,)}


class Phi3Tests(ConformanceTests):
    plugin = polyhead_phi3

    def reference(self, metadata, weights, ids):
        return phi3_reference.logits(metadata, weights, ids)


class TestMini(Phi3Tests):
    """Phi-3-mini-4k: multi-head attention within a window."""

    case = Case(architecture="phi3", metadata=MINI, ids=IDS)


class TestPhi4(Phi3Tests):
    """Phi-4: grouped-query attention."""

    case = Case(architecture="phi3", metadata=PHI4, ids=IDS)


class TestPhi4Mini(Phi3Tests):
    """Phi-4-mini: a part of each head rotated, LongRoPE within its original context, tied head."""

    case = Case(architecture="phi3", metadata=PHI4_MINI, ids=IDS, tensors={**FACTORS, "output.weight": None})


@pytest.mark.parametrize("name", CASES)
def test_the_reference_computes_what_transformers_does(name):
    with np.load(phi3_reference.GOLDEN) as golden:
        expected = golden[name]
    found = phi3_reference.logits(CASES[name], phi3_reference.golden_weights(CASES[name]), IDS)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def decoder(metadata, *tensors):
    shapes = {"token_embd.weight": (67, 32), "output_norm.weight": (32,), **dict.fromkeys(tensors, (3,))}
    values = {f"phi3.{key}": value for key, value in metadata.items()}
    (architecture,) = polyhead_phi3.polyhead_register_architectures()
    return architecture.decoder(Metadata(values, shapes, "phi3"))


def test_the_context_of_a_longrope_file_is_the_original_one():
    assert decoder(PHI4_MINI, *FACTORS).context == 20
    assert decoder(PHI4_MINI | {"context_length": 16}, *FACTORS).context == 16
    assert decoder(MINI).context == 64


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        (PHI4_MINI, (), r"phi3\.rope\.scaling\.attn_factor is 1\.\d+; .* supports only 1\.0"),
        (MINI, FACTORS, r"no metadata key phi3\.rope\.scaling\.attn_factor"),
        (MINI | {"rope.scaling.type": "yarn"}, (), r"phi3\.rope\.scaling\.type is 'yarn' in a file without rope_fac"),
        (PHI4_MINI | {"rope.scaling.type": "linear"}, FACTORS, r"is 'linear' in a file with rope_factors_sh"),
        (MINI | {"attention.head_count": 5}, (), r"embedding_length is 32, which .*head_count \(5\) does not divide"),
    ],
)
def test_what_would_run_wrongly_is_refused(metadata, tensors, message):
    with pytest.raises(ConfigError, match=message):
        decoder(metadata, *tensors)


@pytest.mark.parametrize("name", FACTORS)
def test_one_set_of_factors_alone_is_refused(name):
    with pytest.raises(TensorError, match="LongRoPE needs both"):
        decoder(PHI4_MINI, name)


@pytest.mark.parametrize("key", ["attention.sliding_window", "rope.scaling.original_context_length"])
def test_a_file_that_does_not_say_is_refused(key):
    with pytest.raises(MissingKeyError, match=f"no metadata key phi3.{key}"):
        decoder({name: value for name, value in PHI4_MINI.items() if name != key}, *FACTORS)
