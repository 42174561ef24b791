"""What can be said of a model from its description and its file's header: sizes, types, kinds. Reads no weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..arch import Attention, Decoder
    from ..gguf import TensorInfo
    from ..model import Model
    from ..runtime.contract import WeightInfo


def claimed(model: Model) -> list[TensorInfo]:
    """The tensors that the model reads, each once."""
    return [model.file.tensors[name] for name in dict.fromkeys(spec.name for spec in model.claims.specs)]


def architecture_text(model: Model) -> str:
    """The architecture, and the plugin and package that it is from."""
    name, plugin = model.architecture.name, model.plugin
    return plugin.origin if name == plugin.name else f"{name} of {plugin.origin}"


def parameters(tensors: Iterable[WeightInfo]) -> int:
    """Numbers in these tensors."""
    return sum(math.prod(info.shape) for info in tensors)


def type_mix(tensors: Iterable[WeightInfo]) -> list[tuple[str, int, int]]:
    """(type, tensors, bytes) for every block format, that with the most bytes first."""
    mix: dict[str, tuple[int, int]] = {}
    for info in tensors:
        count, size = mix.get(info.type, (0, 0))
        mix[info.type] = count + 1, size + info.nbytes
    return sorted(((name, *counts) for name, counts in mix.items()), key=lambda item: -item[2])


def mix_text(mix: list[tuple[str, int, int]], most: int = 3) -> str:
    """``Q4_1 68 %, Q8_0 31 %`` of the bytes; shares under half a percent are left out."""
    whole = sum(size for _, _, size in mix) or 1
    shares = [(name, round(100 * size / whole)) for name, _, size in mix]
    return ", ".join(f"{name} {share} %" for name, share in shares[:most] if share) or "nothing"


def count_text(number: int) -> str:
    """1.24 B, 134.5 M, 85.1 K, 612."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.{2 if unit == 10**9 else 1}f} {name}"
    return str(number)


def attention_kind(attention: Attention) -> str:
    """MHA, GQA or MQA."""
    if attention.kv_heads == attention.heads:
        return "MHA"
    return "MQA" if attention.kv_heads == 1 else "GQA"


def mha_kv_values(decoder: Decoder) -> int:
    """Numbers per token that the KV cache would hold if every query head had a K/V head of its own."""
    return sum(2 * block.attn.q_size for block in decoder.blocks)


def span(values: Iterable[object]) -> str:
    """``9``, or ``4 to 8`` where layers differ in numbers, or ``MHA, GQA`` where they differ in words."""
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return str(different[0])
    numbers = [value for value in different if isinstance(value, int)]
    if len(numbers) == len(different):
        return f"{min(numbers)} to {max(numbers)}"
    return ", ".join(map(str, different))
