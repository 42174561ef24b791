"""polyhead.testing: sound plugins pass, and each of its tests fails, in words, for a plugin that breaks just that."""

from __future__ import annotations

import _ctypes
import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile

import naive
import numpy as np
import polyhead_gpt_mha
import polyhead_llama_gqa
import polyhead_qwen3
import pytest
import tolerance
from broken_layers import LAYER_FAULTS, LAYERED, ON_CUDA
from broken_plugins import CASE, SOUND
from broken_plugins import FAULTS as PLUGIN_FAULTS
from polyhead import LLM, SamplingParams
from polyhead.arch import Metadata
from polyhead.errors import ConfigError, DeviceError, PluginError
from polyhead.gguf import open_gguf
from polyhead.plugins import discover
from polyhead.runtime.cuda.compile_all import find_toolkit
from polyhead.testing import Case, ConformanceTests, make_model
from polyhead.testing import base as kit
from polyhead.testing.subject import Subject

BASE = {
    "block_count": 2,
    "context_length": 96,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
}
LAYER_NORM = {**BASE, "attention.layer_norm_epsilon": 1e-4}
RMS_NORM = {**BASE, "attention.layer_norm_rms_epsilon": 1e-5, "attention.head_count_kv": 2, "rope.freq_base": 1000.0}


class Conformance(ConformanceTests):
    """The reference is the naive computation in float64, of the plugin's own Decoder: it judges the kit."""

    def reference(self, metadata, weights, ids):
        (decoder,) = {each.decoder for each in self.variants() if each.shapes.keys() == weights.keys()}
        return naive.logits(decoder, weights, ids)


class TestLlama(Conformance):
    plugin = polyhead_llama_gqa
    case = Case("llama", {**RMS_NORM, "feed_forward_length": [96, 64], "vocab_size": 96, "rope.dimension_count": 16})


class TestQwen2(Conformance):
    plugin = "polyhead_llama_gqa"
    case = Case("qwen2", RMS_NORM, tensors={"rope_freqs.weight": (8,)})


class TestGPT2(Conformance):
    plugin = polyhead_gpt_mha
    case = Case("gpt2", LAYER_NORM)


class TestGPTNeoX(Conformance):
    plugin = polyhead_gpt_mha
    case = Case(
        "gptneox",
        {**LAYER_NORM, "rope.dimension_count": 8, "use_parallel_residual": True},
        optional=("use_parallel_residual",),
    )


class TestQwen3(Conformance):
    plugin = polyhead_qwen3
    case = Case("qwen3", {**RMS_NORM, "attention.key_length": 24, "attention.value_length": 24})


FAULTS = {**PLUGIN_FAULTS, **LAYER_FAULTS}
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


def cpu_tests() -> list[str]:
    return [name for name, _ in inspect.getmembers(ConformanceTests) if name.startswith("test_") and "cuda" not in name]


@pytest.mark.parametrize("name", FAULTS)
def test_a_plugin_fails_that(name, install):
    fault = FAULTS[name]
    install(fault.source)
    message = failure(suite("strange_module", fault.case), fault.test)
    assert re.search(fault.message, message), message


ELSEWHERE = {"test_the_installed_package_has_an_entry_point", "test_importing_the_plugin_touches_no_device"}


def test_every_test_of_the_kit_has_a_plugin_that_fails_it():
    assert {fault.test for fault in FAULTS.values()} | ELSEWHERE == set(cpu_tests())


@pytest.mark.parametrize("source", [SOUND, LAYERED], ids=["of the vocabulary", "with a layer of its own"])
def test_the_same_plugins_unbroken_pass(source, install):
    install(source)
    tests = suite("strange_module")
    for name in cpu_tests():
        if source is SOUND or "reference" not in name:
            getattr(tests, name)()


def test_a_module_that_touches_a_device_at_import_fails(install, tmp_path):
    (tmp_path / "site" / "cupy.py").write_text("")
    install("import cupy\n" + SOUND)
    message = failure(suite("strange_module"), "test_importing_the_plugin_touches_no_device")
    assert message.startswith("importing the plugin imports cupy, which costs every command time")


def test_a_decoder_that_touches_a_device_fails(install, tmp_path):
    (tmp_path / "site" / "cupy.py").write_text("")
    install(SOUND.replace("        head =", "        import cupy\n        head ="))
    message = failure(suite("strange_module"), "test_importing_the_plugin_touches_no_device")
    assert message.startswith("decoder() imports cupy, which costs every command time")


