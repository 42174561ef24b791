"""What tests of polyhead.testing share: a test class as a plugin's author writes it, and how its tests end."""

from __future__ import annotations

import naive
import pytest
from broken_plugins import CASE, SOUND
from polyhead.arch import Metadata
from polyhead.testing import Case, ConformanceTests

BASE = {
    "block_count": 2,
    "context_length": 96,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
}
LAYER_NORM = {**BASE, "attention.layer_norm_epsilon": 1e-4}
RMS_NORM = {**BASE, "attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": 2, "rope.freq_base": 1000.0}
LLAMA = Case("llama", {**RMS_NORM, "feed_forward_length": [96, 64], "vocab_size": 96, "rope.dimension_count": 16})
GPT2 = Case("gpt2", LAYER_NORM)

HEAD = "from polyhead import ModuleKind, hookimpl\nfrom polyhead.arch import *\n"


def suite(plugin: str, case: Case = CASE, source: str = SOUND) -> ConformanceTests:
    """A test class for a plugin, as its author would write it; the reference knows the sound plugin's Decoder."""

    class Suite(ConformanceTests):
        def reference(self, metadata, weights, ids):
            sound: dict[str, type] = {}
            exec(HEAD + source, sound)
            shapes = {name: array.shape for name, array in weights.items()}
            decoder = sound["Mine"]().decoder(Metadata(CASE.values(), shapes, "mine"))
            return naive.logits(decoder, weights, ids)

    Suite.plugin, Suite.case = plugin, case
    return Suite()


def failure(tests: ConformanceTests, name: str) -> str:
    with pytest.raises(pytest.fail.Exception) as error:
        getattr(tests, name)()
    return str(error.value)


def skipped(tests: ConformanceTests, name: str) -> str:
    with pytest.raises(pytest.skip.Exception) as error:
        getattr(tests, name)()
    return str(error.value)
