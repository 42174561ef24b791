"""ConformanceTests: the whole suite, for a test class to inherit."""

from __future__ import annotations

from .kernels import KernelTests
from .keys import KeyTests
from .layers import LayerTests
from .loading import LoadingTests
from .logits import LogitTests
from .tensors import TensorTests


class ConformanceTests(LogitTests, KernelTests, LayerTests, TensorTests, KeyTests, LoadingTests):
    """Subclass it in a test file, give it ``plugin`` and ``case``, and run pytest; one subclass for each case.

    ``plugin`` is the module with the hookimpls, or its import name. Define ``reference(self, metadata, weights, ids)``
    to have logits compared with those of an independent computation, transformers or NumPy in float64: without it a
    wrong RoPE pairing or swapped matrices go unnoticed.
    """
