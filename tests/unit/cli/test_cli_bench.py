"""polyhead bench and perplexity on tiny models: their arithmetic, their output and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from polyhead import LLM, devices
from polyhead.bench import Case, cases, measure_limits, perplexity, shapes, windows
from polyhead.bench.work import flops, read_bytes, weight_bytes_per_step

Invoke = Callable[..., Result]
TEXT = "the rain and the sea are one thing; he sings in it, and it is on."


@given(st.integers(1, 200), st.integers(1, 50), st.data())
def test_windows_score_every_token_once_with_enough_before_it(total: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    scored: list[int] = []
    for begin, end, first in windows(total, size, stride):
        assert 0 < end - begin <= size
        assert begin <= first < end
        assert begin == 0 or first - begin >= size - stride
        scored += range(first, end)
    assert scored == list(range(total))


def by_hand(llm: LLM, ids: list[int], bos: list[int], context: int, stride: int) -> list[float]:
    """Each token's loss from its own window, one at a time."""
    size, losses = context - len(bos), []
    for at in range(0 if bos else 1, len(ids)):
        begin = 0
        while at >= begin + size:
            begin += stride
        logits = llm.logits([*bos, *ids[begin:at], ids[at]])[-2].astype(np.float64)
        losses.append(float(np.log(np.exp(logits).sum()) - logits[ids[at]]))
    return losses


@pytest.mark.parametrize(("context", "stride"), [(64, None), (16, 8), (16, 1), (16, 15), (2, 1)])
@pytest.mark.parametrize("add_bos", [False, True])
def test_perplexity_agrees_with_one_token_at_a_time(
    llama: str, context: int, stride: int | None, add_bos: bool
) -> None:
    with LLM({"model": llama, "device": "cpu"}) as llm:
        llm.tokenizer.add_bos = add_bos
        ids = llm.tokenizer.encode(TEXT, bos=False)
        bos = [llm.tokenizer.bos_id] if add_bos else []
        found = perplexity(llm, TEXT, context=context, stride=stride)
        step = found.stride
        losses = by_hand(llm, ids, bos, context, step)
    assert found.bos is add_bos
    assert found.tokens == len(losses) == len(ids) - (not add_bos)
    assert found.nll == pytest.approx(np.mean(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(np.exp(found.nll))


def test_perplexity_command_prints_numbers_and_how_bos_was_handled(invoke: Invoke, llama: str) -> None:
    result = invoke("perplexity", llama, "-", "--context", "16", stdin=TEXT)
    assert result.exit_code == 0
    for part in ("perplexity", "mean NLL", "no BOS", "of up to 16 tokens, stride 8", "tok/s"):
        assert part in result.stdout
    found = json.loads(invoke("perplexity", llama, "-", "--context", "16", "--json", stdin=TEXT).stdout)
    assert f"{found['perplexity']:.4f}" in result.stdout
    assert found["tokens"] == found["text_tokens"] - 1


@pytest.mark.parametrize(
    ("args", "text", "word"),
    [
        (("--context", "65"), TEXT, "65"),
        (("--context", "16", "--stride", "16"), TEXT, "from 1 to 15"),
        ((), "x", "1 tokens"),
        ((), "", "0 tokens"),
    ],
)
def test_perplexity_refuses(invoke: Invoke, llama: str, args: tuple[str, ...], text: str, word: str) -> None:
    result = invoke("perplexity", llama, "-", *args, stdin=text)
    assert result.exit_code == 2
    assert word in result.stderr


def test_bench_table_has_a_row_for_every_test(invoke: Invoke, llama: str) -> None:
    result = invoke("bench", llama, "-p", "20", "-n", "5", "-d", "7", "-b", "1,3", "-r", "2")
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert [row.split("|")[1].strip() for row in rows[2:]] == [
        "pp20 @ d7", "pp20 @ d7 x3", "tg5 @ d7", "tg5 @ d7 x3",
    ]  # fmt: skip
    assert all(row.rstrip(" |").endswith("%") for row in rows[2:])
    for part in ("loaded in", "peak memory", "limits of this machine", "read per decode step"):
        assert part in result.stdout


def test_bench_json_is_consistent(invoke: Invoke, llama: str) -> None:
    found = json.loads(invoke("bench", llama, "-p", "30", "-n", "4", "-b", "2", "-r", "3", "-o", "json").stdout)
    assert [test["test"] for test in found["tests"]] == ["pp30 x2", "tg4 x2"]
    for test in found["tests"]:
        assert len(test["seconds"]) == 3
        assert test["tokens_per_second"] == pytest.approx(test["tokens"] * 2 / sorted(test["seconds"])[1])
        assert test["share_of_limit"] > 0
    assert found["peak_bytes"] > found["weight_bytes_per_step"] > 0
    assert found["limits"]["read_bytes"] > 1e8


def test_bench_splits_prompts_over_steps_as_the_plan_says(invoke: Invoke, llama: str) -> None:
    args = ("-p", "50", "-n", "0", "-b", "3", "-r", "1", "-o", "json", "--set", "runtime.max_tokens_per_step=16")
    assert invoke("bench", llama, *args).exit_code == 0


def test_bench_measures_a_shape_without_a_file(invoke: Invoke) -> None:
    assert "llama-8b" in invoke("bench", "--shape", "?").stdout
    result = invoke("bench", "--shape", "no-such")
    assert result.exit_code == 2
    assert "llama-8b" in result.stderr


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("-p", "65", "-n", "0"), "65"),
        (("-p", "0", "-n", "40", "-d", "30"), "70"),
        (("-p", "0", "-n", "0"), "nothing to measure"),
        (("-b", "0"), "batch"),
        (("-b", "x"), "'x'"),
        (("-p", "-1"), "-1"),
        (("-r", "0"), "from 1 to 1,000,000, got 0"),
        (("-r", str(10**30)), "from 1 to 1,000,000"),
        (("-p", "8", "--set", "runtime.context=4"), "context of 8"),
    ],
)
def test_bench_refuses(invoke: Invoke, llama: str, args: tuple[str, ...], word: str) -> None:
    result = invoke("bench", llama, "-n", "2", *args) if "-n" not in args else invoke("bench", llama, *args)
    assert result.exit_code == 2
    assert word in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("args", [("--shape", "tiny:"), ("--shape", "tiny", "--quant", "F16,")])
