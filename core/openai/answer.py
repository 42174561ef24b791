"""Answers: completions as the bodies of OpenAI's ``chat.completion`` and ``text_completion``."""

from __future__ import annotations

import codecs
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..completion import Completion
from ..deltas import TokenLogprob
from .body import Asked

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_LEAST_LOGPROB = -9999.0  # JSON has no -inf; this is what the protocol puts in its place


def answer(
    asked: Asked,
    completions: Sequence[Completion],
    tokenizer: Tokenizer,
    *,
    answer_id: str,
    model: str,
    created: int,
    fingerprint: str | None = None,
    stop_ids: Collection[int] = (),
) -> dict[str, Any]:
    """The body of an answer; ``completions`` has one for each prompt, with its samples.

    ``created`` is in seconds since 1970. ``stop_ids`` are the tokens that end a generation: they count as generated,
    but are no part of the text, and so have no log-probability here. ``prompt_tokens`` counts every prompt once.
    """
    if asked.only_echo:
        completions = [_without_output(completion) for completion in completions]
    chat = asked.endpoint == "chat"
    choices: list[dict[str, Any]] = []
    for place, completion in enumerate(completions):
        prefix = _echo(asked, place, tokenizer)
        for sample in completion.outputs:
            text = prefix + sample.text
            tokens = _spoken(sample, stop_ids)
            choice: dict[str, Any] = {"index": len(choices)}
            if chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None}
                choice["logprobs"] = None if tokens is None else _chat_logprobs(tokens, tokenizer)
            else:
                choice["text"] = text
                choice["logprobs"] = _text_logprobs(tokens, sample, tokenizer, asked.echo, len(prefix))
            choice["finish_reason"] = sample.finish_reason
            choices.append(choice)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{answer_id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage(completions),
        "system_fingerprint": fingerprint,
    }


def _without_output(completion: Completion) -> Completion:
    return replace(
        completion,
        text="",
        token_ids=(),
        logprobs=None if completion.logprobs is None else (),
        finish_reason="length",
        samples=tuple(_without_output(sample) for sample in completion.samples),
    )


def usage(completions: Sequence[Completion]) -> dict[str, Any]:
    """Tokens taken in and made; ``cached_tokens`` of the prompts' were found in the KV cache."""
    prompt = sum(len(completion.prompt_token_ids) for completion in completions)
    made = sum(len(sample.token_ids) for completion in completions for sample in completion.outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(completion.cached_tokens for completion in completions)},
    }


def _echo(asked: Asked, place: int, tokenizer: Tokenizer) -> str:
    if not asked.echo:
        return ""
    prompt = asked.prompts[place]
    if isinstance(prompt, str):
        return prompt
    return tokenizer.decode([token_id for token_id in prompt if token_id < tokenizer.vocab_size])  # others have no text


def _spoken(sample: Completion, stop_ids: Collection[int]) -> Sequence[TokenLogprob] | None:
    """The log-probabilities of the tokens but for the one that ended the generation."""
    tokens = sample.logprobs
    if tokens and sample.finish_reason == "stop" and tokens[-1].token_id in stop_ids:
        return tokens[:-1]
    return tokens


def _chat_logprobs(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = _bytes(tokenizer, token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(data)}

    content = [
        entry(item.token_id, item.logprob) | {"top_logprobs": [entry(token, value) for token, value in item.top]}
        for item in tokens
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(
    made: Sequence[TokenLogprob] | None, sample: Completion, tokenizer: Tokenizer, echo: bool, offset: int
) -> dict[str, Any] | None:
    """Lists with an entry for each token of the text; those of an echoed prompt come first, and its first is null."""
    if made is None:
        return None
    scores: list[TokenLogprob | None] = [*made]
    ids = [item.token_id for item in made]
    offsets = _offsets([_bytes(tokenizer, token_id) for token_id in ids], offset)
    if echo and sample.prompt_logprobs is not None:
        scores = [*sample.prompt_logprobs, *scores]
        ids = [*sample.prompt_token_ids, *ids]
        offsets = [*_prompt_offsets(sample.prompt_token_ids, tokenizer), *offsets]
    names = [_name(tokenizer, token_id) for token_id in ids]
    tops: list[dict[str, float] | None] = []
    for name, item in zip(names, scores, strict=True):
        if item is None:
            tops.append(None)
            continue
        top = {_name(tokenizer, token): _number(value) for token, value in item.top}
        tops.append({**top, name: _number(item.logprob)})
    return {
        "tokens": names,
        "token_logprobs": [None if item is None else _number(item.logprob) for item in scores],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _offsets(pieces: Sequence[bytes], offset: int) -> list[int]:
    """Where each token's first character stands in the text, if the first one stands at ``offset``."""
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(characters.decode(piece))
    return offsets


def _prompt_offsets(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The same for a prompt, in whose text neither BOS nor the space before the first word shows."""
    text = tokenizer.stream(skip_special=False)
    offset = 0
    offsets = []
    for number, token_id in enumerate(ids):
        offsets.append(offset)
        if token_id < tokenizer.vocab_size and (number or token_id != tokenizer.bos_id):
            offset += len(text.push(token_id))
    return offsets


def _name(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a key: its text, or its bytes spelt out where they are no whole characters."""
    data = _bytes(tokenizer, token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    # Rows that only pad the embedding stand for nothing.
    return tokenizer.token_bytes(token_id) if token_id < tokenizer.vocab_size else b""


def _number(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LEAST_LOGPROB
