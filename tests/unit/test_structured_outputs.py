"""StructuredOutputs: what is accepted, what is refused and with which words; equal ones are equal."""

from __future__ import annotations

import copy
import json
import math
import pickle
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.engine import SamplingParams, StructuredOutputs
from polyhead.engine.structured import ANY_OBJECT, MAX_CHOICE_CHARS, MAX_CHOICES, MAX_DEPTH, MAX_TEXT
from polyhead.errors import RequestError


def nested(levels: int) -> dict:
    schema: dict = {}
    for _ in range(levels - 1):
        schema = {"not": schema}
    return schema


def shared(levels: int) -> dict:
    """A small structure that is gigantic when written out."""
    items: list = [1]
    for _ in range(levels):
        items = [items, items]
    return {"enum": items}


endless: dict = {}
endless["items"] = endless

REFUSED = [
    ({}, "structured_outputs must have exactly one of json, regex, choice, grammar, got none"),
    ({"regex": "a", "json": {}}, "exactly one of json, regex, choice, grammar, got json and regex"),
    ({"regex": 5}, "structured_outputs.regex must be a string, got 5"),
    ({"regex": ""}, "structured_outputs.regex must not be empty"),
    ({"grammar": ""}, "structured_outputs.grammar must not be empty"),
    ({"grammar": b"x"}, "structured_outputs.grammar must be a string, got b'x'"),
    ({"regex": "ab\ud800"}, r"structured_outputs.regex has a lone surrogate \(U\+D800\) at character 2"),
    ({"regex": "x" * (MAX_TEXT + 1)}, "structured_outputs.regex has 262,145 characters; 262,144 bytes are allowed"),
    ({"regex": "é" * (MAX_TEXT // 2 + 1)}, "structured_outputs.regex has 262,146 bytes; 262,144 bytes are allowed"),
    ({"choice": []}, "structured_outputs.choice must hold 1 to 1,024 strings, got none"),
    ({"choice": "yes"}, "structured_outputs.choice must be a sequence of 1 to 1,024 strings, got 'yes'"),
    ({"choice": {"a": 1}}, "structured_outputs.choice must be a sequence"),
    ({"choice": ["a", 5]}, r"structured_outputs.choice\[1\] must be a string, got 5"),
    ({"choice": ["a", ""]}, r"structured_outputs.choice\[1\] must not be empty"),
    ({"choice": ["a", "b", "a"]}, r"structured_outputs.choice\[2\] is 'a', which structured_outputs.choice\[0\]"),
    ({"choice": map(str, range(10**9))}, "at most 1,024 strings, got more"),
    ({"choice": ["x" * 4097]}, r"structured_outputs.choice\[0\] has 4,097 characters; 4,096 are allowed"),
    (
        {"choice": [f"{i:04}" * 512 for i in range(200)]},
        "structured_outputs.choice has 264,192 bytes up to item 128; 262,144 bytes are allowed",
    ),
    ({"json": 5}, "structured_outputs.json must be a JSON schema .* or True, got 5"),
    ({"json": False}, "structured_outputs.json must be a JSON schema .* or True, got False"),
    ({"json": []}, "structured_outputs.json must be a JSON schema"),
    ({"json": "[1]"}, r"structured_outputs.json must be a JSON schema .* got \[1\]"),
    ({"json": "true"}, "structured_outputs.json must be a JSON schema .* got True"),
    ({"json": "{"}, "structured_outputs.json is not JSON: "),
    ({"json": ""}, "structured_outputs.json must not be empty"),
    ({"json": '{"a": 1, "b": 2, "a": 3}'}, "structured_outputs.json has the key 'a' twice in one object"),
    ({"json": '{"const": NaN}'}, "structured_outputs.json has the number nan, which JSON does not know"),
    ({"json": '{"const": 1e999}'}, "structured_outputs.json has the number inf"),
    ({"json": {"const": math.nan}}, "structured_outputs.json has the number nan"),
    ({"json": {"const": -math.inf}}, "structured_outputs.json has the number -inf"),
    ({"json": {"const": {1, 2}}}, r"structured_outputs.json holds \{1, 2\}, a set, which JSON does not know"),
    ({"json": {1: 2}}, "structured_outputs.json has the key 1, which is not a string"),
    ({"json": {"const": "\ud800"}}, "structured_outputs.json has a lone surrogate"),
    ({"json": '{"const": "\\ud800"}'}, "structured_outputs.json has a lone surrogate"),
    ({"json": {"const": 10**5000}}, "structured_outputs.json has an integer of thousands of digits"),
    ({"json": '{"const": ' + "9" * 5000 + "}"}, "structured_outputs.json is not JSON: Exceeds the limit"),
    ({"json": nested(MAX_DEPTH + 1)}, "structured_outputs.json is nested deeper than the 64 levels"),
    ({"json": json.dumps(nested(500))}, "structured_outputs.json is nested deeper than the 64 levels"),
    ({"json": "[" * 200_000}, "structured_outputs.json is nested deeper than the 64 levels"),
    ({"json": endless}, "structured_outputs.json is nested deeper than the 64 levels"),
    ({"json": shared(60)}, "structured_outputs.json has more than 262,144 values"),
    ({"json": {"description": "x" * MAX_TEXT}}, "structured_outputs.json has 262,162 characters; 262,144 bytes"),
]


@pytest.mark.parametrize(("given_", "words"), REFUSED, ids=[words[:60] for _, words in REFUSED])
def test_refusal_names_the_field_and_the_number(given_, words):
    with pytest.raises(RequestError, match=words) as caught:
        StructuredOutputs(**given_)
    assert str(caught.value).startswith("structured_outputs")
    assert len(str(caught.value)) < 400


def test_bounds_themselves_are_accepted():
    StructuredOutputs(json=nested(MAX_DEPTH))
    StructuredOutputs(regex="x" * MAX_TEXT)
    StructuredOutputs(choice=[f"{i:04}" for i in range(MAX_CHOICES)])
    StructuredOutputs(choice=["x" * MAX_CHOICE_CHARS])


def test_a_schema_becomes_text_that_keeps_the_order_of_its_keys():
    schema = {"type": "object", "properties": {"z": {"const": 1.5}, "a": {"enum": ("é", None, True, 10**30)}}}
    text = f'{{"type":"object","properties":{{"z":{{"const":1.5}},"a":{{"enum":["é",null,true,{10**30}]}}}}}}'
    specs = [StructuredOutputs(json=given_) for given_ in (schema, MappingProxyType(schema), json.dumps(schema))]
    assert {spec.json for spec in specs} == {text}
    assert len(set(specs)) == 1
    assert StructuredOutputs(json={"a": 1, "b": 2}) != StructuredOutputs(json={"b": 2, "a": 1})
    assert StructuredOutputs(json=True).json == ANY_OBJECT


def test_later_changes_of_what_was_given_change_nothing():
    schema, choice = {"enum": [1]}, ["a"]
    specs = StructuredOutputs(json=schema), StructuredOutputs(choice=choice)
    schema["enum"].append(2)
    choice.append("b")
    assert [spec.content for spec in specs] == ['{"enum":[1]}', ("a",)]


SPECS = st.one_of(
    st.builds(StructuredOutputs, regex=st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
    st.builds(StructuredOutputs, grammar=st.just('start: "a"')),
    st.builds(StructuredOutputs, choice=st.lists(st.sampled_from("abcdef"), min_size=1, unique=True)),
    st.builds(StructuredOutputs, json=st.just(True) | st.dictionaries(st.sampled_from("abc"), st.floats(0, 1))),
)


@given(SPECS)
def test_one_can_be_made_again_of_plain_data_copied_and_pickled(spec):
    data = spec.mapping()
    assert list(data) == [spec.kind]
    assert json.loads(json.dumps(data)) == data
    for again in (StructuredOutputs.of(data), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert again == spec
        assert hash(again) == hash(spec)
        assert again.content == spec.content
    assert StructuredOutputs.of(spec) is spec
    assert StructuredOutputs.of({**dict.fromkeys(("json", "regex", "choice", "grammar")), **data}) == spec


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "structured_outputs must be a mapping with one of the keys json, regex, choice, grammar, got 5"),
        ("x", "got 'x'"),
        ({"regexp": "x"}, "structured_outputs has the key 'regexp'; known are json, regex, choice, grammar"),
        ({5: "x"}, "structured_outputs has the key 5"),
        ({"regex": None}, "got none"),
    ],
)
def test_a_mapping_of_another_shape_is_refused(value, words):
    for build in (StructuredOutputs.of, lambda value: SamplingParams(structured_outputs=value)):
        with pytest.raises(RequestError, match=words):
            build(value)


def test_sampling_parameters_take_one_or_a_mapping():
    spec = StructuredOutputs(choice=["yes", "no"])
    params = SamplingParams(structured_outputs=spec)
    assert params == SamplingParams(structured_outputs={"choice": ["yes", "no"]})
    assert hash(params) == hash(SamplingParams(structured_outputs={"choice": ["yes", "no"]}))
    assert params != SamplingParams()
    assert params.structured is spec
    assert SamplingParams().structured is None


def test_what_would_go_on_after_the_end_contradicts_structured_outputs():
    with pytest.raises(RequestError, match=r"^structured_outputs cannot be combined with min_tokens: "):
        SamplingParams(structured_outputs={"regex": "a"}, min_tokens=1)
    with pytest.raises(RequestError, match=r"^structured_outputs cannot be combined with ignore_eos: "):
        SamplingParams(structured_outputs={"regex": "a"}, ignore_eos=True)
    SamplingParams(
        structured_outputs={"regex": "a"}, n=3, stop="b", logit_bias={1: 5}, presence_penalty=1, stop_token_ids=[3]
    )