def test_a_module_that_loads_the_driver_at_import_fails(install, tmp_path):
    driver = tmp_path / "libcuda.so.1"
    shutil.copy(_ctypes.__file__, driver)
    install(f"import ctypes; ctypes.CDLL({str(driver)!r})\n" + SOUND)
    message = failure(suite("strange_module"), "test_importing_the_plugin_touches_no_device")
    assert message.startswith("importing the plugin loads the NVIDIA driver (libcuda)")


def test_a_module_that_only_this_process_knows_fails(monkeypatch):
    monkeypatch.setitem(sys.modules, "nowhere_module", sys.modules[__name__])
    message = failure(suite("nowhere_module"), "test_importing_the_plugin_touches_no_device")
    assert "in a fresh process the plugin does not load: ModuleNotFoundError" in message


def test_an_installed_package_without_its_entry_point_fails(install, tmp_path):
    install(SOUND, value="another_module")
    (tmp_path / "site" / "stranger-1.2.dist-info" / "top_level.txt").write_text("strange_module\n")
    message = failure(suite("strange_module"), "test_the_installed_package_has_an_entry_point")
    assert "the package stranger is installed, but no entry point of the group polyhead names strange_module" in message
    assert 'strange_module = "strange_module"' in message


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", ""),
        ("threadIdx.x;", "threadIdx.y y;", r"square\.cu.* does not compile for sm_80:(.|\n)*square\.cu\(3\): error"),
        ('extern "C" ', "", r"strange_module/square\.cu has no kernel square: is it extern"),
        ('#include "prelude.cuh"', "typedef float act_t;", r"does not compile for sm_80(.|\n)*ph_to_float"),
    ],
)
def test_cuda_source_is_compiled_where_it_can_be(install, old, new, message):
    install(ON_CUDA.replace(old, new))
    tests = suite("strange_module")
    try:
        find_toolkit()
    except DeviceError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert skipped(tests, "test_kernels_of_its_own_compile") == f"kernels cannot be compiled here: {reason}"
        return
    if message:
        assert re.search(message, failure(tests, "test_kernels_of_its_own_compile"))
    else:
        tests.test_kernels_of_its_own_compile()


def skipped(tests: ConformanceTests, name: str) -> str:
    with pytest.raises(pytest.skip.Exception) as error:
        getattr(tests, name)()
    return str(error.value)


def test_what_cannot_be_tested_is_skipped_with_its_reason(install, tmp_path, monkeypatch):
    from polyhead.runtime.cuda import probe

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "loose_plugin.py").write_text(HEAD + LAYERED)
    tests = suite("loose_plugin")
    assert "belongs to no installed package" in skipped(tests, "test_the_installed_package_has_an_entry_point")
    type(tests).reference = ConformanceTests.reference
    assert "no reference: give the class a method reference" in skipped(tests, "test_logits_equal_the_reference")
    if probe.probe().problem:
        assert skipped(tests, "test_cuda_prefill_equals_decode").startswith("no GPU: ")
    monkeypatch.delitem(sys.modules, "loose_plugin", raising=False)


def test_the_tests_for_a_gpu_judge_whatever_runtime_they_are_given(install, monkeypatch):
    install(SOUND)
    tests = suite("strange_module")
    monkeypatch.setattr(type(tests), "gpu", classmethod(lambda cls: "cpu"))
    names = [name for name in dir(tests) if name.startswith("test_cuda")]
    assert len(names) == 8
    for name in names:
        if name == "test_cuda_decode_replays_a_graph":
            assert failure(tests, name) == "12 decode steps on cpu captured no graph"
        else:
            getattr(tests, name)()


