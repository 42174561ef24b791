"""The GPU tests passed on these very sources: machines without a GPU cannot run them, but they can hold this."""

from __future__ import annotations

import json

import cuda_sources
import pytest


def test_the_recorded_gpu_run_is_of_the_present_cuda_sources() -> None:
    if not cuda_sources.LAST_RUN.exists():
        pytest.skip(f"there is no {cuda_sources.LAST_RUN.name} yet; {cuda_sources.HOW}")
    record = json.loads(cuda_sources.LAST_RUN.read_text())
    # A failure of the machine's doing counts as passed only where the record says in which run, and why it failed here.
    elsewhere = record.get("passed_in_another_run", {"tests": 0, "why": ""})
    assert elsewhere["tests"] == 0 or elsewhere["why"], "the record does not say why tests failed"
    assert record["failed"] == elsewhere["tests"], f"the recorded GPU run failed; {cuda_sources.HOW}"
    assert record["passed"] > 0, f"the recorded GPU run tested nothing; {cuda_sources.HOW}"
    left_out = record["skipped"] + record["deselected"]
    assert left_out == 0, f"the recorded GPU run left out {left_out} tests; {cuda_sources.HOW}"
    assert record["sources_sha256"] == cuda_sources.digest(), (
        f"the CUDA runtime changed since {record['date']} ({record['device']}); {cuda_sources.HOW}"
    )


def test_the_digest_covers_python_and_cuda_sources() -> None:
    names = {path.name for path in cuda_sources.source_files()}
    assert {"device.py", "prelude.cuh"} <= names
