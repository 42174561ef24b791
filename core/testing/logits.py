"""The part of the suite about logits: causality, prefill and decode, batches, and the author's reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ..engine import SamplingParams
from ..errors import PolyheadError
from .base import CPU_NOISE, CUDA_LOGITS, CUDA_NOISE, Base, error_of, fail, run
from .memory import MemorySource
from .steps import batch_of, logits_of
from .subject import Subject, Variant

if TYPE_CHECKING:
    from ..llm import LLM

F32 = NDArray[np.float32]
_BLOCK = 8
_GREEDY = 8
_CLEARLY = 100
"""Times that another token's error must be that of token 0 for its agreeing to mean something."""
_EACH = (
    "norms and their eps, the activation and its form (gelu or gelu_tanh), the order of gate and up, that in fused "
    "matrices, biases, learned positions, the residual form, embedding_scale, residual_scale and logit_scale, "
    "logit_softcap, the head"
)
_MIXING = (
    "the RoPE pairing, theta, dim and scaling, the order of heads, kv_heads, q_norm and k_norm, the window, the scale "
    "and softcap of Attention"
)


class LogitTests(Base):
    """What must hold for every model, whatever its weights; on the CPU, and on a GPU where there is one."""

    def reference(self, metadata: Mapping[str, Any], weights: Mapping[str, F32], ids: Sequence[int]) -> Any:
        """Logits [n, vocab] computed independently. ``metadata`` is the case's; ``weights`` float32 by tensor name."""
        raise NotImplementedError

    def test_a_changed_token_changes_later_logits_and_no_earlier_ones(self) -> None:
        """Attention is causal and reaches back; a layer of the plugin's own mixes no rows."""
        self._causal("cpu")

    def test_prefill_equals_decode(self) -> None:
        """A prompt at once, in chunks and token by token gives the same logits."""
        self._chunks("cpu", CPU_NOISE)

    def test_a_batch_changes_no_sequence(self) -> None:
        """Sequences side by side, prefill beside decode, give what each gives alone."""
        self._neighbours("cpu", CPU_NOISE)

    def test_logits_equal_the_reference(self) -> None:
        """The whole model against the author's independent computation."""
        self._reference("cpu", self.case.tolerance)

    def test_greedy_tokens_equal_the_reference(self) -> None:
        """Generated tokens are the reference's most likely ones, unless two are as likely within the tolerance."""
        self._greedy("cpu", self.case.tolerance)

    def test_cuda_logits_are_near_the_cpu_runtime_s(self) -> None:
        """The same float32 file on a GPU; decode steps replay a graph."""
        device, subject = self.gpu(), self.subject()
        for variant in self.variants():
            ids = subject.prompt(variant.decoder)
            expected = run(subject, variant, variant.weights, ids, "cpu")
            error = error_of(run(subject, variant, variant.weights, ids, device), expected)
            if error >= CUDA_LOGITS:
                fail(f"logits on {device}, {variant.label}, are {error:.2g} off the CPU runtime's, expected < 1e-2")

    def test_cuda_decode_replays_a_graph(self) -> None:
        """Steps of one token are captured once and replayed, with the logits of the CPU runtime."""
        device, subject, variant = self.gpu(), self.subject(), self.first()
        ids = subject.prompt(variant.decoder)
        expected = run(subject, variant, variant.weights, ids, "cpu")
        source = MemorySource(variant.weights)
        with subject.loaded(variant.decoder, source, device, max_tokens=1, max_batch=1) as model:
            error = error_of(logits_of(model, ids), expected)
            graphs = getattr(model, "decode_graphs", 0)
        if error >= CUDA_LOGITS:
            fail(f"decode steps on {device} are {error:.2g} off the CPU runtime, expected < 1e-2")
        if not graphs:
            fail(f"{len(ids)} decode steps on {device} captured no graph")

    def test_cuda_a_changed_token_changes_later_logits_and_no_earlier_ones(self) -> None:
        """The same on a GPU."""
        self._causal(self.gpu())

    def test_cuda_prefill_equals_decode(self) -> None:
        """The same on a GPU."""
        self._chunks(self.gpu(), CUDA_NOISE)

    def test_cuda_a_batch_changes_no_sequence(self) -> None:
        """The same on a GPU."""
        self._neighbours(self.gpu(), CUDA_NOISE)

    def test_cuda_logits_equal_the_reference(self) -> None:
        """The same on a GPU, within 1e-2 or the case's tolerance, whichever is more."""
        self._reference(self.gpu(), max(CUDA_LOGITS, self.case.tolerance))

    def _causal(self, device: str) -> None:
        subject = self.subject()
        noise = CPU_NOISE if device == "cpu" else CUDA_NOISE
        for variant in self.variants():
            # Products over groups of rows may round otherwise when a group changes, so a plugin's own layer has leave.
            exact = not subject.kinds()
            decoder = variant.decoder
            ids = subject.prompt(decoder)
            first = run(subject, variant, variant.weights, ids, device)
            if not np.isfinite(first).all():
                fail(f"logits on {device}, {variant.label}, are not finite with random weights of ordinary size")
            for at in (len(ids) // 2, len(ids) - 1):
                changed = [*ids[:at], (ids[at] + 1) % decoder.vocab, *ids[at + 1 :]]
                second = run(subject, variant, variant.weights, changed, device)
                early = np.array_equal(first[:at], second[:at])
                if not early and (exact or error_of(second[:at], first[:at]) > noise):
                    fail(
                        f"on {device}, {variant.label}, changing token {at} changes the logits of tokens before it: a "
                        "row of a layer may depend on the same row of its input alone"
                    )
                same = [at + row for row in range(len(ids) - at) if np.array_equal(first[at + row], second[at + row])]
                if same:
                    fail(
                        f"on {device}, {variant.label}, changing token {at} leaves the logits of token {same[0]} as "
                        "they were; does attention reach back (Attention.window), do both branches reach the head?"
                    )

    def _chunks(self, device: str, tolerance: float) -> None:
        subject = self.subject()
        for variant in self.variants():
            ids = subject.prompt(variant.decoder)
            whole = run(subject, variant, variant.weights, ids, device)
            for chunk, how in ((1, "token by token"), (5, "in chunks of 5")):
                error = error_of(
                    run(subject, variant, variant.weights, ids, device, max_tokens=chunk, max_batch=chunk), whole
                )
                if error >= tolerance:
                    fail(
                        f"on {device}, {variant.label}, the prompt {how} is {error:.2g} off the prompt at once, "
                        f"expected less than {tolerance:g}: does a layer keep something from call to call, or depend "
                        "on how many rows it gets?"
                    )

    def _neighbours(self, device: str, tolerance: float) -> None:
        subject = self.subject()
        for variant in self.variants():
            decoder = variant.decoder
            ids = subject.prompt(decoder)
            sequences = [ids, ids[::-1][: len(ids) // 2], [(token * 7 + 3) % decoder.vocab for token in ids]]
            alone = [run(subject, variant, variant.weights, each, device) for each in sequences]
            with subject.loaded(decoder, MemorySource(variant.weights), device, block_size=_BLOCK) as model:
                blocks = -(-len(ids) // _BLOCK)
                model.logits(batch_of([(each[:-1], 0) for each in sequences], blocks, _BLOCK))
                starts = [len(ids) - 1, 0, len(ids) // 2]  # a decode, a whole prompt and a chunk, side by side
                step = batch_of(list(zip(sequences, starts, strict=True)), blocks, _BLOCK)
                found = model.logits(step)
            for s, start in enumerate(starts):
                mine = found[step.query_start[s] : step.query_start[s + 1]]
                error = error_of(mine, alone[s][start:])
                if error >= tolerance:
                    fail(
                        f"on {device}, {variant.label}, sequence {s} of a batch of {len(sequences)} is {error:.2g} off "
                        f"the same sequence alone, expected less than {tolerance:g}: a layer mixes rows"
                    )

    def _need_reference(self) -> None:
        if type(self).reference is LogitTests.reference:
            pytest.skip("no reference: give the class a method reference(self, metadata, weights, ids)")

    def _expected(self, variant: Variant, weights: Mapping[str, F32], ids: Sequence[int]) -> NDArray[np.float64]:
        """The author's logits."""
        copies = {name: array.copy() for name, array in weights.items()}
        found = np.asarray(self.reference(dict(self.case.metadata), copies, list(ids)), np.float64)
        shape = (len(ids), variant.decoder.vocab)
        if found.shape != shape:
            fail(f"reference() returned shape {list(found.shape)}, expected {list(shape)} (tokens, vocabulary)")
        if not np.isfinite(found).all():
            fail(f"reference() returned values that are not finite, {variant.label}")
        return found

    def _reference(self, device: str, tolerance: float) -> None:
        self._need_reference()
        subject = self.subject()
        for variant in self.variants():
            ids = subject.prompt(variant.decoder)
            with subject.file(variant) as (path, held), _llm(subject, path, device) as llm:
                found = llm.logits(ids)
            expected = self._expected(variant, held, ids)
            error = error_of(found, expected)
            if error >= tolerance:
                rows = [error_of(mine, theirs) for mine, theirs in zip(found, expected, strict=True)]
                fail(
                    f"logits on {device}, {variant.label}, are {error:.2g} off the reference, expected less than "
                    f"{tolerance:g} (‖difference‖ / ‖reference‖). {_where(rows, tolerance)}"
                )

    def _greedy(self, device: str, tolerance: float) -> None:
        self._need_reference()
        subject = self.subject()
        for variant in self.variants():
            ids = subject.prompt(variant.decoder)
            count = min(_GREEDY, variant.decoder.context - len(ids))
            params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            with subject.file(variant) as (path, held), _llm(subject, path, device) as llm:
                tokens = list(llm.generate([ids], params)[0].token_ids)
            expected = self._expected(variant, held, [*ids, *tokens])
            for step, token in enumerate(tokens):
                row = expected[len(ids) - 1 + step]
                behind = float(row.max() - row[token])
                if behind > 10 * tolerance * float(np.abs(row).max()):
                    fail(
                        f"greedy token {step} on {device}, {variant.label}, is {token}; the reference has "
                        f"{int(row.argmax())}, whose logit is {behind:.3g} higher"
                    )


def _llm(subject: Subject, path: object, device: str) -> LLM:
    from ..llm import LLM

    try:
        return LLM({"model": str(path), "device": device}, registry=subject.registry)
    except PolyheadError as error:
        fail(f"the case's file does not load on {device}: {error}")


def _where(rows: list[float], tolerance: float) -> str:
    """What the first token tells: alone in its context, it is neither rotated nor does it attend to others.

    That it is within the tolerance says little where the others are hardly outside: a wrong form of GELU looks so.
    """
    worst = max(rows)
    if rows[0] >= tolerance:
        return f"Token 0, which sees itself alone, is {rows[0]:.2g} off already: look at {_EACH}"
    if rows[0] * _CLEARLY > worst:
        return (
            f"Token 0, which sees itself alone, is {rows[0]:.2g} off, the worst token {worst:.2g}, which does not tell "
            f"what is wrong. It may be what acts on every token: {_EACH}. Or what mixes them: {_MIXING}"
        )
    first = next(index for index, error in enumerate(rows) if error >= tolerance)
    return (
        f"Token 0 agrees, token {first} is the first that does not ({rows[first]:.2g}): look at what "
        f"tells tokens apart or mixes them, such as {_MIXING}"
    )