@pytest.mark.parametrize("way", [("-p", "0", "-n", "2"), ("throughput", "-b", "1", "-p", "4", "-n", "2")])
def test_an_empty_quantisation_is_not_the_default(
    invoke: Invoke, way: tuple[str, ...], args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = shapes.Shape("tiny", "llama", 2, 32, 4, 2, 8, 64, 97, 128, tied=True)
    monkeypatch.setitem(shapes.SHAPES, "tiny", tiny)
    monkeypatch.setattr(
        devices, "load", lambda *_: pytest.fail("what was asked for is known before anything is loaded")
    )
    result = invoke("bench", *way, *args, "--device", "cpu")
    assert result.exit_code == 2
    assert "quantisation '' is unknown" in result.stderr


def test_bench_says_where_a_batch_is_larger_than_configured(invoke: Invoke, llama: str) -> None:
    args = ("-p", "0", "-n", "2", "-r", "1", "-b", "3", "--device", "cpu")
    assert "max_batch" not in invoke("bench", llama, *args).stderr
    found = invoke("bench", llama, *args, "--set", "runtime.max_batch=2")
    assert found.exit_code == 0
    assert "3 sequences" in found.stderr


def test_bench_says_that_it_does_not_guess(invoke: Invoke, llama: str) -> None:
    args = ("-p", "0", "-n", "2", "-r", "1", "--device", "cpu")
    assert "speculation" not in invoke("bench", llama, *args).stderr
    found = invoke("bench", llama, *args, "--set", "runtime.speculation=ngram")
    assert found.exit_code == 0
    assert "without runtime.speculation" in found.stderr


def test_bench_needs_a_model(invoke: Invoke, llama: str) -> None:
    assert invoke("bench").exit_code == 2
    assert invoke("bench", llama, "--shape", "llama-1b").exit_code == 2


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 4))
def test_work_counts_pairs_of_query_and_key_one_by_one(depth: int, tokens: int, batch: int) -> None:
    from dataclasses import replace

    for window in (None, 1, 7, 100):
        blocks = tuple(replace(block, attn=replace(block.attn, window=window)) for block in DECODER.blocks)
        decoder = replace(DECODER, blocks=blocks)
        pairs = sum(min(position + 1, window or position + 1) for position in range(depth, depth + tokens))
        plain = 2 * tokens * sum(a * b for a, b in MATRICES) + 2 * 8 * 50
        case = Case("pp", tokens, depth, batch)
        assert flops(decoder, case) == batch * (plain + 2 * 4 * 12 * pairs)
        if window is None:
            kv = batch * 2 * 2 * 6 * 4 * pairs  # layers, K and V, K/V values, bytes
            step = weight_bytes_per_step(decoder, PLAN)
            assert read_bytes(decoder, PLAN, Case("tg", tokens, depth, batch)) == pytest.approx(tokens * step + kv)


