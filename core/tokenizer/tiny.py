"""The metadata of a small byte-level vocabulary, for model files that are made up: a tokenizer, but no language."""

from __future__ import annotations

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_ASCII = "".join(map(chr, range(ord("!"), ord("~") + 1)))
_MERGES = "Ġ t|h e|i n|Ġ a|e r|o n|Ġt he|r e|a t|e n|Ġ s|n d|o r|in g|e s|Ġ w|Ġ c|Ġa nd|i s|o u|l l|Ġ f|i t|Ġ p"
_END = "<|endoftext|>"


def tiny_vocabulary(size: int) -> dict[str, object]:
    """The keys ``tokenizer.*`` of a byte-level BPE of ``size`` tokens, the last of them unused where there is room.

    Printable ASCII, the space and the end-of-text token take 96; a smaller vocabulary lacks characters, and text that
    needs them loses them. ``size`` is at least 8.
    """
    alphabet = list(dict.fromkeys("Ġ" + _LETTERS + _ASCII + "Ċ"))[: size - 3]
    merges = [merge for merge in _MERGES.split("|") if all(char in alphabet for char in merge.replace(" ", ""))]
    merges = merges[: max(0, size - len(alphabet) - 2)]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in merges), _END]
    padding = [f"[PAD{index}]" for index in range(len(tokens), size)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + padding,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3] + [5] * len(padding),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
    }
