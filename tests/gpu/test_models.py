"""Whole models on the GPU: against transformers' goldens, the CPU runtime, and what must hold for every model."""

from __future__ import annotations

import dataclasses
import gc
import threading

import golden
import memory_source
import numpy as np
import pytest
import tolerance
from polyhead import LLM, SamplingParams
from polyhead.errors import CapacityError, PluginError, RequestError
from polyhead.generation import Generation
from polyhead.model import Model
from polyhead.runtime.contract import Batch, RuntimeOptions
from polyhead.runtime.cpu.model import CpuModel

pytestmark = pytest.mark.gpu
FAMILIES = [
    "gpt2-tied",
    "gpt2-untied",
    "gptneox-parallel",
    "gptneox-sequential",
    "llama-mha",
    "llama-gqa",
    "llama-mqa",
    "llama-bias",
    "mistral-window",
    "qwen2-tied",
    "qwen3",
]
IDS = [5, 17, 2, 80, 33, 33, 9, 61, 4, 12, 71, 8, 50]


@pytest.fixture
def open_tiny(ctx, tiny_model, registry):
    def open_(name: str, **runtime: object) -> LLM:
        settings = {"max_tokens_per_step": 32, "block_size": 8, "max_batch": 32, **runtime}
        return LLM({"model": str(tiny_model(name)), "device": "cuda", "runtime": settings}, registry=registry)

    return open_


@pytest.fixture
def parts(ctx, tiny_model, registry):
    def read(name: str):
        with Model(tiny_model(name), registry) as model:
            return model.decoder, {spec.name: model.file.dequantise(spec.name) for spec in model.claims.specs}

    return read


def cuda_model(decoder, weights, **options):
    from polyhead.runtime.cuda.model import CudaModel

    settings = {"block_size": 8, "max_tokens": 64, "max_batch": 64, **options}
    return CudaModel(decoder, memory_source.MemorySource(weights), RuntimeOptions(**settings))


def run(decoder, weights, ids, **options):
    model = cuda_model(decoder, weights, **options)
    try:
        return Generation(model, None).logits(ids)
    finally:
        model.close()


@pytest.mark.parametrize("name", golden.names())
def test_logits_equal_the_reference(name, open_tiny):
    with open_tiny(name) as llm:
        for sequence in golden.load(name).sequences:
            logits = llm.logits(sequence.ids)[sequence.positions]
            assert tolerance.error(logits, sequence.logits) < tolerance.CUDA_LOGITS


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_tokens_equal_the_reference(name, open_tiny):
    expected = golden.load(name).greedy
    with open_tiny(name) as llm:
        params = SamplingParams(max_tokens=len(expected.tokens), temperature=0.0, ignore_eos=True)
        assert list(llm.generate([expected.prompt], params)[0].token_ids) == expected.tokens


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_step_of_the_program_is_near_the_cpu_runtime(name, dtype, parts):
    decoder, weights = parts(name)
    cpu = CpuModel(decoder, memory_source.MemorySource(weights), RuntimeOptions(block_size=8, max_batch=64))
    gpu = cuda_model(decoder, weights, activation_dtype=dtype)
    batch = Batch(
        tokens=np.array(IDS, np.int32),
        positions=np.arange(len(IDS), dtype=np.int32),
        query_start=np.array([0, len(IDS)], np.int32),
        context_lens=np.array([len(IDS)], np.int32),
        block_tables=np.array([[1, 0]], np.int32),
        logit_rows=np.arange(len(IDS), dtype=np.int32),
    )
    expected, found = cpu.trace(batch), gpu.trace(batch)
    gpu.close()
    limit = {"f16": tolerance.CUDA_LOGITS, "bf16": 8 * tolerance.CUDA_LOGITS}[dtype]
    assert list(found) == list(expected)
    for step, values in expected.items():
        assert tolerance.error(found[step], values) < limit, step


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_future_token_leaves_earlier_outputs_bit_equal(name, parts):
    decoder, weights = parts(name)
    first = run(decoder, weights, IDS)
    changed = IDS[:7] + [(token + 1) % decoder.vocab for token in IDS[7:]]
    second = run(decoder, weights, changed)
    np.testing.assert_array_equal(first[:7], second[:7])
    assert (first[7:] != second[7:]).any(axis=1).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 5])
def test_prefill_of_n_equals_chunks_and_n_decodes(name, chunk, parts):
    decoder, weights = parts(name)
    chunked = run(decoder, weights, IDS, max_tokens=chunk, max_batch=chunk)
    assert tolerance.error(chunked, run(decoder, weights, IDS)) < 5e-3


