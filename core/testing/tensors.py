"""The part of the suite about tensors: the tree claims what a file holds, and every one changes what is computed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..arch import Attention, Decoder, SplitQKV
from ..errors import PolyheadError, summary
from ..model import Model
from ..weights import claim
from .base import CPU_NOISE, CUDA_LOGITS, Base, error_of, fail, run, shown
from .case import Case
from .memory import Info
from .steps import logits_of
from .subject import Subject, Variant

F32 = NDArray[np.float32]
QUANTS = ("F16", "Q8_0", "Q4_0")
_SURPLUS = ("polyhead_testing.surplus.weight", "blk.0.polyhead_testing.weight")


class TensorTests(Base):
    """Claims, weights that matter, and quantised files."""

    def test_the_tree_claims_every_tensor_of_a_file_once(self) -> None:
        """A real file with exactly these tensors opens, and describes the same model as its metadata alone."""
        subject = self.subject()
        for variant in self.variants():
            try:
                with subject.file(variant) as (path, _), Model(path, subject.registry) as model:
                    decoder = model.decoder
            except PolyheadError as error:
                fail(f"a file {variant.label} cannot be opened: {error}")
            if decoder != variant.decoder:
                fail(f"a file {variant.label} gives another Decoder than its metadata and tensors did in memory")

    def test_a_missing_tensor_is_named(self) -> None:
        """Without any one tensor there is an error that names it, unless the plugin asked whether it is there."""
        subject = self.subject()
        for variant in self.variants():
            for name in {spec.name: None for spec in variant.decoder.tensors()}:
                shapes = {other: shape for other, shape in variant.shapes.items() if other != name}
                try:
                    decoder, _ = subject.ask(subject.values, shapes)
                    claim(decoder, {other: Info(shape) for other, shape in shapes.items()})
                except PolyheadError as error:
                    if name not in variant.asked and name not in str(error):
                        fail(f"without the tensor {name} the error does not name it: {error}")
                except (Exception, SystemExit) as error:
                    fail(f"without the tensor {name} the plugin raises {summary(error)}, expected a TensorError")
                else:
                    if name not in variant.asked:
                        fail(f"a file without the tensor {name} is accepted, though the plugin never asked for it")

    def test_a_surplus_tensor_is_refused(self) -> None:
        """A tensor that nothing reads must not pass in silence: Decoder.unused may only name known ones."""
        for variant in self.variants():
            for name in _surplus(self.case, variant):
                infos = {other: Info(shape) for other, shape in variant.shapes.items()}
                try:
                    claim(variant.decoder, {**infos, name: Info((3,))})
                except PolyheadError as error:
                    if name not in str(error):
                        fail(f"the error for the surplus tensor {name} does not name it: {error}")
                    continue
                fail(
                    f"a file with the surplus tensor {name} is accepted: Decoder.unused is {variant.decoder.unused!r}, "
                    "which excuses tensors that the model may need; name those that do not matter"
                )

    def test_every_weight_matters(self) -> None:
        """Zeroing any tensor changes the logits; one that does not is claimed and never used."""
        self._every_weight_matters("cpu")

    def test_cuda_every_weight_matters(self) -> None:
        """The same on a GPU."""
        self._every_weight_matters(self.gpu())

    def test_quantised_files_agree_with_their_dequantised_weights(self) -> None:
        """A file of F16, Q8_0 or Q4_0 gives what its weights give as float32."""
        self._quantised("cpu", CPU_NOISE)

    def test_cuda_quantised_files_agree_with_their_dequantised_weights(self) -> None:
        """The same on a GPU, against the CPU runtime."""
        self._quantised(self.gpu(), CUDA_LOGITS)

    def _every_weight_matters(self, device: str) -> None:
        subject = self.subject()
        # Each tensor costs a load, which takes longer on a GPU.
        for variant in self.variants() if device == "cpu" else [self.first()]:
            ids = subject.prompt(variant.decoder)
            before = run(subject, variant, variant.weights, ids, device)
            idle = []
            for name, neutral in _neutral(variant).items():
                changed = {**variant.weights, name: np.full_like(variant.weights[name], neutral)}
                try:
                    after = subject.logits(variant.decoder, changed, ids, device)
                except PolyheadError:  # refused, so it was looked at
                    continue
                if error_of(after, before) < CPU_NOISE:
                    idle.append(f"{name} ({_owner(variant, name)})")
            if idle:
                fail(f"on {device}, {variant.label}, zeroing these tensors changes no logit: {shown(idle)}")

    def _quantised(self, device: str, tolerance: float) -> None:
        subject, variant = self.subject(), self.first()
        ids = subject.prompt(variant.decoder)
        for kind in QUANTS:
            try:
                with subject.file(variant, kind) as (path, held):
                    found = _from_file(subject, path, ids, device)
            except PolyheadError as error:
                fail(f"a file with matrices of type {kind} does not run on {device}: {error}")
            expected = run(subject, variant, held, ids, "cpu")
            off = error_of(found, expected)
            if off >= tolerance:
                fail(
                    f"a file with matrices of type {kind} on {device} is {off:.2g} off its own weights as float32, "
                    f"expected less than {tolerance:g} (‖difference‖ / ‖logits‖)"
                )


def _surplus(case: Case, variant: Variant) -> list[str]:
    """Tensors that the tree lacks, and most likely to be missed: biases, and norms on what a matrix gives.

    One that the case itself gives a shape is there on purpose.
    """
    stems = [name.removesuffix(".weight") for name in variant.shapes if name.endswith(".weight")]
    names = [*_SURPLUS, *(f"{stem}.bias" for stem in stems), *(f"{stem}_norm.weight" for stem in stems)]
    return [name for name in names if name not in variant.shapes and name not in case.tensors]


def _from_file(subject: Subject, path: object, ids: list[int], device: str) -> F32:
    with Model(str(path), subject.registry) as model, subject.loaded(model.decoder, model.file, device) as loaded:
        return logits_of(loaded, ids)


def _owner(variant: Variant, name: str) -> str:
    return next(spec.owner for spec in variant.decoder.tensors() if spec.name == name)


def _neutral(variant: Variant) -> Mapping[str, float]:
    """Every tensor that must matter, and the value that takes it out: RoPE factors divide, so 1; all others 0."""
    blind = set(_blind(variant.decoder))
    return {
        spec.name: 1.0 if spec.owner.endswith("rope.factors") else 0.0
        for spec in variant.decoder.tensors()
        if spec.name not in blind
    }


def _blind(decoder: Decoder) -> list[str]:
    """Key biases that softmax cannot see: without rotation, norm or cap they move all scores of a query alike."""
    names = []
    for block in decoder.blocks:
        attn: Attention = block.attn
        plain = attn.rope is None and attn.k_norm is None and attn.softcap is None
        if plain and isinstance(attn.qkv, SplitQKV) and attn.qkv.k.bias is not None:
            names.append(attn.qkv.k.bias)
    return names