def test_weights_read_per_step_leave_out_tables_that_are_only_looked_up(tiny_model: Callable[[str], Path]) -> None:
    for name in ("gpt2-tied", "gpt2-untied", "llama-mha"):
        with LLM({"model": str(tiny_model(name)), "device": "cpu", "runtime": {"context": 16}}) as llm:
            tensors = llm.model.file.tensors
            sizes = {key: info.n_elements for key, info in tensors.items()}
            looked_up = sizes.get("position_embd.weight", 0)
            looked_up += sizes["token_embd.weight"] if "output.weight" in sizes else 0
            read = weight_bytes_per_step(llm.model.decoder, llm.plan)
        assert read == pytest.approx(4 * (sum(sizes.values()) - looked_up), rel=0.1)


def test_limits_of_the_cpu_are_plausible() -> None:
    limits = measure_limits("cpu", array_bytes=8 << 20, gemm_size=256)
    assert limits is not None
    assert limits.read_bytes > 1e8
    assert limits.flops > 1e8


def test_cases_come_in_the_order_of_the_table() -> None:
    assert [case.label for case in cases(512, 128, 0, (1, 8))] == ["pp512", "pp512 x8", "tg128", "tg128 x8"]


def _decoder() -> object:
    from polyhead.arch import MLP, Attention, Block, Decoder, Embedding, Linear, RMSNorm, SplitQKV

    block = Block(
        attn_norm=RMSNorm("n", 1e-5),
        attn=Attention(4, 2, 3, SplitQKV(Linear("q"), Linear("k"), Linear("v")), Linear("o")),
        mlp_norm=RMSNorm("m", 1e-5),
        mlp=MLP(20, Linear("u"), Linear("d"), "relu"),
    )
    return Decoder(8, 50, 100, Embedding("e"), (block, block), RMSNorm("f", 1e-5))


DECODER = _decoder()
MATRICES = 2 * [(12, 8), (6, 8), (6, 8), (8, 12), (20, 8), (8, 20)]


def _plan() -> object:
    from polyhead.runtime.memory import plan_memory

    return plan_memory(
        device="cpu", total=1 << 30, free=1 << 30, memory_fraction=1.0, weights=10_000, workspace=0,
        kv_bytes_per_token=2 * 2 * 6 * 4, kv_dtype="f32", block_size=16, context=100, model_context=100, max_batch=4,
        max_tokens=16, max_logit_rows=4,
    )  # fmt: skip


PLAN = _plan()