def test_blocks_without_norms_take_many_rows_of_the_residual_stream(ctx, tiny_model, registry):
    """The stream is narrowed where quantised weights are unpacked next: neither may overwrite the other."""
    from polyhead.runtime.cuda.model import CudaModel

    options = RuntimeOptions(block_size=8, max_tokens=64, max_batch=64)
    with Model(tiny_model("llama-q8_0"), registry) as model:
        bare = tuple(dataclasses.replace(block, attn_norm=None, mlp_norm=None) for block in model.decoder.blocks)
        decoder = dataclasses.replace(model.decoder, blocks=bare, final_norm=None)
        ids = [IDS[n % len(IDS)] + n // len(IDS) for n in range(50)]
        expected = Generation(CpuModel(decoder, model.file, options), None).logits(ids)
        gpu = CudaModel(decoder, model.file, options)
        try:
            assert tolerance.error(Generation(gpu, None).logits(ids), expected) < tolerance.CUDA_LOGITS
        finally:
            gpu.close()


@pytest.mark.parametrize("name", ["gpt2-tied", "llama-bias", "gptneox-parallel", "qwen3"])
def test_zeroing_any_tensor_changes_the_output(name, parts):
    decoder, weights = parts(name)
    before = run(decoder, weights, IDS)
    for spec in decoder.tensors():
        zeroed = dict(weights) | {spec.name: np.zeros_like(weights[spec.name])}
        blind = spec.owner.endswith("qkv.k") and spec.name.endswith("bias") and decoder.positions is not None
        assert blind or np.abs(run(decoder, zeroed, IDS) - before).max() > 1e-3, spec


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied", "mistral-window", "llama-q4_k", "llama-q8_0"])
def test_many_sequences_at_once_equal_the_cpu_runtime_s_greedy_tokens(name, open_tiny, tiny_model, registry):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 90, length).tolist() for length in (1, 2, 5, 9, 17, 23, 30, 3, 40, 11)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    with LLM({"model": str(tiny_model(name)), "device": "cpu"}, registry=registry) as cpu:
        expected = cpu.generate(prompts, params)
    with open_tiny(name) as llm:
        found = llm.generate(prompts, params)
        assert llm._generation.free_blocks == llm.plan.num_blocks
    for a, b in zip(found, expected, strict=True):
        for step, (mine, theirs) in enumerate(zip(a.logprobs, b.logprobs, strict=True)):
            if mine.token_id != theirs.token_id:  # only where the two best are within the error
                assert theirs.top[0][1] - theirs.top[1][1] < 0.05, step
                break


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied", "mistral-window", "llama-q4_k", "gpt2-q8_0"])
def test_deterministic_results_are_bit_equal_alone_in_a_batch_and_chunked(name, open_tiny):
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=5, logprobs=2, ignore_eos=True)
    ids, others = IDS * 3, [[1, 2, 3], IDS[4:], IDS[:2] * 7]
    with (
        open_tiny(name, deterministic=True, max_tokens_per_step=64) as whole,
        open_tiny(name, deterministic=True, max_tokens_per_step=3) as chunked,
    ):
        alone = whole.generate([ids], params)[0]
        assert whole.generate([*others, ids], params)[-1] == alone
        assert chunked.generate([ids], params)[0] == alone
        assert chunked.generate([others[0], ids, others[1]], params)[1] == alone


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied"])
def test_graphs_equal_launches_one_by_one(name, parts):
    decoder, weights = parts(name)
    batch = Batch(
        tokens=np.array([5, 9, 7], np.int32),
        positions=np.zeros(3, np.int32),
        query_start=np.arange(4, dtype=np.int32),
        context_lens=np.ones(3, np.int32),
        block_tables=np.array([[2], [0], [1]], np.int32),
        logit_rows=np.arange(3, dtype=np.int32),
    )
    model = cuda_model(decoder, weights)
    runs = [model.logits(batch) for _ in range(4)]  # launched, captured, replayed, replayed
    assert model.decode_graphs == 1
    model.close()
    for other in runs[1:]:
        np.testing.assert_array_equal(runs[0], other)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied", "llama-q4_k", "llama-q8_0"])
@pytest.mark.parametrize("length", [13, 40])
def test_prompts_of_one_length_share_a_graph_and_equal_launches_one_by_one(name, length, parts):
    """Where a second sequence of one token stands in front, decode's attention is part of the graph."""
    decoder, weights = parts(name)
    rng = np.random.default_rng(length)
    batches = [
        Batch(
            tokens=rng.integers(0, decoder.vocab, length + 1).astype(np.int32),
            positions=np.array([0, *range(length)], np.int32),
            query_start=np.array([0, 1, length + 1], np.int32),
            context_lens=np.array([1, length], np.int32),
            block_tables=np.array([[0, 0, 0, 0, 0], rng.permutation(5) + 1], np.int32),
            logit_rows=np.array([0, length], np.int32),
        )
        for _ in range(4)
    ]
    model = cuda_model(decoder, weights)
    found = [model.logits(batch) for batch in batches]  # launched, captured, replayed, replayed
    assert len(model._others) == 1
    model.close()
    for batch, logits in zip(batches, found, strict=True):
        fresh = cuda_model(decoder, weights)
        np.testing.assert_array_equal(fresh.logits(batch), logits)
        fresh.close()


