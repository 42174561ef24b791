"""The schema: it agrees with the engine about sampling, explains itself, and accepts what is shipped."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from polyhead import SamplingParams
from polyhead.config import RunConfig, SamplingConfig, load_config
from polyhead.errors import ConfigError, RequestError
from pydantic import BaseModel

CONFIGS = Path(__file__).parents[2] / "configs"

numbers = st.one_of(
    st.integers(-(2**65), 2**65),
    st.integers(-3, 200),
    st.floats(),
    st.floats(-3, 120),
    st.sampled_from(
        [0, 1, 0.0, 1.0, 2, -2, 0.01, 100, 20, 21, 2**31 - 1, 2**31, 2**64 - 1, 2**64, math.inf, -math.inf]
    ),
    st.booleans(),
    st.none(),
)
lists = st.one_of(
    st.lists(st.integers(-2, 2**32), max_size=4),
    st.lists(st.integers(0, 9), min_size=255, max_size=258),
    st.lists(st.text(max_size=3), max_size=18),
    st.text(max_size=3),
    st.sampled_from(["x" * 1000, "x" * 1001]),
)
biases = st.dictionaries(st.integers(-1, 2**32), numbers, max_size=3)
forms = st.dictionaries(
    st.sampled_from(["json", "regex", "choice", "grammar", "x"]),
    st.sampled_from([True, {}, {"a": [1.5]}, "{}", "{", "a", "", None, 5, ["a"], ["a", "a"], [], [1]]),
    max_size=2,
)


def test_sampling_keys_and_defaults_are_those_of_the_engine() -> None:
    ours = {name: getattr(SamplingConfig(), name) for name in SamplingConfig.model_fields}
    theirs = {field.name: getattr(SamplingParams(), field.name) for field in dataclasses.fields(SamplingParams)}
    assert ours == theirs


def test_what_is_not_written_stays_unset() -> None:
    loaded = load_config({"model": "m.gguf", "sampling": {"top_k": 5, "stop": "x"}}, environ={})
    assert loaded.config.sampling.model_dump(exclude_unset=True) == {"top_k": 5, "stop": ("x",)}
    SamplingParams(**loaded.config.sampling.model_dump(exclude_unset=True))


@given(st.sampled_from(sorted(SamplingConfig.model_fields)), st.one_of(numbers, lists, biases, forms))
@example("repetition_penalty", 0.001)
@example("seed", 2**64)
@example("seed", 2**64 - 1)
@example("temperature", math.inf)
@example("temperature", math.nan)
@example("top_k", True)
@example("logit_bias", {5: -math.inf})
@example("logit_bias", {5: math.nan})
@example("stop", "")
@example("structured_outputs", {"json": {"type": "object"}, "regex": None})
@example("structured_outputs", {"regex": "a"})
@example("structured_outputs", {"choice": ["a", "b"]})
def test_configuration_and_engine_accept_the_same_values(key: str, value: Any) -> None:
    def accepted(build: Any, error: type[Exception]) -> bool:
        try:
            build()
        except error:
            return False
        return True

    source = {"model": "m.gguf", "sampling": {key: value}}
    here = accepted(lambda: load_config(source, environ={}), ConfigError)
    assert here == accepted(lambda: SamplingParams(**{key: value}), RequestError)


def sections(model: type[BaseModel]) -> list[type[BaseModel]]:
    inner = [info.annotation for info in model.model_fields.values()]
    return [
        model,
        *(s for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel) for s in sections(kind)),
    ]


def test_every_key_has_a_description() -> None:
    for section in sections(RunConfig):
        assert section.__doc__
        for name, info in section.model_fields.items():
            assert info.description, f"{section.__name__}.{name}"


def test_the_json_schema_is_json_and_forbids_unknown_keys() -> None:
    schema = json.loads(json.dumps(RunConfig.model_json_schema(), allow_nan=False))
    objects = [schema, *(d for d in schema["$defs"].values() if d["type"] == "object")]
    assert len(objects) == 6
    assert all(item["additionalProperties"] is False for item in objects)
    assert schema["required"] == ["model"]
    assert {"type": "string"} in schema["properties"]["model"]["anyOf"]
    assert {"type": "string"} in schema["properties"]["prompt"]["anyOf"]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_configuration_is_valid(file: Path) -> None:
    loaded = load_config(file, environ={})
    assert loaded.config.model.path.startswith(("hf://", "pypi://"))
    assert loaded.config.prompt
    SamplingParams(**loaded.config.sampling.model_dump(exclude_unset=True))


def test_there_are_shipped_configurations() -> None:
    assert {"smollm2-135m", "gpt2", "llama-3.2-1b-instruct"} <= {file.stem for file in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_devices(device: str) -> None:
    assert load_config({"model": "m.gguf", "device": device}, environ={}).config.device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:01", "CPU", "", "cuda:0\n", 0, None])
def test_other_devices_are_refused(device: object) -> None:
    with pytest.raises(ConfigError, match="device: "):
        load_config({"model": "m.gguf", "device": device}, environ={})
