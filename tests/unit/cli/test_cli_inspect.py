"""polyhead inspect: the overview, layers, tensors, metadata and memory of a file; and of one without a plugin."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from polyhead import LLM
from polyhead.cli.layers import draw, tree
from polyhead.model import Model
from polyhead.plugins import discover

Invoke = Callable[..., Result]


def test_overview_names_what_a_newcomer_asks_for(invoke: Invoke, llama: str) -> None:
    out = invoke("inspect", llama).stdout
    for part in (
        "llama-gqa", llama, "plugin llama_gqa of polyhead", "F32 100 %", "3, hidden size 48",
        "GQA: 6 heads share 2 K/V heads", "3 times smaller", "head_dim 16", "theta 500000", "64 tokens", "97 tokens",
        "shares the embedding's matrix", "pre-tokenizer gpt-2", "no chat template",
    ):  # fmt: skip
        assert part in out, part


@pytest.mark.parametrize(
    ("name", "kind", "saving"),
    [("gpt2-tied", "MHA", 1.0), ("llama-gqa", "GQA", 3.0), ("llama-mqa", "MQA", 5.0), ("llama-mha", "MHA", 1.0)],
)
def test_json_overview_agrees_with_the_decoder(
    invoke: Invoke, tiny_model: Callable[[str], Path], name: str, kind: str, saving: float
) -> None:
    path = tiny_model(name)
    found = json.loads(invoke("inspect", str(path), "--json").stdout)
    with LLM({"model": str(path), "device": "cpu"}) as llm:
        decoder = llm.model.decoder
        assert found["attention"] == kind
        assert found["kv_saving"] == saving
        assert found["layers"] == len(decoder.blocks)
        assert found["hidden"] == decoder.hidden
        assert found["vocabulary"] == decoder.vocab
        assert found["context"] == decoder.context
        assert found["tied_head"] == (decoder.head is None)
        assert found["file_bytes"] == path.stat().st_size
        assert found["parameters"] == sum(info.n_elements for info in llm.model.file.tensors.values())


def test_quantisation_mix_is_by_bytes(invoke: Invoke, tiny_model: Callable[[str], Path]) -> None:
    found = json.loads(invoke("inspect", str(tiny_model("llama-mixed")), "--json").stdout)
    sizes = [item["bytes"] for item in found["types"]]
    assert len(sizes) > 2
    assert sizes == sorted(sizes, reverse=True)
    listed = json.loads(invoke("inspect", str(tiny_model("llama-mixed")), "--tensors", "--json").stdout)["tensors"]
    for item in found["types"]:
        assert item["bytes"] == sum(tensor["bytes"] for tensor in listed if tensor["type"] == item["type"])


def test_layers_show_every_tensor_once_and_fold_equal_blocks(invoke: Invoke, llama: str) -> None:
    tensors = [item["name"] for item in json.loads(invoke("inspect", llama, "--tensors", "--json").stdout)["tensors"]]
    folded = invoke("inspect", llama, "--layers").stdout
    assert "blocks[1] to blocks[2]: as blocks[0]" in folded
    assert "attn: Attention  heads 6, kv_heads 2, head_dim 16" in folded
    assert "q: Linear" in folded
    assert "= blk.0.attn_q.weight  [96, 48]  F32" in folded
    assert "blk.1." not in folded
    whole = invoke("inspect", llama, "--layers", "-v").stdout
    for name in tensors:
        assert whole.count(f"= {name}  ") == 1


def test_blocks_that_differ_in_a_tensors_type_are_not_folded(tiny_model: Callable[[str], Path]) -> None:
    from dataclasses import replace

    from polyhead.model import Model

    with Model(tiny_model("gpt2-untied"), discover()) as model:
        tensors = dict(model.file.tensors)
        assert "blocks[1] to blocks[2]: as blocks[0]" in draw(tree(model.decoder, tensors))
        tensors["blk.1.ffn_up.weight"] = replace(tensors["blk.1.ffn_up.weight"], type="Q8_0")
        text = draw(tree(model.decoder, tensors))
    assert "as blocks" not in text
    assert "blk.2.ffn_up.weight" in text


@pytest.mark.parametrize("name", ["gpt2-tied", "gptneox-parallel", "llama-rope-factors", "qwen2-tied", "llama-bias"])
def test_the_tree_holds_exactly_the_tensors_that_the_decoder_claims(
    invoke: Invoke, tiny_model: Callable[[str], Path], name: str
) -> None:
    def names(layer: dict[str, list[dict[str, str]]]) -> set[str]:
        found = {leaf["name"] for leaf in layer["tensors"]}
        return found.union(*(names(child) for child in layer["children"]))

    path = str(tiny_model(name))
    found = json.loads(invoke("inspect", path, "--layers", "--tensors", "--json").stdout)
    assert names(found["layers"]) == {item["name"] for item in found["tensors"] if item["used"]}


def test_metadata_shortens_arrays_but_json_has_them_whole(invoke: Invoke, llama: str) -> None:
    (line,) = [
        line
        for line in invoke("inspect", llama, "--metadata").stdout.splitlines()
        if line.startswith("tokenizer.ggml.tokens")
    ]
    assert "(97 str)" in line
    assert len(line) < 200
    metadata = json.loads(invoke("inspect", llama, "--metadata", "--json").stdout)["metadata"]
    assert len(metadata["tokenizer.ggml.tokens"]) == 97
    assert metadata["llama.context_length"] == 64


def test_memory_shows_the_plan_and_what_mha_would_cost(invoke: Invoke, llama: str) -> None:
    out = invoke("inspect", llama, "--memory", "--device", "cpu").stdout
    found = json.loads(invoke("inspect", llama, "--memory", "--device", "cpu", "--json").stdout)["memory"]
    assert found["kv_bytes_per_token"] == 2 * 3 * 2 * 16 * 4  # K and V, layers, K/V heads, head_dim, bytes
    assert found["mha_kv_bytes_per_token"] == 3 * found["kv_bytes_per_token"]
    assert found["context"] == 64
    for part in ("weights", "KV cache", "workspace", "free", "(768 bytes)", "3 times as much", "It fits: context 64"):
        assert part in out, part


def test_a_file_without_a_plugin_is_shown_as_far_as_possible_and_exits_2(
    invoke: Invoke, llama: str, tmp_path: Path
) -> None:
    path = tmp_path / "zebra.gguf"
    path.write_bytes(Path(llama).read_bytes().replace(b"llama", b"zebra"))
    result = invoke("inspect", str(path))
    assert result.exit_code == 2
    assert "zebra (as the file says)" in result.stdout
    assert "F32 100 %" in result.stdout
    assert "no plugin answers to general.architecture 'zebra'" in result.stderr
    result = invoke("inspect", str(path), "--tensors", "--json")
    assert result.exit_code == 2
    assert len(json.loads(result.stdout)["tensors"]) == 29


def test_weights_are_not_read(spawn: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """Of a file with 52 GB of weights, all of them a hole in the file, nothing but the header comes into memory."""
    import resource

    import gguf

    path, rows = tmp_path / "huge.gguf", 1 << 28
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 48),
                       ("feed_forward_length", 88), ("attention.head_count", 6), ("attention.head_count_kv", 2),
                       ("rope.dimension_count", 8)):  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    matrices = {
        "attn_q": (48, 48), "attn_k": (16, 48), "attn_v": (16, 48), "attn_output": (48, 48), "ffn_gate": (88, 48),
        "ffn_up": (88, 48), "ffn_down": (48, 88), "attn_norm": (48,), "ffn_norm": (48,),
    }  # fmt: skip
    shapes = {f"blk.0.{name}.weight": shape for name, shape in matrices.items()}
    size = 0
    for name, shape in {**shapes, "output_norm.weight": (48,), "token_embd.weight": (rows, 48)}.items():
        nbytes = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes)
        size += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // 32) * 32
    os.truncate(path, start + size)
    assert path.stat().st_blocks * 512 < 1 << 20, "this file system has no sparse files"

    assert "12.88 B parameters" in spawn("inspect", str(path)).stdout
    result = spawn("inspect", str(path), "--layers", "--tensors", "--metadata")
    assert f"token_embd.weight  [{rows}, 48]  F32" in result.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 8 << 30


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\n\x1b[31m b ", "a [31m b"),
        ("n" * 5000, "n" * 99 + "…"),
        (" \n" * 999, "model"),
        ("\x1b", "model"),
        (7, "model"),
    ],
)
def test_the_name_in_a_file_is_shown_on_one_short_line(
    tiny_model: Callable[[str], Path], tmp_path: Path, name: object, shown: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_model("llama-gqa").read_bytes())
    with Model(path, discover()) as model:
        model.file.metadata = {**model.file.metadata, "general.name": name}
        assert model.name == shown
