"""What must hold for every model, whatever its weights: each of these failed in a system that only checked for finite
numbers."""

from __future__ import annotations

import dataclasses

import memory_source
import numpy as np
import pytest
import tiny_models
import tolerance
from polyhead import LLM, SamplingParams
from polyhead.arch import Attention, Decoder, FusedQKV, SplitQKV
from polyhead.errors import RequestError, TensorError
from polyhead.generation import Generation
from polyhead.model import Model
from polyhead.runtime.contract import Batch, RuntimeOptions
from polyhead.runtime.cpu.model import CpuModel

FAMILIES = [name for name, spec in tiny_models.SPECS.items() if spec.quant == "F32" and not name.endswith("-f32")]
IDS = [5, 17, 2, 80, 33, 33, 9, 61, 4, 12, 71, 8, 50]


@pytest.fixture(scope="module")
def parts(tiny_model, registry):
    """Decoder and float32 weights of a tiny model."""

    def read(name: str) -> tuple[Decoder, dict[str, np.ndarray]]:
        with Model(tiny_model(name), registry) as model:
            return model.decoder, {spec.name: model.file.dequantise(spec.name) for spec in model.claims.specs}

    return read


def run(decoder: Decoder, weights: dict[str, np.ndarray], ids: list[int], **options: object) -> np.ndarray:
    model = CpuModel(decoder, memory_source.MemorySource(weights), RuntimeOptions(**{"block_size": 4, **options}))
    return Generation(model, None).logits(ids)


