"""Bodies of OpenAI's protocol: what they may say, what becomes of it, and that no body does worse than an error."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polyhead import SamplingParams
from polyhead.completion import Completion
from polyhead.deltas import TokenLogprob
from polyhead.engine import StructuredOutputs
from polyhead.errors import RequestError
from polyhead.openai import Asked, BodyError, answer, problem, read_body
from polyhead.openai.body import _FIELDS
from polyhead.tokenizer.stream import StreamDecoder

DEFAULTS = SamplingParams(temperature=0.3, max_tokens=77, min_tokens=1, seed=9, stop=("end",))
SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {}}}
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def test_what_a_body_leaves_out_comes_from_the_defaults_and_null_is_left_out():
    assert read_body("chat", HELLO, DEFAULTS).params == DEFAULTS
    nothing = dict.fromkeys(_FIELDS["chat"] - {"messages"})
    assert read_body("chat", HELLO | nothing, DEFAULTS) == read_body("chat", HELLO, DEFAULTS)


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"temperature": 0}, "temperature", 0.0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"n": 3}, "n", 3),
        ({"seed": 2**64 - 1}, "seed", 2**64 - 1),
        ({"stop": "a"}, "stop", ("a",)),
        ({"stop": ["a", "b"]}, "stop", ("a", "b")),
        ({"stop": []}, "stop", ()),
        ({"max_tokens": 5}, "max_tokens", 5),
        ({"max_completion_tokens": 5}, "max_tokens", 5),
        ({"max_completion_tokens": 5, "max_tokens": 5}, "max_tokens", 5),
        ({"presence_penalty": 1}, "presence_penalty", 1.0),
        ({"frequency_penalty": -1}, "frequency_penalty", -1.0),
        ({"logit_bias": {"5": -100}}, "logit_bias", {5: -100.0}),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": 4}, "logprobs", 4),
        ({"logprobs": False}, "logprobs", None),
        ({"top_k": 4}, "top_k", 4),
        ({"min_p": 0.5}, "min_p", 0.5),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"min_tokens": 0}, "min_tokens", 0),
        ({"stop_token_ids": [1]}, "stop_token_ids", (1,)),
        ({"ignore_eos": True}, "ignore_eos", True),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs", StructuredOutputs(choice=["a", "b"])),
        ({"structured_outputs": {"regex": "a", "json": None}}, "structured_outputs", StructuredOutputs(regex="a")),
        ({"response_format": {"type": "json_object"}}, "structured_outputs", StructuredOutputs(json=True)),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
                }
            },
            "structured_outputs",
            StructuredOutputs(json=SCHEMA),
        ),
        ({"response_format": {"type": "text"}}, "structured_outputs", None),
    ],
)
def test_a_field_of_the_body_sets_its_parameter_and_no_other(body, field, value):
    defaults = SamplingParams(logprobs=None if value is not None else 3)
    params = read_body("chat", HELLO | body, defaults).params
    assert getattr(params, field) == value
    assert {name for name in params.__slots__ if getattr(params, name) != getattr(defaults, name)} <= {field}


def test_a_form_may_be_asked_of_both_endpoints_and_a_text_is_free_of_the_defaults_form():
    defaults = SamplingParams(structured_outputs={"regex": "a+"})
    body = {"prompt": "x", "structured_outputs": {"json": SCHEMA}}
    assert read_body("completions", body, defaults).params.structured == StructuredOutputs(json=SCHEMA)
    assert read_body("chat", HELLO, defaults).params.structured == StructuredOutputs(regex="a+")
    text = HELLO | {"response_format": {"type": "text"}}
    assert read_body("chat", text, defaults).params.structured is None


def schema_format(**json_schema):
    return {"response_format": {"type": "json_schema", "json_schema": json_schema}}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "must be an object with a type"),
        ({"response_format": {"type": "yaml"}}, "response_format", "of type 'yaml' is not supported; 'text', 'json_ob"),
        ({"response_format": {"type": [1]}}, "response_format", "is not supported"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format", "unknown key 'schema'"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema must be an object with a name"),
        (schema_format(schema={}), "response_format", "json_schema.name must be a string of 1 to 64 characters"),
        (schema_format(name="x" * 65, schema={}), "response_format", "json_schema.name must be"),
        (schema_format(name="x"), "response_format", "json_schema.schema must be a JSON schema"),
        (schema_format(name="x", schema="{}"), "response_format", "json_schema.schema must be a JSON schema"),
        (schema_format(name="x", schema={}, strict=1), "response_format", "json_schema.strict must be true or false"),
        (schema_format(name="x", schema={}, description=1), "response_format", "json_schema.description must be"),
        (schema_format(name="x", schema={}, shema={}), "response_format", "json_schema has the unknown key 'shema'"),
        (
            schema_format(name="x", schema={"const": float("nan")}),
            "response_format",
            "response_format.json_schema.schema has the number nan",
        ),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs", "structured_outputs has the key 'regexp'"),
        ({"structured_outputs": {"regex": 5}}, "structured_outputs", "structured_outputs.regex must be a string"),
        ({"structured_outputs": []}, "structured_outputs", "must be a mapping with one of the keys"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "both say what the answer must be",
        ),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "structured_outputs", "combined with min_tokens"),
        (
            {"response_format": {"type": "json_object"}, "ignore_eos": True, "min_tokens": 0},
            "response_format",
            "cannot be combined with ignore_eos",
        ),
    ],
)
def test_a_form_that_is_none_is_refused(body, param, words):
    with pytest.raises(BodyError) as caught:
        read_body("chat", HELLO | body, DEFAULTS)
    assert caught.value.param == param
    assert words in str(caught.value)


def test_prompts_may_be_a_string_ids_or_lists_of_both():
    for prompt, prompts in (
        ("a", ("a",)),
        ([1, 2], ([1, 2],)),
        (["a", "b"], ("a", "b")),
        ([[1], "b", [2, 3]], ([1], "b", [2, 3])),
    ):
        assert read_body("completions", {"prompt": prompt}, DEFAULTS).prompts == prompts


def test_tools_are_shown_unless_none_may_be_called():
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert read_body("chat", HELLO | {"tools": tools}, DEFAULTS).tools == tools
    assert read_body("chat", HELLO | {"tools": tools, "tool_choice": "none"}, DEFAULTS).tools is None
    with pytest.raises(BodyError, match="tool_choice"):
        read_body("chat", HELLO | {"tools": tools, "tool_choice": "required"}, DEFAULTS)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"audio": {}}, "audio", "unsupported_parameter"),
        ({"temperature": 1e400}, "temperature", "invalid_value"),
        ({"stop": [""]}, "stop", "invalid_value"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_value"),
        ({"priority": 2**40}, "priority", "invalid_value"),
    ],
)
def test_an_error_names_its_field(body, param, code):
    with pytest.raises(BodyError) as caught:
        read_body("chat", HELLO | body, DEFAULTS)
    status, told = problem(caught.value)
    assert status == 400
    assert (told["error"]["param"], told["error"]["code"]) == (param, code)


def test_faults_of_the_program_are_not_blamed_on_the_request():
    status, told = problem(ZeroDivisionError("oh"))
    assert (status, told["error"]["type"]) == (500, "server_error")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["chat", "completions"]), st.data())
def test_any_body_is_read_or_refused(endpoint, data):
    body = {"messages": [{"role": "user", "content": "hi"}]} if endpoint == "chat" else {"prompt": "hi"}
    names = st.sampled_from(sorted(_FIELDS[endpoint])) | st.text(max_size=12)
    body |= data.draw(st.dictionaries(names, values, max_size=4))
    found: Asked | RequestError
    try:
        found = read_body(endpoint, body, DEFAULTS)
    except RequestError as error:
        found = error
    if isinstance(found, Asked):
        assert found.params.max_tokens >= 1
    else:
        status, told = problem(found)
        assert status == 400
        assert json.loads(json.dumps(told)) == told


@given(values)
def test_what_is_no_object_is_no_body(body):
    if not isinstance(body, dict):
        with pytest.raises(BodyError, match="JSON object"):
            read_body("chat", body, DEFAULTS)


class Bytes:
    """A tokenizer in which id i stands for byte i; 256 ends a text, and 300 only pads the embedding."""

    vocab_size = 257
    bos_id = 1

    def stream(self, skip_special):
        return StreamDecoder(self.token_bytes, "replace", True)

    def token_bytes(self, token_id):
        return b"<end>" if token_id == 256 else bytes([token_id])

    def decode(self, ids):
        return bytes(ids).decode()


def scores(ids):
    return tuple(TokenLogprob(token, -1.5, ((token, -1.5), (300, -float("inf")))) for token in ids)


def made(data, reason="stop", ends=(256,), **more):
    ids = (*data, *ends)
    return Completion(data.decode("utf-8", "ignore"), ids, reason, scores(ids), (1, 2, 3), **more)


def body_of(endpoint, asked, completion):
    asked = read_body(endpoint, asked, DEFAULTS)
    return answer(asked, [completion], Bytes(), answer_id="x", model="m", created=1, stop_ids={256})


def test_log_probabilities_add_up_to_the_text_also_inside_a_character():
    chat = body_of("chat", HELLO, made("né".encode()))["choices"][0]
    content = chat["logprobs"]["content"]
    assert [item["bytes"] for item in content] == [[110], [195], [169]]  # the token that ended it is no part of it
    assert content[1]["token"] == "\ufffd"
    assert content[0]["top_logprobs"][1] == {"token": "", "logprob": -9999.0, "bytes": []}
    text = body_of("completions", {"prompt": "ab", "echo": True}, made("né!".encode()))["choices"][0]
    assert text["text"] == "abné!"
    assert text["logprobs"]["tokens"] == ["n", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert text["logprobs"]["text_offset"] == [2, 3, 3, 4]


def test_an_echoed_prompt_has_log_probabilities_too_that_stand_where_its_text_does():
    prompt = (1, *b" h\xc3\xa9", 300)
    asked = {"prompt": "hé", "echo": True, "logprobs": 1}
    out = replace(made(b"a!"), prompt_token_ids=prompt, prompt_logprobs=(None, *scores(prompt[1:])))
    logprobs = body_of("completions", asked, out)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["\x01", " ", "h", "bytes:\\xc3", "bytes:\\xa9", "", "a", "!"]
    assert logprobs["token_logprobs"] == [None, *[-1.5] * 7]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][2] == {"h": -1.5, "": -9999.0}
    assert logprobs["text_offset"] == [0, 0, 0, 1, 1, 2, 2, 3], "the BOS token and the first space are not in the text"
    assert body_of("completions", asked | {"echo": False}, out)["choices"][0]["logprobs"]["tokens"] == ["a", "!"]
    assert read_body("completions", asked, DEFAULTS).params.prompt_logprobs == 1
    assert read_body("completions", asked | {"echo": False}, DEFAULTS).params.prompt_logprobs is None


def test_max_tokens_0_with_echo_scores_the_prompt_and_nothing_else():
    asked = {"prompt": "b", "echo": True, "logprobs": 1, "max_tokens": 0}
    out = replace(made(b"a!"), prompt_token_ids=(1, 98), prompt_logprobs=(None, *scores((98,))))
    body = body_of("completions", asked, out)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("b", "length")
    assert choice["logprobs"]["tokens"] == ["\x01", "b"]
    assert body["usage"]["completion_tokens"] == 0
    params = read_body("completions", asked, DEFAULTS).params
    assert (params.max_tokens, params.min_tokens) == (1, 0)
    for wrong in ({"echo": False}, {"max_tokens": -1}, {"max_tokens": False}):
        with pytest.raises(RequestError, match="max_tokens must be an integer"):
            read_body("completions", asked | wrong, DEFAULTS)


def test_a_token_that_ends_nothing_keeps_its_log_probability():
    assert len(body_of("chat", HELLO, made(b"ab", "length", ()))["choices"][0]["logprobs"]["content"]) == 2
    assert body_of("chat", HELLO, made(b"ab"))["usage"]["completion_tokens"] == 3
