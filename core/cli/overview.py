"""The overview of a model: facts as a plain dict, and the same for a reader who is new to such models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..arch import MLP
from ..gguf import GGUFArray
from . import facts
from .console import table

if TYPE_CHECKING:
    from ..arch import Decoder
    from ..config import RunConfig
    from ..gguf import GGUFFile, Value
    from ..model import Model

_MOST_ITEMS = 6
_MOST_CHARS = 100


def of_file(file: GGUFFile) -> dict[str, Any]:
    """What the file says of itself, whether or not a plugin understands it."""
    tensors = list(file.tensors.values())
    metadata = file.metadata
    return {
        "name": _text(metadata, "general.name"),
        "files": [str(path) for path in file.paths],
        "file_bytes": sum(path.stat().st_size for path in file.paths),
        "gguf_version": file.version,
        "gguf_architecture": _text(metadata, "general.architecture"),
        "tensors": len(tensors),
        "parameters": facts.parameters(tensors),
        "types": [{"type": name, "tensors": count, "bytes": size} for name, count, size in facts.type_mix(tensors)],
        "tokenizer": _text(metadata, "tokenizer.ggml.model"),
        "pre_tokenizer": _text(metadata, "tokenizer.ggml.pre"),
        "chat_template": "tokenizer.chat_template" in metadata,
    }


def of_model(model: Model, config: RunConfig) -> dict[str, Any]:
    """What the plugin made of it, added to :func:`of_file`."""
    decoder = model.decoder
    attentions = [block.attn for block in decoder.blocks]
    claimed = facts.claimed(model)
    return {
        "name": model.name,
        "architecture": model.architecture.name,
        "plugin": model.plugin.name,
        "package": f"{model.plugin.distribution} {model.plugin.version}",
        "parameters": facts.parameters(claimed),
        "layers": len(decoder.blocks),
        "hidden": decoder.hidden,
        "attention": facts.span(facts.attention_kind(item) for item in attentions),
        "heads": facts.span(item.heads for item in attentions),
        "kv_heads": facts.span(item.kv_heads for item in attentions),
        "head_dim": facts.span(item.head_dim for item in attentions),
        "kv_values_per_token": decoder.kv_values_per_token(),
        "kv_saving": round(facts.mha_kv_values(decoder) / decoder.kv_values_per_token(), 3),
        "window": facts.span(item.window or "none" for item in attentions),
        "mlp": facts.span(_mlp(block.mlp) for block in decoder.blocks),
        "norm": facts.span(_norm(block.attn_norm) for block in decoder.blocks),
        "positions": _positions(decoder),
        "tied_head": decoder.head is None,
        "context": decoder.context,
        "vocabulary": decoder.vocab,
        "chat_template": bool(config.model.chat_template) or "tokenizer.chat_template" in model.file.metadata,
        "unused_tensors": list(model.claims.unused),
    }


def text(known: Mapping[str, Any]) -> str:
    """The facts as a short table; what is not known of a model without a plugin is left out."""
    size = known["file_bytes"]
    mix = [(item["type"], item["tensors"], item["bytes"]) for item in known["types"]]
    more = f" in {len(known['files'])} files" if len(known["files"]) > 1 else ""
    rows = [("model", known["name"] or "(the file gives no name)"), ("file", known["files"][0])]
    if "plugin" in known:
        rows.append(
            ("architecture", f"{known['architecture']} (plugin {known['plugin']} of {known['package']}; "
             f"the file says {known['gguf_architecture']})")
        )  # fmt: skip
    else:
        rows.append(("architecture", f"{known['gguf_architecture']} (as the file says)"))
    rows += [
        ("size", f"{size / 1e6:,.1f} MB{more}, {facts.count_text(known['parameters'])} parameters"),
        ("weights", f"{facts.mix_text(mix, 6)} of the bytes; {known['tensors']} tensors"),
    ]
    if "plugin" in known:
        rows += _layer_rows(known)
    pre = f", pre-tokenizer {known['pre_tokenizer']}" if known["pre_tokenizer"] else ""
    rows += [
        ("tokenizer", f"{known['tokenizer'] or 'none'}{pre}"),
        (
            "chat",
            "yes, the file has a chat template" if known["chat_template"] else "no chat template: it continues text",
        ),
    ]
    unused = known.get("unused_tensors") or []
    if unused:
        rows.append(("unused", f"{len(unused)} tensors that the model does not read: {', '.join(unused[:4])}"))
    return table(rows)


def _layer_rows(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    saving = known["kv_saving"]
    kind = {
        "MHA": f"MHA: each of {known['heads']} heads has keys and values of its own",
        "GQA": f"GQA: {known['heads']} heads share {known['kv_heads']} K/V heads",
        "MQA": f"MQA: {known['heads']} heads share one K/V head",
    }.get(known["attention"], f"{known['attention']}: {known['heads']} heads, {known['kv_heads']} K/V heads")
    less = f", so the KV cache is {saving:.3g} times smaller than with MHA" if saving > 1 else ""
    window = f", window {known['window']}" if known["window"] != "none" else ""
    head = "shares the embedding's matrix" if known["tied_head"] else "has a matrix of its own"
    return [
        ("layers", f"{known['layers']}, hidden size {known['hidden']:,}"),
        ("attention", f"{kind}{less}; head_dim {known['head_dim']}{window}"),
        ("MLP", known["mlp"]),
        ("norm", known["norm"]),
        ("positions", known["positions"]),
        ("context", f"{known['context']:,} tokens"),
        ("vocabulary", f"{known['vocabulary']:,} tokens; the output {head}"),
    ]


def tensors(file: GGUFFile, model: Model | None) -> list[dict[str, Any]]:
    """Every tensor of the file, in its order."""
    unused = set(model.claims.unused) if model else set()
    return [
        {
            "name": info.name,
            "shape": list(info.shape),
            "type": info.type,
            "bytes": info.nbytes,
            "used": info.name not in unused,
        }
        for info in file.tensors.values()
    ]


def value(item: Value) -> Any:
    """A metadata value for JSON, arrays whole."""
    return list(item) if isinstance(item, GGUFArray) else item


def short(item: Value) -> str:
    """A metadata value on one line; of a long array its length and its first items."""
    if isinstance(item, GGUFArray):
        items = ", ".join(_cut(repr(one), 30) for one in item[:_MOST_ITEMS])
        return f"[{items}{', …' if len(item) > _MOST_ITEMS else ''}]  ({len(item):,} {item.kind})"
    return _cut(repr(item) if isinstance(item, str) else str(item), _MOST_CHARS)


def _cut(line: str, most: int) -> str:
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _text(metadata: Mapping[str, Value], key: str) -> str | None:
    item = metadata.get(key)
    return item if isinstance(item, str) and item.strip() else None


def _mlp(mlp: object) -> str:
    if not isinstance(mlp, MLP):
        return f"{type(mlp).__name__}, a module of the plugin"
    return f"{'gated ' if mlp.gated else ''}{mlp.activation}, inner size {mlp.size:,}"


def _norm(norm: object) -> str:
    if norm is None:
        return "none"
    return f"{type(norm).__name__}, eps {norm.eps:g}" if hasattr(norm, "eps") else type(norm).__name__


def _positions(decoder: Decoder) -> str:
    if decoder.positions is not None:
        return "learned, one row per position"
    kinds = []
    for block in decoder.blocks:
        rope = block.attn.rope
        if rope is None:
            kinds.append("none")
            continue
        scaling = f", {type(rope.scaling).__name__} by {rope.scaling.factor:g}" if rope.scaling else ""
        scaling += ", with frequency factors" if rope.factors else ""
        kinds.append(f"RoPE on {rope.dim} of {block.attn.head_dim} components, theta {rope.theta:g}{scaling}")
    return facts.span(kinds)
