"""Qwen3: the conformance kit with an independent reference, and that reference against transformers."""

from __future__ import annotations

import numpy as np
import polyhead_qwen3
import qwen3_reference
from polyhead.testing import Case, ConformanceTests


class TestQwen3(ConformanceTests):
    plugin = polyhead_qwen3
    case = Case(architecture="qwen3", metadata=qwen3_reference.METADATA, ids=qwen3_reference.IDS)

    def reference(self, metadata, weights, ids):
        return qwen3_reference.logits(metadata, weights, ids)


def test_the_reference_computes_what_transformers_does():
    with np.load(qwen3_reference.GOLDEN) as golden:
        expected = golden["logits"]
    weights = qwen3_reference.golden_weights()
    found = qwen3_reference.logits(qwen3_reference.METADATA, weights, qwen3_reference.IDS)
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