def test_the_kit_s_files_are_gone_before_any_other_code_of_the_author_s_runs(install, tmp_path, monkeypatch):
    """So that a run that is killed, by a time limit or while a slow reference computes, leaves none behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    install(SOUND)
    tests, left = suite("strange_module"), []
    original = type(tests).reference

    def reference(self, metadata, weights, ids):
        left.extend((tmp_path / "temporary").iterdir())
        return original(self, metadata, weights, ids)

    type(tests).reference = reference
    for name in cpu_tests():
        getattr(tests, name)()
        left.extend((tmp_path / "temporary").iterdir())
    assert not left


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("mine", "theirs"), [("gelu", "gelu_tanh"), ("gelu_tanh", "gelu")])
def test_the_other_form_of_gelu_is_told_apart_and_no_wrong_place_named(mine, theirs, seed, install):
    install(SOUND.replace("silu", mine))
    tests = suite("strange_module", dataclasses.replace(CASE, seed=seed), SOUND.replace("silu", theirs))
    message = failure(tests, "test_logits_equal_the_reference")
    assert "Token 0 agrees" not in message
    assert "the activation and its form (gelu or gelu_tanh)" in message


@pytest.mark.parametrize("seed", range(6))
def test_what_is_right_stays_well_below_the_bound(seed):
    """Twenty times what is usual, three times the worst: another BLAS may round otherwise."""
    for example in (TestLlama, TestQwen2, TestGPT2, TestGPTNeoX, TestQwen3):
        subject = Subject(example.plugin, dataclasses.replace(example.case, seed=seed))
        for variant in subject.variants:
            ids = subject.prompt(variant.decoder)
            expected = naive.logits(variant.decoder, variant.weights, ids)
            error = kit.error_of(subject.logits(variant.decoder, variant.weights, ids), expected)
            assert error < example.case.tolerance / 3


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("example", [TestGPT2, TestGPTNeoX])
def test_the_other_form_of_gelu_is_well_above_the_bound(example, seed):
    """Without a gate it shows least: around 1e-4, which was the bound once."""
    subject = Subject(example.plugin, dataclasses.replace(example.case, seed=seed))
    variant = subject.variants[0]
    ids, right = subject.prompt(variant.decoder), variant.decoder
    (form,) = {block.mlp.activation for block in right.blocks}
    other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}[form]
    blocks = [dataclasses.replace(each, mlp=dataclasses.replace(each.mlp, activation=other)) for each in right.blocks]
    wrong = subject.logits(dataclasses.replace(right, blocks=tuple(blocks)), variant.weights, ids)
    assert kit.error_of(wrong, naive.logits(right, variant.weights, ids)) > 5 * example.case.tolerance


def test_token_0_is_evidence_only_where_it_is_clearly_better():
    from polyhead.testing.logits import _where

    assert _where([4e-7, 3e-7, 2e-2], 1e-5).startswith("Token 0 agrees, token 2 is the first that does not (0.02)")
    assert "the scale and softcap of Attention" in _where([4e-7, 3e-7, 2e-2], 1e-5)
    assert _where([3e-4, 2e-2], 1e-5).startswith("Token 0, which sees itself alone, is 0.0003 off already: look at")
    for rows in ([9e-6, 1.2e-5], [9e-7, 2e-5]):
        message = _where(rows, 1e-5)
        assert "Token 0 agrees" not in message
        assert "It may be what acts on every token: norms" in message
        assert "Or what mixes them: the RoPE pairing" in message


def test_a_reference_of_another_shape_is_the_author_s_fault(install):
    install(SOUND)
    tests = suite("strange_module")
    type(tests).reference = lambda self, metadata, weights, ids: np.zeros((len(ids), 3))
    message = failure(tests, "test_logits_equal_the_reference")
    assert message == "reference() returned shape [12, 3], expected [12, 128] (tokens, vocabulary)"


def test_the_reference_gets_the_case_s_metadata_and_what_the_file_holds(install):
    install(SOUND)
    tests, seen = suite("strange_module"), []
    original = type(tests).reference

    def reference(self, metadata, weights, ids):
        seen.append((metadata, set(weights), ids))
        return original(self, metadata, weights, ids)

    type(tests).reference = reference
    tests.test_logits_equal_the_reference()
    assert [("output.weight" in names, metadata == CASE.metadata) for metadata, names, _ in seen] == [
        (True, True),
        (False, True),
    ]


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
    tried = Subject("polyhead_llama_gqa", TestLlama.case).variants
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
    make_model(path, polyhead_llama_gqa, TestLlama.case, quant)
    with open_gguf(path) as file:
        assert {file.tensors[name].type for name in ("token_embd.weight", "blk.1.ffn_up.weight")} == {quant or "F32"}
        assert file.tensors["output_norm.weight"].type == "F32"
    with LLM({"model": str(path), "device": "cpu"}) as llm:
        out = llm.generate("the sand", SamplingParams(max_tokens=5, ignore_eos=True))[0]
        assert len(out.token_ids) == 5
        assert llm.tokenizer.decode(llm.tokenizer.encode("the sand")) == "the sand"


def test_make_model_takes_a_registry_and_refuses_what_cannot_be(tmp_path):
    make_model(tmp_path / "tiny.gguf", discover(), TestGPT2.case)
    with pytest.raises(ConfigError, match="quant is 'Q4_K', expected one of F32, F16, Q4_0"):
        make_model(tmp_path / "other.gguf", polyhead_llama_gqa, TestLlama.case, "Q4_K")
    with pytest.raises(PluginError, match=r"does not load: ModuleNotFoundError"):
        make_model(tmp_path / "other.gguf", "surely_absent", TestLlama.case)


def test_weights_are_the_same_every_time(tmp_path):
    paths = [tmp_path / f"{name}.gguf" for name in "ab"]
    for path in paths:
        make_model(path, polyhead_llama_gqa, TestLlama.case)
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
