"""The part of the suite about the plugin itself: it loads, touches no device, and describes models without state."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from types import ModuleType

import pytest

from ..arch import Block
from ..errors import PolyheadError, summary
from .alterations import alterations
from .base import Base, fail, shown
from .case import EMBEDDING
from .subject import Subject, Variant, installed

_DEVICE_LIBRARIES = "cuda cupy jax nvmath numba pycuda tensorflow torch transformers triton"
_IMPORT = """
import json, sys
path, module, names, case = json.load(sys.stdin)
sys.path[:] = path
from importlib.metadata import EntryPoint
from polyhead.plugins import discover
before = set(sys.modules)
def state():
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    loaded |= {name for name in sys.modules if name == "polyhead.runtime.cuda"}
    driver = any("libcuda.so" in line for line in open("/proc/self/maps"))
    return sorted(loaded & {*names.split(), "polyhead.runtime.cuda"}), driver
registry = discover(entry_points=[EntryPoint("subject", module, "polyhead")])
found = [state()]
if case and not registry.failures:
    registry.decoder(*case)
    found.append(state())
print(json.dumps([registry.plugins[0].reason, found]))
"""


class LoadingTests(Base):
    """Loading, importing, and decoder() and block() as pure functions."""

    def test_the_plugin_loads_as_an_installed_package_would(self) -> None:
        """Hooks are known, decorated and without defaults, api_version fits, the case's architecture is found."""
        self.subject()

    def test_the_installed_package_has_an_entry_point(self) -> None:
        """Only a package whose entry point names the module is found by polyhead."""
        name = _name(self.plugin)
        if installed(name):
            return
        top = name.partition(".")[0]
        owners = importlib.metadata.packages_distributions().get(top, [])
        if not owners:
            pytest.skip(f"{name} belongs to no installed package; pip install -e . to have its entry point tested")
        fail(
            f"the package {owners[0]} is installed, but no entry point of the group polyhead names {name}, so polyhead "
            f'never finds it. pyproject.toml needs [project.entry-points.polyhead] with: {top} = "{name}"; '
            "then install it again"
        )

    def test_importing_the_plugin_touches_no_device(self) -> None:
        """In a fresh process: no library of a device or a framework is imported, no driver loaded; nor by decoder()."""
        given = json.dumps([sys.path, _name(self.plugin), _DEVICE_LIBRARIES, self._described()])
        done = subprocess.run(
            [sys.executable, "-c", _IMPORT], input=given, capture_output=True, text=True, timeout=120, check=False
        )
        if done.returncode:
            fail(f"a fresh process cannot import the plugin: {done.stderr.strip()[-500:]}")
        reason, found = json.loads(done.stdout.splitlines()[-1])
        if reason:
            fail(f"in a fresh process the plugin does not load: {reason}")
        for doing, (libraries, driver) in zip(("importing the plugin", "decoder()"), found, strict=False):
            if libraries:
                fail(
                    f"{doing} imports {shown(libraries)}, which costs every command time and may take a "
                    "device; import it in the function that needs it"
                )
            if driver:
                fail(f"{doing} loads the NVIDIA driver (libcuda); ask for a device only when a model is loaded")

    @classmethod
    def _described(cls) -> list[object] | None:
        """Metadata and tensors of the case's model; None where other tests say why there is none."""
        try:
            subject = cls.made()
            first = subject.variants[0]
            subject.check(first)
        except PolyheadError:
            return None
        return [dict(subject.values), dict(first.shapes)]

    def test_decoder_is_pure_and_repeatable(self) -> None:
        """The same file gives an equal Decoder, whatever files were described before."""
        subject = self.subject()
        for variant in self.built():
            self.opened(variant, subject.claim)  # where this file is refused by itself, others are not to blame
            for label, other in _others(subject):
                _expect_equal(subject, variant, f"asked again after {label}", other)
            for full, _, others in alterations(subject):
                for value in others:
                    _expect_equal(subject, variant, f"asked again after a file with {full} = {value}", {full: value})

    def test_block_returns_the_layers_of_the_decoder(self) -> None:
        """block(meta, i) equals decoder(meta).blocks[i]: each layer can be asked for by itself."""
        subject = self.subject()
        for variant in self.variants():
            for index, expected in enumerate(variant.decoder.blocks):
                _, meta = subject.ask(subject.values, variant.shapes)
                try:
                    block = subject.architecture.block(meta, index)
                except (Exception, SystemExit) as error:
                    fail(f"block(meta, {index}) failed where decoder(meta) did not: {summary(error)}")
                if not isinstance(block, Block):
                    fail(f"block(meta, {index}) returned {type(block).__name__}, expected Block")
                if block != expected:
                    fail(f"block(meta, {index}) differs from decoder(meta).blocks[{index}]: {block} and {expected}")


def _name(plugin: ModuleType | str) -> str:
    return plugin if isinstance(plugin, str) else plugin.__name__


def _others(subject: Subject) -> list[tuple[str, Variant | Subject]]:
    """Files to be described in between: each variant, and one with a larger vocabulary."""
    case, decoder = subject.case, subject.variants[0].decoder
    same: list[tuple[str, Variant | Subject]] = [(f"a file {variant.label}", variant) for variant in subject.variants]
    if decoder.tokens.weight != EMBEDDING:
        return same
    size = case.vocab + 1
    metadata = {**case.metadata, "vocab_size": size} if "vocab_size" in case.metadata else case.metadata
    other = replace(case, metadata=metadata, tensors={**case.tensors, EMBEDDING: (size, decoder.hidden)})
    return [*same, (f"a file with {size} rows of {EMBEDDING}", Subject(subject.registry, other))]


def _expect_equal(subject: Subject, variant: Variant, when: str, other: Variant | Subject | dict[str, object]) -> None:
    try:
        if isinstance(other, dict):
            with suppress(Exception):  # refused; in words or not is another test's question
                subject.ask({**subject.values, **other}, variant.shapes)
        elif isinstance(other, Variant):
            subject.ask(subject.values, other.shapes)
        else:
            for strange in other.variants:
                other.claim(strange)
        again, _ = subject.ask(subject.values, variant.shapes)
    except (PolyheadError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        fail(f"decoder() failed when {when}: {summary(error)}. It must not remember other files")
    if again != variant.decoder:
        fail(f"decoder() returned another Decoder when {when}; it must depend on its meta alone")
