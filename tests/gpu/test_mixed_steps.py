"""Steps that hold decodes beside chunks of prompts: near the CPU runtime, and near the same sequences one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import memory_source
import numpy as np
import pytest
import tolerance
from polyhead import LLM, SamplingParams
from polyhead.generation import Generation
from polyhead.model import Model
from polyhead.runtime.contract import Batch, RuntimeOptions
from polyhead.runtime.cpu.model import CpuModel
from polyhead.runtime.cuda.inputs import View
from polyhead.runtime.cuda.model import CudaModel
from polyhead.runtime.cuda.steps import Steps

pytestmark = pytest.mark.gpu
MODELS = ["llama-gqa", "llama-mha", "llama-mqa", "gpt2-tied", "gptneox-parallel", "mistral-window", "qwen3"]
#: (new tokens, context after them): one, just a block of 8, one more, several; prompts whole, goings-on and ends.
PIECES = [(1, 1), (1, 8), (1, 9), (1, 37), (1, 55), (13, 13), (7, 40), (2, 30), (20, 23)]
#: In which they come, and how many of them lead with one token.
ORDERS = {
    "decodes first": ([3, 0, 4, 1, 2, 8, 6, 5, 7], 5),
    "decodes last": ([8, 6, 5, 7, 3, 0, 4, 1, 2], 0),
    "both": ([4, 0, 5, 1, 8, 2, 6, 3, 7], 2),
}


@dataclass(frozen=True)
class Pair:
    """A model on the GPU and on the CPU, whose caches have room for the sequences of a test."""

    gpu: CudaModel
    cpu: CpuModel
    block_size: int


@pytest.fixture
def load(ctx, tiny_model, registry) -> Iterator[Callable[..., Pair]]:
    opened = []

    def load(name: str, context: int | None = None, **options: object) -> Pair:
        with Model(tiny_model(name), registry) as model:
            decoder = dataclasses.replace(model.decoder, context=context or model.decoder.context)
            weights = {spec.name: model.file.dequantise(spec.name) for spec in model.claims.specs}
        source = memory_source.MemorySource(weights)
        both = {"block_size": 8, "max_tokens": 4096, "max_batch": 16}
        gpu = CudaModel(decoder, source, RuntimeOptions(**{**both, **options}))
        opened.append(gpu)
        return Pair(gpu, CpuModel(decoder, source, RuntimeOptions(**both)), 8)

    yield load
    for model in opened:
        model.close()


class Sequences:
    """Random tokens for pieces of (new tokens, context), one token more for the step after, and scattered blocks."""

    def __init__(self, pair: Pair, pieces: Sequence[tuple[int, int]]) -> None:
        rng = np.random.default_rng(3)
        self.pieces = pieces
        self.ids = [rng.integers(3, 90, context + 1).astype(np.int32) for _, context in pieces]
        width = max(len(ids) for ids in self.ids) // pair.block_size + 1
        blocks = rng.permutation(len(pieces) * width).reshape(len(pieces), width)
        self.tables = blocks.astype(np.int32)

    def batch(self, spans: Sequence[tuple[int, int, int]], wanted: Sequence[int] | None = None) -> Batch:
        """Tokens start:end of some sequences, (number, start, end) each; logits after the last of each, or some."""
        ends = np.cumsum([end - start for _, start, end in spans]).astype(np.int32)
        return Batch(
            tokens=np.concatenate([self.ids[n][start:end] for n, start, end in spans]),
            positions=np.concatenate([np.arange(start, end, dtype=np.int32) for _, start, end in spans]),
            query_start=np.concatenate([np.zeros(1, np.int32), ends]),
            context_lens=np.array([end for _, _, end in spans], np.int32),
            block_tables=self.tables[[n for n, _, _ in spans]],
            logit_rows=(ends - 1)[list(range(len(spans)) if wanted is None else wanted)],
        )

    def before(self) -> Batch:
        """What is in the cache when the step comes."""
        return self.batch([(n, 0, end - new) for n, (new, end) in enumerate(self.pieces) if end > new])

    def step(self, order: Sequence[int]) -> Batch:
        return self.batch([self.span(n) for n in order])

    def after(self, order: Sequence[int]) -> Batch:
        """The step in which all of them decode."""
        return self.batch([(n, self.pieces[n][1], self.pieces[n][1] + 1) for n in order])

    def span(self, n: int) -> tuple[int, int, int]:
        new, end = self.pieces[n]
        return n, end - new, end

    def expected(self, pair: Pair, order: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The CPU runtime's logits after the step and after the one that follows, from whole sequences."""
        whole = [Generation(pair.cpu, None).logits(self.ids[n].tolist())[-2:] for n in order]
        return np.stack([rows[0] for rows in whole]), np.stack([rows[1] for rows in whole])