def batch_of(sequences: list[tuple[list[int], int]], block_size: int = 4) -> Batch:
    """A step with the tokens from ``start`` on of each (ids, start); sequence s owns every S-th block, scattered."""
    count = len(sequences)
    rows = [(s, p, ids[p]) for s, (ids, start) in enumerate(sequences) for p in range(start, len(ids))]
    sizes = [len(ids) - start for ids, start in sequences]
    width = max(-(-len(ids) // block_size) for ids, _ in sequences)
    ints = lambda values: np.array(values, np.int32)  # noqa: E731
    return Batch(
        tokens=ints([token for _, _, token in rows]),
        positions=ints([position for _, position, _ in rows]),
        query_start=ints([0, *np.cumsum(sizes)]),
        context_lens=ints([len(ids) for ids, _ in sequences]),
        block_tables=ints([[(width - 1 - b) * count + s for b in range(width)] for s in range(count)]),
        logit_rows=np.arange(len(rows), dtype=np.int32),
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_future_token_leaves_earlier_outputs_bit_equal(name, parts):
    decoder, weights = parts(name)
    first = run(decoder, weights, IDS)
    for at in range(1, len(IDS)):
        changed = IDS[:at] + [(token + 1) % decoder.vocab for token in IDS[at:]]
        second = run(decoder, weights, changed)
        np.testing.assert_array_equal(first[:at], second[:at])
        assert (first[at:] != second[at:]).any(axis=1).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_prefill_of_n_equals_chunks_and_n_decodes(name, chunk, parts):
    decoder, weights = parts(name)
    assert tolerance.error(run(decoder, weights, IDS, max_tokens=chunk), run(decoder, weights, IDS)) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_zeroing_any_tensor_changes_the_output(name, parts):
    decoder, weights = parts(name)
    before = run(decoder, weights, IDS)
    for spec in decoder.tensors():
        zeroed = dict(weights)
        # Factors divide, so their neutral value is 1.
        zeroed[spec.name] = np.full_like(weights[spec.name], 1.0 if spec.owner.endswith("factors") else 0.0)
        change = np.abs(run(decoder, zeroed, IDS) - before).max()
        # A key bias moves all scores of a query alike where nothing rotates it: softmax is blind to that.
        blind = spec.owner.endswith("qkv.k") and spec.name.endswith("bias") and decoder.positions is not None
        assert blind or change > 1e-4, spec


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa", "qwen2-head-dim"])
def test_gqa_equals_mha_with_repeated_kv(name, parts):
    decoder, weights = parts(name)
    wide_weights = dict(weights)

    def widen(block):
        attn: Attention = block.attn
        assert attn.kv_heads < attn.heads
        assert isinstance(attn.qkv, SplitQKV)
        for linear in (attn.qkv.k, attn.qkv.v):
            for tensor in filter(None, (linear.weight, linear.bias)):
                heads = weights[tensor].reshape(attn.kv_heads, attn.head_dim, -1)
                repeated = np.repeat(heads, attn.heads // attn.kv_heads, axis=0)
                wide_weights[tensor] = repeated.reshape(attn.heads * attn.head_dim, *weights[tensor].shape[1:])
        return dataclasses.replace(block, attn=dataclasses.replace(attn, kv_heads=attn.heads))

    wide = dataclasses.replace(decoder, blocks=tuple(widen(block) for block in decoder.blocks))
    assert tolerance.error(run(wide, wide_weights, IDS), run(decoder, weights, IDS)) < 1e-6
    assert wide.kv_values_per_token() * decoder.blocks[0].attn.kv_heads == (
        decoder.kv_values_per_token() * decoder.blocks[0].attn.heads
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_ragged_batch_equals_each_sequence_alone(name, parts):
    decoder, weights = parts(name)
    rng = np.random.default_rng(3)
    lengths = [1, 2, 9, 17, 4, 23]
    sequences = [rng.integers(0, decoder.vocab, length).tolist() for length in lengths]
    alone = [run(decoder, weights, ids) for ids in sequences]
    model = CpuModel(decoder, memory_source.MemorySource(weights), RuntimeOptions(block_size=4, max_batch=64))
    starts = [0, 1, 5, 16, 3, 11]  # the next step holds a first token, decodes, and prefill chunks, side by side
    warm = [(ids[:start], 0) for ids, start in zip(sequences, starts, strict=True)]
    width = max(len(ids) for ids in sequences)
    full = batch_of([(ids, 0) for ids in sequences])
    for s, (ids, _) in enumerate(warm):
        if ids:
            part = batch_of([(ids, 0)])
            model.logits(dataclasses.replace(part, block_tables=full.block_tables[s : s + 1]))
    step = batch_of(list(zip(sequences, starts, strict=True)))
    logits = model.logits(step)
    assert width == 23
    for s, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        mine = logits[step.query_start[s] : step.query_start[s + 1]]
        assert len(mine) == len(ids) - start
        assert tolerance.error(mine, alone[s][start:]) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_the_cache_holds_exactly_the_keys_and_values_just_computed(name, dtype, parts):
    decoder, weights = parts(name)
    options = RuntimeOptions(block_size=4, kv_dtype=dtype, max_batch=64)
    model = CpuModel(decoder, memory_source.MemorySource(weights), options)
    batch = batch_of([(IDS, 0), (IDS[:6], 0)])
    seen = model.trace(batch)
    for layer, block in enumerate(decoder.blocks):
        spec = block.attn
        qkv = seen[f"blk.{layer}.attn.store_kv"]
        for s in range(2):
            rows = slice(batch.query_start[s], batch.query_start[s + 1])
            at = batch.positions[rows]
            k, v = model.read_kv(layer, batch.block_tables[s][at // 4] * 4 + at % 4)
            wanted = qkv[rows, spec.q_size :].astype({"f32": np.float32, "f16": np.float16}[dtype])
            np.testing.assert_array_equal(k.reshape(len(at), -1), wanted[:, : spec.kv_size].astype(np.float32))
            np.testing.assert_array_equal(v.reshape(len(at), -1), wanted[:, spec.kv_size :].astype(np.float32))


def test_a_half_precision_cache_changes_little(parts):
    decoder, weights = parts("llama-gqa")
    half, full = (run(decoder, weights, IDS, kv_dtype=dtype) for dtype in ("f16", "f32"))
    assert 0 < tolerance.error(half, full) < 2e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_canaries_around_the_workspace_stay_intact_at_every_length(name, parts):
    decoder, weights = parts(name)
    model = CpuModel(decoder, memory_source.MemorySource(weights), RuntimeOptions(max_tokens=13, max_batch=13))
    size = len(model._memory)
    canary = np.float32(-12345.678)
    fenced = np.full(size + 512, canary)
    model._memory = fenced[256 : 256 + size]
    for length in range(1, 14):
        model.logits(batch_of([(IDS[:length], 0)], model.plan.block_size))
        assert (fenced[:256] == canary).all()
        assert (fenced[256 + size :] == canary).all()


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2-tied", "gptneox-parallel", "mistral-window"])
def test_deterministic_results_are_bit_equal_alone_in_a_batch_and_chunked(name, tiny_model, registry):
    def llm(chunk: int) -> LLM:
        runtime = {"deterministic": True, "max_tokens_per_step": chunk, "block_size": 4}
        return LLM({"model": str(tiny_model(name)), "device": "cpu", "runtime": runtime}, registry=registry)

    params = SamplingParams(max_tokens=9, temperature=1.0, seed=5, logprobs=2, ignore_eos=True)
    others = [[1, 2, 3], IDS[4:], IDS[:2] * 7]
    with llm(64) as whole, llm(3) as chunked:
        alone = whole.generate([IDS], params)[0]
        assert whole.generate([*others, IDS], params)[-1] == alone
        assert chunked.generate([IDS], params)[0] == alone
        assert chunked.generate([others[0], IDS, others[1]], params)[1] == alone


@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_context_ends_a_generation_and_never_wraps(name, tiny_model, registry):
    settings = {"model": str(tiny_model(name)), "device": "cpu", "runtime": {"context": 20, "block_size": 8}}
    with LLM(settings, registry=registry) as llm:
        out = llm.generate([IDS], SamplingParams(max_tokens=1000, temperature=0.0, ignore_eos=True))[0]
        assert out.finish_reason == "length"
        assert len(IDS) + len(out.token_ids) == 20
        # What was generated with a full context is what teacher forcing gives.
        forced = llm.logits([*IDS, *out.token_ids][:20]).argmax(axis=1)
        assert list(out.token_ids) == forced[len(IDS) - 1 : -1].tolist()
        with pytest.raises(RequestError, match=r"21.*20"):
            llm.logits(list(range(21)))
        with pytest.raises(RequestError, match=r"25.*20"):
            llm.generate([list(range(25))])
        assert llm._generation.free_blocks == llm.plan.num_blocks


def test_fused_and_split_projections_agree(parts):
    decoder, weights = parts("llama-gqa")
    fused_weights = dict(weights)

    def fuse(block):
        qkv = block.attn.qkv
        name = qkv.q.weight + ".fused"
        fused_weights[name] = np.concatenate([fused_weights.pop(part.weight) for part in (qkv.q, qkv.k, qkv.v)])
        proj = dataclasses.replace(qkv.q, weight=name, bias=None)
        return dataclasses.replace(block, attn=dataclasses.replace(block.attn, qkv=FusedQKV(proj)))

    fused = dataclasses.replace(decoder, blocks=tuple(fuse(block) for block in decoder.blocks))
    np.testing.assert_array_equal(run(fused, fused_weights, IDS), run(decoder, weights, IDS))


@pytest.mark.parametrize("value", [np.inf, np.float32(3e38)])
@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.1.attn_norm.weight", "output_norm.weight"])
@pytest.mark.filterwarnings("error")
def test_weights_that_overflow_warn_of_nothing_and_show_in_the_logits(name, value, parts):
    decoder, weights = parts("llama-gqa")
    weights[name] = np.full_like(weights[name], value)
    assert not np.isfinite(run(decoder, weights, IDS)).all()


@pytest.mark.parametrize("factor", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.filterwarnings("error")
def test_a_rope_factor_that_is_no_positive_number_is_refused_at_load(factor, parts):
    decoder, weights = parts("llama-rope-factors")
    weights["rope_freqs.weight"][1] = factor
    with pytest.raises(TensorError, match=r"rope_freqs\.weight"):
        CpuModel(decoder, memory_source.MemorySource(weights), RuntimeOptions())
