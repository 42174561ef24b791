"""The conformance kit for each architecture with an independent reference, and that reference against transformers."""

from __future__ import annotations

from typing import Any

import moe_reference
import numpy as np
import polyhead_moe
import pytest
from moe_reference import IDS, METADATA, golden_weights
from polyhead.arch import Metadata
from polyhead.errors import ConfigError
from polyhead.testing import Case, ConformanceTests
from polyhead_moe.architectures import MixtralMoe, Qwen2Moe, Qwen3Moe
from polyhead_moe.layer import Experts

OPTIONAL = ("feed_forward_length", "expert_*_length", "expert_weights_*")


class Common(ConformanceTests):
    plugin = polyhead_moe

    def reference(self, metadata, weights, ids):
        return moe_reference.logits(self.case.architecture, metadata, weights, ids)


# The seeds are such that no row's choice of experts is close: half precision must not send a row elsewhere.


def sized(architecture: str, key: str) -> dict[str, Any]:
    """The metadata with experts of 48 rows: a GPU wants stacks of quantised matrices to be whole tiles of 16 rows."""
    return {**METADATA[architecture], key: 48}


class TestMixtral(Common):
    metadata = sized("llama", "feed_forward_length")
    case = Case(architecture="llama", metadata=metadata, ids=IDS, optional=OPTIONAL, seed=110)


class TestQwen2Moe(Common):
    metadata = sized("qwen2moe", "expert_feed_forward_length")
    case = Case(architecture="qwen2moe", metadata=metadata, ids=IDS, optional=OPTIONAL, seed=105)


class TestQwen3Moe(Common):
    metadata = sized("qwen3moe", "expert_feed_forward_length")
    case = Case(architecture="qwen3moe", metadata=metadata, ids=IDS, optional=OPTIONAL, seed=54)


@pytest.mark.parametrize("architecture", METADATA)
def test_the_reference_computes_what_transformers_does(architecture):
    with np.load(moe_reference.GOLDENS) as goldens:
        expected = goldens[architecture]
    found = moe_reference.logits(architecture, METADATA[architecture], golden_weights(architecture), IDS)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def read(architecture: str, kind: type, tensors: dict[str, tuple[int, ...]] | None = None, **changes: Any) -> Experts:
    values = {"general.architecture": architecture, **METADATA[architecture], **changes}
    shapes = dict(moe_reference.shapes(architecture)) if tensors is None else tensors
    full = {key if "general" in key else f"{architecture}.{key}": value for key, value in values.items()}
    return kind().block(Metadata({k: v for k, v in full.items() if v is not None}, shapes, architecture), 0).mlp


def test_sizes_default_as_in_llama_cpp():
    assert read("llama", MixtralMoe).size == 40
    assert read("qwen2moe", Qwen2Moe, expert_feed_forward_length=None).size == 72 // 3
    assert read("qwen3moe", Qwen3Moe, expert_feed_forward_length=None).size == 72 // 4
    assert read("qwen2moe", Qwen2Moe, expert_shared_feed_forward_length=None).shared.size == 72


def test_shares_are_normalised_and_scaled_as_the_file_says():
    assert (read("llama", MixtralMoe).normalise, read("qwen2moe", Qwen2Moe).normalise) == (True, False)
    assert read("qwen2moe", Qwen2Moe, expert_weights_norm=True).normalise
    assert read("qwen3moe", Qwen3Moe, expert_weights_scale=2.5).scale == 2.5
    assert read("qwen3moe", Qwen3Moe, expert_weights_scale=0.0).scale == 1.0


def test_the_shared_gate_may_be_a_row_or_a_vector():
    shapes = dict(moe_reference.shapes("qwen2moe"))
    name = "blk.0.ffn_gate_inp_shexp.weight"
    for shape in ((32,), (1, 32)):
        specs = {spec.name: spec.shape for spec in read("qwen2moe", Qwen2Moe, {**shapes, name: shape}).tensors(32)}
        assert specs[name] == shape


def test_what_would_run_wrongly_is_refused():
    with pytest.raises(ConfigError, match="used is 6, expected 1 to 5"):
        read("llama", MixtralMoe, expert_used_count=6)
    with pytest.raises(ConfigError, match=r"qwen3moe\.expert_count is 4096, expected at most 1024"):
        read("qwen3moe", Qwen3Moe, expert_count=4096)
    with pytest.raises(ConfigError, match=r"each expert by itself \(blk\.0\.ffn_gate\.0\.weight\)"):
        read("llama", MixtralMoe, {"blk.0.ffn_gate.0.weight": (40, 32)})
    with pytest.raises(ConfigError, match="neither"):
        read("llama", MixtralMoe, feed_forward_length=None)
    for key, value in {"expert_gating_func": 2, "expert_group_count": 4}.items():
        values = {f"qwen3moe.{k}": v for k, v in {**METADATA["qwen3moe"], key: value}.items()}
        with pytest.raises(ConfigError, match=f"{key} is {value}"):
            Qwen3Moe().decoder(Metadata(values, dict(moe_reference.shapes("qwen3moe")), "qwen3moe"))


def test_equal_scores_choose_the_first_experts():
    spec = Experts(4, 2, 8, "router", "gate", "up", "down")
    rng = np.random.default_rng(0)
    weights = {s.name: rng.standard_normal(s.shape).astype(np.float32) for s in spec.tensors(16)}
    x = rng.standard_normal((3, 16)).astype(np.float32)
    outs = []
    for experts in ([0, 1, 2, 3], [0, 1, 3, 2], [2, 3, 0, 1]):
        moved = {n: a[experts] if a.ndim == 3 else np.zeros_like(a) for n, a in weights.items()}
        out = np.empty_like(x)
        scratch = {name: np.empty((3, size), np.float32) for name, size in spec.scratch(16).items()}
        polyhead_moe.load_on_cpu(spec, moved)(x, out, scratch)
        outs.append(out)
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 0.1
