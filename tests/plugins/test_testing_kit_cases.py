"""polyhead.testing: what a case may say, how its problems are told, and the files that the kit makes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import polyhead_llama_gqa
import pytest
import tolerance
from broken_plugins import CASE, SOUND
from kit_suite import GPT2, LLAMA, failure, suite
from polyhead import LLM, SamplingParams
from polyhead.errors import ConfigError, PluginError
from polyhead.gguf import open_gguf
from polyhead.plugins import discover
from polyhead.testing import Case, ConformanceTests, make_model
from polyhead.testing import base as kit
from polyhead.testing.subject import Subject


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": {"block_count": None}}, "metadata 'block_count' is None, expected a string, bool, int"),
        ({"tensors": {"token_embd.weight": [96, 32]}}, r"tensors 'token_embd\.weight' is \[96, 32\], expected a tuple"),
        ({"ids": (5, 128)}, r"ids holds a token outside the vocabulary \(0 to 127\)"),
        ({"tolerance": 0.0}, "tolerance is 0.0, expected a number between 0 and 1"),
        ({"optional": "rope.freq_base"}, "optional is 'rope.freq_base', expected a tuple of keys"),
        ({"metadata": {"vocab_size": 3}}, "the vocabulary has 3 rows, expected at least 8"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Case(**{"architecture": "mine", "metadata": CASE.metadata, **change})


def test_a_case_of_a_real_model_s_size_is_refused(install):
    install(SOUND)
    huge = Case("mine", {**CASE.metadata, "embedding_length": 4096})
    assert "weights; take tiny sizes" in failure(suite("strange_module", huge), "test_every_weight_matters")


def test_a_shape_that_the_plugin_reads_first_must_be_in_the_case(install):
    read = "meta.tensor_shape('blk.0.ffn_up.weight')[0] + 0 * meta.get(int, 'feed_forward_length')"
    install(SOUND.replace('meta.get(int, "feed_forward_length", minimum=1)', read))
    message = failure(suite("strange_module"), "test_prefill_equals_decode")
    assert "Case(tensors={'blk.0.ffn_up.weight': (rows, columns)})" in message
    known = Case("mine", CASE.metadata, tensors={"blk.0.ffn_up.weight": (64, 32)})
    suite("strange_module", known).test_prefill_equals_decode()


def test_a_test_class_without_plugin_or_case_says_what_to_write():
    class Empty(ConformanceTests):
        pass

    assert failure(Empty(), "test_prefill_equals_decode").startswith(
        "Empty has no plugin; write `plugin = your_module`"
    )


def test_a_case_that_is_refused_with_and_without_optional_tensors_says_why_for_both(install):
    install(
        SOUND.replace("        head =", "        if meta.has_tensor('odd'): raise ConfigError('odd')\n        head =")
    )
    none = Case("mine", {**CASE.metadata, "attention.head_count": 5})
    with pytest.raises(ConfigError) as error:
        _ = Subject("strange_module", none).variants
    assert str(error.value) == "without optional tensors: heads do not divide the width\nwith all of them: odd"


def test_optional_tensors_are_tried_present_and_absent(install):
    install(SOUND)
    variants = Subject("strange_module", CASE).variants
    assert [variant.decoder.head is not None for variant in variants] == [True, False]
    # Biases of a family whose files come with any or none of them.
    tried = Subject("polyhead_llama_gqa", LLAMA).variants
    assert [variant.decoder.blocks[1].attn.qkv.k.bias for variant in tried] == ["blk.1.attn_k.bias", None]
    # One that means "refuse this file" stays away.
    install(
        SOUND.replace("        head =", "        if meta.has_tensor('odd'): raise ConfigError('odd')\n        head ="),
        name="picky",
        distribution="pickers",
    )
    assert [variant.decoder.head is not None for variant in Subject("picky_module", CASE).variants] == [True, False]


WIDE_NORM = Case("mine", CASE.metadata, tensors={"blk.0.attn_q_norm.weight": (32,)})
NORMED = SOUND.replace('"half"),', '"half"), q_norm=RMSNorm(name("attn_q_norm"), self.eps(meta)),')


def test_a_norm_over_all_heads_is_not_blamed_on_another_file(install):
    install(NORMED)
    message = failure(suite("strange_module", WIDE_NORM), "test_decoder_is_pure_and_repeatable")
    assert "blk.0.attn_q_norm.weight is [32] in the file, blocks[0].attn.q_norm needs [8]" in message
    assert "q_norm and k_norm act on each head by itself" in message
    assert "remember" not in message


def test_a_stale_key_of_the_case_gets_advice_for_an_author(install):
    install(SOUND)
    stale = Case("mine", {**CASE.metadata, "pooling_type": 1})
    message = failure(suite("strange_module", stale), "test_every_metadata_key_of_the_case_is_read")
    assert "does not know the metadata mine.pooling_type = 1" in message
    assert "Read it with meta.get, name it with meta.ignore if it changes nothing, or drop it from the case" in message
    assert "model.ignore_metadata" not in message


CASES = {
    "a case without a key": (SOUND, {"attention.head_count": None}, "no metadata key mine.attention.head_count (int)"),
    "a case with a stale key": (SOUND, {"pooling_type": 1}, "does not know the metadata mine.pooling_type = 1"),
    "a field of another type": (SOUND.replace("head=Linear(head) if", "head=head if"), {}, "head is 'output.weight'"),
    "a norm over all heads": (NORMED, {}, "attn_q_norm.weight is [32] in the file"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_every_test_of_a_class_meets_is_said_once_and_fails_them_all(name, install, tmp_path):
    source, changes, message = CASES[name]
    install(source)
    metadata = {key: value for key, value in {**CASE.metadata, **changes}.items() if value is not None}
    tensors = WIDE_NORM.tensors if source is NORMED else {}
    (tmp_path / "test_mine.py").write_text(
        "from polyhead.testing import Case, ConformanceTests\n\n\nclass TestMine(ConformanceTests):\n"
        f"    plugin = 'strange_module'\n    case = Case('mine', {metadata!r}, tensors={tensors!r})\n"
        "\n    def reference(self, metadata, weights, ids): ...\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "-k", "not cuda", "test_mine.py"]
    paths = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    out = done.stdout
    assert out.count(message) == 1, out
    failed = int(re.search(r"(\d+) failed", out)[1])
    assert failed >= 14, out
    assert (
        len(re.findall(r"^see the first failure, test_\w+: this test met the same$", out, re.MULTILINE)) == failed - 1
    )


def test_a_tensor_that_the_case_itself_has_may_be_unused(install):
    install(SOUND.replace("unused=()", "unused=('blk.0.attn_q.bias',)"))
    named = Case("mine", CASE.metadata, tensors={"blk.0.attn_q.bias": (32,)})
    suite("strange_module", named).test_a_surplus_tensor_is_refused()
    assert "blk.0.attn_q.bias is accepted" in failure(suite("strange_module"), "test_a_surplus_tensor_is_refused")


@pytest.mark.parametrize("quant", [None, "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_make_model_writes_a_file_that_runs(quant, tmp_path):
    path = tmp_path / "tiny.gguf"
    make_model(path, polyhead_llama_gqa, LLAMA, quant)
    with open_gguf(path) as file:
        assert {file.tensors[name].type for name in ("token_embd.weight", "blk.1.ffn_up.weight")} == {quant or "F32"}
        assert file.tensors["output_norm.weight"].type == "F32"
    with LLM({"model": str(path), "device": "cpu"}) as llm:
        out = llm.generate("the sand", SamplingParams(max_tokens=5, ignore_eos=True))[0]
        assert len(out.token_ids) == 5
        assert llm.tokenizer.decode(llm.tokenizer.encode("the sand")) == "the sand"


def test_make_model_takes_a_registry_and_refuses_what_cannot_be(tmp_path):
    make_model(tmp_path / "tiny.gguf", discover(), GPT2)
    with pytest.raises(ConfigError, match="quant is 'Q4_K', expected one of F32, F16, Q4_0"):
        make_model(tmp_path / "other.gguf", polyhead_llama_gqa, LLAMA, "Q4_K")
    with pytest.raises(PluginError, match=r"does not load: ModuleNotFoundError"):
        make_model(tmp_path / "other.gguf", "surely_absent", LLAMA)


def test_weights_are_the_same_every_time(tmp_path):
    paths = [tmp_path / f"{name}.gguf" for name in "ab"]
    for path in paths:
        make_model(path, polyhead_llama_gqa, LLAMA)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_only_the_test_class_needs_pytest():
    code = (
        "import sys; sys.modules['pytest'] = None\n"
        "import polyhead, polyhead.testing\n"
        "from polyhead.testing import Case, make_model\n"
        "try:\n    from polyhead.testing import ConformanceTests\n"
        "except ImportError as error:\n    message = str(error)\n"
        "sys.exit(0 if 'needs pytest: pip install pytest' in message else message)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_kit_s_bounds_are_those_of_the_project_s_table():
    assert (kit.CPU_NOISE, kit.CUDA_LOGITS) == (tolerance.CPU_BLOCK, tolerance.CUDA_LOGITS)
    assert Case("mine", CASE.metadata).tolerance == tolerance.CPU_TINY_LOGITS
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7))
    assert kit.error_of(a, b) == tolerance.error(a, b)
    assert kit.error_of(a, b[:4]) == kit.error_of(a * np.nan, b) == np.inf