@pytest.fixture
def views(monkeypatch) -> list[View]:
    """Those of the steps that are launched, not replayed, from here on."""
    seen: list[View] = []
    run = Steps.run

    def noting(self, step, observe=None):
        seen.append(step.view)
        run(self, step, observe)

    monkeypatch.setattr(Steps, "run", noting)
    return seen


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", MODELS)
def test_decodes_beside_prompts_are_near_the_cpu_runtime_and_near_themselves_alone(name, order, kv_dtype, load, views):
    pair = load(name, kv_dtype=kv_dtype)
    limit, near = (
        (tolerance.CUDA_FP8_LOGITS, tolerance.CUDA_FP8_ROUNDING)
        if kv_dtype == "fp8"
        else (tolerance.CUDA_LOGITS, tolerance.CUDA_BLOCK)
    )
    sequences, (numbers, singles) = Sequences(pair, PIECES), ORDERS[order]
    expected, next_expected = sequences.expected(pair, numbers)
    pair.gpu.logits(sequences.before())
    views.clear()
    found = pair.gpu.logits(sequences.step(numbers))
    assert [view.singles for view in views] == [singles]
    next_found = pair.gpu.logits(sequences.after(numbers))  # reads what the step stored
    alone = np.concatenate([pair.gpu.logits(sequences.step([n])) for n in numbers])
    assert tolerance.error(found, expected) < limit
    assert tolerance.error(next_found, next_expected) < limit
    assert tolerance.error(found, alone) < near


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "mistral-window"])
def test_decodes_whose_contexts_are_split_stand_beside_prompts(name, load, views):
    pair = load(name, context=2048)
    sequences = Sequences(pair, [(1, 1300), (1, 513), (1, 700), (1, 20), (100, 600), (70, 70)])
    numbers = [0, 1, 2, 3, 4, 5]
    expected, next_expected = sequences.expected(pair, numbers)
    pair.gpu.logits(sequences.before())
    views.clear()
    # Counters of the splits are zero again after each: so twice, and then with fewer sequences.
    for order in (numbers, numbers, [2, 0, 5]):
        found = pair.gpu.logits(sequences.step(order))
        assert tolerance.error(found, expected[order]) < tolerance.CUDA_LOGITS
    assert [view.singles for view in views] == [4, 4, 2]
    assert tolerance.error(pair.gpu.logits(sequences.after(numbers)), next_expected) < tolerance.CUDA_LOGITS


def test_single_tokens_of_which_not_all_have_logits_take_the_attention_of_decode(load, views):
    pair = load("llama-gqa")
    sequences = Sequences(pair, PIECES[:5])
    expected, _ = sequences.expected(pair, range(5))
    pair.gpu.logits(sequences.before())
    views.clear()
    found = pair.gpu.logits(sequences.batch([sequences.span(n) for n in range(5)], wanted=[3, 1]))
    assert [(view.singles, view.decode) for view in views] == [(5, False)]
    assert tolerance.error(found, expected[[3, 1]]) < tolerance.CUDA_LOGITS


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied", "qwen3"])
def test_every_step_of_a_mixed_batch_is_near_the_cpu_runtime(name, dtype, load):
    pair = load(name, activation_dtype=dtype)
    sequences = Sequences(pair, PIECES)
    for model in (pair.cpu, pair.gpu):
        model.logits(sequences.before())
    batch = sequences.step(ORDERS["decodes first"][0])
    expected, found = pair.cpu.trace(batch), pair.gpu.trace(batch)
    joined = {step for step in expected if step.endswith(".store_kv")}
    assert list(found) == [step for step in expected if step not in joined]
    limit = {"f16": tolerance.CUDA_LOGITS, "bf16": 8 * tolerance.CUDA_LOGITS}[dtype]
    for step, values in found.items():
        assert tolerance.error(values, expected[step]) < limit, step


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_deterministic_results_of_a_mixed_step_are_those_of_each_sequence_alone(kv_dtype, load, views):
    pair = load("llama-gqa", deterministic=True, kv_dtype=kv_dtype)
    sequences, (numbers, _) = Sequences(pair, PIECES), ORDERS["decodes first"]
    pair.gpu.logits(sequences.before())
    found = pair.gpu.logits(sequences.step(numbers))
    alone = np.concatenate([pair.gpu.logits(sequences.step([n])) for n in numbers])
    assert {view.singles for view in views} == {0}
    np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha", "gpt2-tied", "mistral-window"])
def test_requests_in_any_order_have_the_cpu_runtime_s_greedy_tokens(name, ctx, tiny_model, registry, views):
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 90, length).tolist() for length in (2, 45, 1, 33, 9, 40, 17, 3, 28, 8)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    settings = {"model": str(tiny_model(name))}
    with LLM({**settings, "device": "cpu"}, registry=registry) as cpu:
        expected = cpu.generate(prompts, params)
    runtime = {"max_tokens_per_step": 16, "block_size": 8, "max_batch": 8, "prefix_cache": False}
    with LLM({**settings, "device": "cuda", "runtime": runtime}, registry=registry) as llm:
        for order in (range(10), range(9, -1, -1), rng.permutation(10)):
            views.clear()
            found = llm.generate([prompts[n] for n in order], params)
            assert sum(0 < view.singles < view.sequences_count for view in views) >= 5
            for a, n in zip(found, order, strict=True):
                for mine, theirs in zip(a.logprobs, expected[n].logprobs, strict=True):
                    if mine.token_id != theirs.token_id:  # only where the two best are within the error
                        assert theirs.top[0][1] - theirs.top[1][1] < 0.05
                        break
                    assert abs(mine.logprob - theirs.logprob) < 0.05


@pytest.mark.parametrize("name", ["llama-gqa", "llama-q4_k"])
def test_a_step_of_which_nobody_said_how_long_has_room_for_2048_tokens(name, ctx, tiny_model, registry, views):
    rng = np.random.default_rng(6)
    prompts = [rng.integers(3, 90, 40).tolist() for _ in range(60)]
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=2)
    found = {}
    for device in ("cpu", "cuda"):
        with LLM({"model": str(tiny_model(name)), "device": device}, registry=registry) as llm:
            assert llm.plan.max_tokens == {"cpu": 512, "cuda": 2048}[device]
            found[device] = llm.generate(prompts, params)
    assert max(view.count for view in views) == 2048
    for mine, theirs in zip(found["cuda"], found["cpu"], strict=True):
        best, second = (logprob for _, logprob in theirs.logprobs[0].top)
        assert abs(mine.logprobs[0].top[0][1] - best) < 0.05
        assert mine.token_ids == theirs.token_ids or best - second < 0.05
