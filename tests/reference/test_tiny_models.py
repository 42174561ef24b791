"""The builder of tiny models: its files are those that the goldens were computed from. Knows nothing of polyhead."""

from __future__ import annotations

from pathlib import Path

import golden
import numpy as np
import pytest
import tiny_models

import gguf


@pytest.mark.parametrize("name", tiny_models.SPECS)
def test_built_file_is_the_one_that_the_golden_was_computed_from(name: str, tmp_path: Path) -> None:
    tiny_models.build(name, tmp_path / "model.gguf")
    assert golden.sha256(tmp_path / "model.gguf") == golden.load(name).sha256


def test_every_golden_has_a_builder_and_every_builder_a_golden() -> None:
    assert golden.names() == list(tiny_models.SPECS)


@pytest.mark.parametrize("kind", tiny_models.LAYOUTS)
def test_random_blocks_are_finite_and_of_the_size_asked_for(kind: str, tmp_path: Path) -> None:
    tiny_models.build(f"gpt2-{kind.lower()}", tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    tensor = tensors["blk.0.ffn_up.weight"]
    assert tensor.tensor_type.name == kind
    weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert np.isfinite(weights).all()
    assert 0.5 < weights.std() / (1.3 / 16) < 1.5  # 1.3 / sqrt(256) was asked for; MXFP4 has powers of two only


@pytest.mark.parametrize("name", golden.names())
def test_golden_is_complete_and_agrees_with_itself(name: str) -> None:
    stored, spec = golden.load(name), tiny_models.SPECS[name]
    for sequence in stored.sequences:
        assert sequence.logits.shape == (len(sequence.positions), spec.vocab)
        assert sequence.positions[-1] == len(sequence.ids) - 1 < spec.context
    assert len(stored.greedy.tokens) == len(stored.greedy.margins) == 16
    assert stored.greedy.margins.min() > 0.02
    for key, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
        if stored.checkpoints:
            assert stored.checkpoints[key].shape == (len(stored.sequences[0].ids), heads, spec.head_dim)


def test_smollm2_golden_agrees_with_itself() -> None:
    stored = golden.load_smollm2()
    assert stored.nll == pytest.approx(stored.token_nll.astype(np.float64).mean(), abs=1e-6)
    for prompt in stored.prompts:
        assert prompt.top_ids[0] == prompt.greedy.tokens[0]
        assert prompt.top_logits[0] - prompt.top_logits[1] == pytest.approx(prompt.greedy.margins[0], abs=1e-4)
        shared = np.isin(prompt.some_ids, prompt.top_ids)
        assert (prompt.some_logits[~shared] <= prompt.top_logits[-1]).all()
