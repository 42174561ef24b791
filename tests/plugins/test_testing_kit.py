"""polyhead.testing: sound plugins pass, and each of its tests fails, in words, for a plugin that breaks just that."""

from __future__ import annotations

import _ctypes
import dataclasses
import inspect
import re
import shutil
import sys
import tempfile

import naive
import numpy as np
import polyhead_gpt_mha
import polyhead_llama_gqa
import polyhead_qwen3
import pytest
from broken_layers import LAYER_FAULTS, LAYERED, ON_CUDA
from broken_plugins import CASE, SOUND
from broken_plugins import FAULTS as PLUGIN_FAULTS
from kit_suite import GPT2, HEAD, LAYER_NORM, LLAMA, RMS_NORM, failure, skipped, suite
from polyhead.errors import DeviceError
from polyhead.runtime.cuda.compile_all import find_toolkit
from polyhead.testing import Case, ConformanceTests
from polyhead.testing import base as kit
from polyhead.testing.subject import Subject


class Conformance(ConformanceTests):
    """The reference is the naive computation in float64, of the plugin's own Decoder: it judges the kit."""

    def reference(self, metadata, weights, ids):
        (decoder,) = {each.decoder for each in self.variants() if each.shapes.keys() == weights.keys()}
        return naive.logits(decoder, weights, ids)


class TestLlama(Conformance):
    plugin = polyhead_llama_gqa
    case = LLAMA


class TestQwen2(Conformance):
    plugin = "polyhead_llama_gqa"
    case = Case("qwen2", RMS_NORM, tensors={"rope_freqs.weight": (8,)})


class TestGPT2(Conformance):
    plugin = polyhead_gpt_mha
    case = GPT2


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