def test_canaries_around_the_workspace_stay_intact(parts):
    decoder, weights = parts("llama-gqa")
    model = cuda_model(decoder, weights, max_tokens=40, max_batch=40)
    size = model._memory.nbytes
    device = model._ctx.device
    fenced = model._work_pool.array(size + 8192, "u8")
    device.fill(fenced, 0xA5)
    model._memory = fenced.at(4096, "u8", size)
    for length in (1, 2, 7, 33, 40):
        ids = np.arange(length, dtype=np.int32) % decoder.vocab
        model.logits(
            Batch(
                tokens=ids,
                positions=np.arange(length, dtype=np.int32),
                query_start=np.array([0, length], np.int32),
                context_lens=np.array([length], np.int32),
                block_tables=np.arange(5, dtype=np.int32)[None],
                logit_rows=np.arange(length, dtype=np.int32),
            )
        )
        around = device.download(fenced)
        assert (around[:4096] == 0xA5).all()
        assert (around[4096 + size :] == 0xA5).all()
    model.close()


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2-tied"])
def test_the_cache_holds_exactly_the_keys_and_values_just_computed(name, parts):
    decoder, weights = parts(name)
    model = cuda_model(decoder, weights)
    batch = Batch(
        tokens=np.array(IDS, np.int32),
        positions=np.arange(len(IDS), dtype=np.int32),
        query_start=np.array([0, len(IDS)], np.int32),
        context_lens=np.array([len(IDS)], np.int32),
        block_tables=np.array([[3, 1]], np.int32),
        logit_rows=np.array([0], np.int32),
    )
    seen = model.trace(batch)
    slots = [batch.block_tables[0, p // 8] * 8 + p % 8 for p in range(len(IDS))]
    for layer, block in enumerate(decoder.blocks):
        k, v = model.read_kv(layer, slots)
        spec = block.attn
        qkv = seen[f"blk.{layer}.attn.store_kv"]
        # V is stored as it was projected; K is rounded once after the rotation, in the buffer and in the cache.
        np.testing.assert_array_equal(v.reshape(len(IDS), -1), qkv[:, spec.q_size + spec.kv_size :])
        np.testing.assert_array_equal(k.reshape(len(IDS), -1), qkv[:, spec.q_size : spec.q_size + spec.kv_size])
    model.close()


def test_three_load_cycles_return_to_the_baseline(ctx, open_tiny):
    def cycle() -> None:
        with open_tiny("llama-q4_k") as llm:
            llm.generate([IDS], SamplingParams(max_tokens=4))
        gc.collect()

    cycle()
    free = ctx.device.free()
    for _ in range(3):
        cycle()
    assert abs(ctx.device.free() - free) <= 4 << 20


def test_any_thread_may_use_and_close_a_model(open_tiny):
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    llm = open_tiny("llama-gqa")
    expected = llm.generate([IDS], params)
    found: list[object] = []

    def work() -> None:
        found.append(llm.generate([IDS], params))
        found.append(llm.logits(IDS).shape)
        llm.close()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found[0] == expected
    assert len(found) == 2


def test_a_full_context_ends_and_never_wraps(open_tiny):
    with open_tiny("llama-gqa", context=20) as llm:
        out = llm.generate([IDS], SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True))[0]
        assert out.finish_reason == "length"
        assert len(IDS) + len(out.token_ids) == 20
        with pytest.raises(RequestError, match=r"21.*20"):
            llm.logits(list(range(21)))


def test_a_plan_that_does_not_fit_is_a_table_with_what_would(ctx, registry):
    from polyhead import devices
    from polyhead.bench.random_weights import RandomWeights
    from polyhead.bench.shapes import SHAPES, metadata, tensors, types

    shape = dataclasses.replace(SHAPES["llama-8b"], context=1 << 30)
    sizes = tensors(shape)
    decoder, _, _ = registry.decoder(metadata(shape), sizes)
    source = RandomWeights(sizes, types("F16", sizes, shape.layers))
    with pytest.raises(CapacityError, match=r"weights(.|\n)*KV cache(.|\n)*would fit"):
        devices.plan("cuda:0", decoder, source, RuntimeOptions(context=1 << 24))


def test_a_module_without_cuda_code_is_refused(ctx):
    from polyhead.arch import Attention as Attn
    from polyhead.arch import Block, Decoder, Embedding, Linear, Module, RMSNorm, SplitQKV

    class Odd(Module):
        def tensors(self, hidden):
            return iter(())

    attn = Attn(1, 1, 8, SplitQKV(Linear("q"), Linear("k"), Linear("v")), Linear("o"))
    decoder = Decoder(8, 5, 16, Embedding("e"), (Block(RMSNorm("n", 1e-5), attn, None, Odd()),), None)
    with pytest.raises(PluginError, match=r"Odd.*no CUDA"):
        cuda_model(decoder, memory_source.random_weights(decoder, 0))


@pytest.mark.model
def test_smollm2_continues_ten_prompts_as_the_cpu_runtime(ctx, smollm2_path):
    expected = golden.load_smollm2()
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    settings = {"model": str(smollm2_path), "device": "cuda", "runtime": {"context": 1024}}
    with LLM(settings) as llm:
        completions = llm.generate([prompt.ids for prompt in expected.prompts], params)
        logits = [llm.logits(prompt.ids)[-1] for prompt in expected.prompts]
    for prompt, row in zip(expected.prompts, logits, strict=True):
        assert tolerance.error(row[prompt.some_ids], prompt.some_logits) < tolerance.CUDA_LOGITS
    for prompt, completion in zip(expected.prompts, completions, strict=True):
        for step, (mine, theirs) in enumerate(zip(completion.token_ids, prompt.greedy.tokens, strict=True)):
            if mine != theirs:
                assert prompt.greedy.margins[step] < 0.1, (prompt.text, step)
                break


@pytest.mark.parametrize("name", golden.names())
def test_logits_with_an_fp8_cache_are_near_the_reference(name, open_tiny):
    with open_tiny(name, kv_dtype="fp8") as llm:
        assert llm.plan.kv_dtype == "fp8"
        for sequence in golden.load(name).sequences:
            logits = llm.logits(sequence.ids)[sequence.positions]
            assert tolerance.error(logits, sequence.logits) < tolerance.CUDA_FP8_LOGITS


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 5])
def test_with_an_fp8_cache_prefill_is_near_chunks_and_decodes(name, chunk, parts):
    decoder, weights = parts(name)
    chunked = run(decoder, weights, IDS, kv_dtype="fp8", max_tokens=chunk, max_batch=chunk)
    whole = run(decoder, weights, IDS, kv_dtype="fp8")
    assert tolerance.error(chunked, whole) < tolerance.CUDA_FP8_ROUNDING


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied", "mistral-window"])
def test_deterministic_results_with_an_fp8_cache_are_bit_equal_alone_in_a_batch_and_chunked(name, open_tiny):
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=5, logprobs=2, ignore_eos=True)
    ids, others = IDS * 3, [[1, 2, 3], IDS[4:], IDS[:2] * 7]
    options = {"deterministic": True, "kv_dtype": "fp8"}
    with (
        open_tiny(name, **options, max_tokens_per_step=64) as whole,
        open_tiny(name, **options, max_tokens_per_step=3) as chunked,
    ):
        alone = whole.generate([ids], params)[0]
        assert whole.generate([*others, ids], params)[-1] == alone
        assert chunked.generate([ids], params)[0] == alone
        assert chunked.generate([others[0], ids, others[1]], params)[1] == alone


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3", "gpt2-tied"])
def test_an_fp8_cache_holds_the_nearest_codes_of_keys_and_values(name, parts):
    decoder, weights = parts(name)
    model = cuda_model(decoder, weights, kv_dtype="fp8")
    rows = len(IDS)
    positions, table = np.arange(rows, dtype=np.int32), np.array([[3, 1]], np.int32)
    ends = np.array([0, rows], np.int32)
    seen = model.trace(Batch(np.array(IDS, np.int32), positions, ends, ends[1:], table, ends[:1]))
    for layer, block in enumerate(decoder.blocks):
        found = np.concatenate(model.read_kv(layer, table[0, positions // 8] * 8 + positions % 8), axis=1)
        qkv = seen[f"blk.{layer}.attn.store_kv"]
        expected = qkv[:, block.attn.q_size :].reshape(rows, 2 * block.attn.kv_heads, -1)
        # Half a step is 2^-4 of a value, or 2^-10 where the largest of a head is 448; f16 rounds in between.
        steps = np.abs(expected) * 2.0**-4 + np.abs(expected).max(axis=-1, keepdims=True) / 448 * 2.0**-10
        assert (np.abs(found - expected) <= 1.02 * steps + 1e-6).all()
        assert (found != expected).any()
    model.close()
