"""How file, environment and command line become one configuration, and how mistakes are told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.config import SamplingConfig, load_config, show
from polyhead.engine import StructuredOutputs
from polyhead.errors import ConfigError

BASE: dict[str, Any] = {"model": "m.gguf"}


def problems(source: Any, *overrides: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides=overrides, environ=environ)
    return str(caught.value).split("\n")


@pytest.fixture
def run_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text("model: m.gguf\nruntime:\n  context: 100\n  max_batch: 2\n  threads: 3\n")
    return Path("run.yaml")


def test_command_line_beats_environment_beats_file_beats_default(run_yaml: Path) -> None:
    loaded = load_config(
        run_yaml,
        overrides=["runtime.context=300"],
        environ={"POLYHEAD_RUNTIME__CONTEXT": "200", "POLYHEAD_RUNTIME__MAX_BATCH": "20", "PATH": "/bin"},
    )
    runtime = loaded.config.runtime
    assert (runtime.context, runtime.max_batch, runtime.threads, runtime.block_size) == (300, 20, 3, 16)
    assert loaded.origins["runtime.context"] == "command line"
    assert loaded.origins["runtime.max_batch"] == "environment POLYHEAD_RUNTIME__MAX_BATCH"
    assert loaded.origins["runtime.threads"] == "run.yaml:5:3"
    assert loaded.origins["runtime.block_size"] == "default"


def test_the_last_of_equal_overrides_wins() -> None:
    assert load_config(BASE, overrides=["device=cpu", "device=cuda:1"], environ={}).config.device == "cuda:1"


def test_mappings_are_merged_and_lists_replaced() -> None:
    source = BASE | {"sampling": {"stop": ["a", "b"], "logit_bias": {1: 1.0, 2: 2.0}}}
    loaded = load_config(source, overrides=["sampling.stop=[c]", "sampling.logit_bias.2=5"], environ={})
    assert loaded.config.sampling.stop == ("c",)
    assert loaded.config.sampling.logit_bias == {1: 1.0, 2: 5.0}


def test_a_stronger_form_of_the_output_replaces_a_weaker_one_whole() -> None:
    weak = {"json": {"type": "object", "required": ["a"]}}
    for override, value in [
        (r"sampling.structured_outputs.regex=[a-z]{2}: \d+ # 1", {"regex": r"[a-z]{2}: \d+ # 1"}),
        ('sampling.structured_outputs.grammar=start: "a"', {"grammar": 'start: "a"'}),
        ("sampling.structured_outputs.choice=[red, green]", {"choice": ["red", "green"]}),
        ('sampling.structured_outputs.json={"type": "array"}', {"json": {"type": "array"}}),
        ("sampling.structured_outputs.json=true", {"json": True}),
        ("sampling.structured_outputs=null", None),
    ]:
        loaded = load_config(BASE | {"sampling": {"structured_outputs": weak}}, overrides=[override], environ={})
        assert loaded.config.sampling.structured_outputs == value
        assert loaded.origins["sampling.structured_outputs"] == "command line"
    kept = load_config(BASE | {"sampling": {"structured_outputs": weak}}, overrides=["sampling.n=2"], environ={})
    assert kept.config.sampling.structured_outputs == weak
    spec = StructuredOutputs(choice=["a", "b"])
    assert load_config(BASE | {"sampling": {"structured_outputs": spec}}, environ={}).config.sampling == SamplingConfig(
        structured_outputs={"choice": ["a", "b"]}
    )


def test_show_has_every_setting_once_with_value_and_origin(run_yaml: Path) -> None:
    rows = show(load_config(run_yaml, environ={}))
    by_key = {key: (value, origin) for key, value, origin in rows}
    assert len(rows) == len(by_key)
    assert by_key["runtime.context"] == (100, "run.yaml:3:3")
    assert by_key["sampling.temperature"] == (1.0, "default")
    assert by_key["plugins.disable"] == ((), "default")


@pytest.mark.parametrize("source", ["dir/x.gguf", "X.GGUF", "hf://org/repo:Q4_K_M", "pypi://pkg==1.0/pkg/x.gguf"])
def test_a_model_can_stand_for_a_configuration(source: str) -> None:
    loaded = load_config(source, environ={})
    assert loaded.config.model.path == source
    assert loaded.origins["model.path"] == "model"


def test_a_file_without_suffix_is_judged_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "settings").write_text("model: m.gguf\nchat: no\n")
    assert load_config(tmp_path / "blob", environ={}).config.model.path == str(tmp_path / "blob")
    assert load_config(tmp_path / "settings", environ={}).config.chat is False


def test_a_pipe_is_read_once_and_as_a_whole(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b"model: m.gguf\nchat: no\n")
    os.close(write)
    try:
        assert load_config(f"/dev/fd/{read}", environ={}).config.chat is False
    finally:
        os.close(read)


@pytest.mark.parametrize(
    "source", [None, [], 5, b"x.gguf", "a\0b", "~\0/x.yaml", "\ud800.yaml", "\ud800.gguf", "~nobody/x"]
)
def test_what_cannot_be_a_source_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(source, environ={})
    str(caught.value).encode("utf-8")  # The message can be printed.


@pytest.mark.parametrize("overrides", [[5], [None], [b"chat=no"], "chat=no", 5])
def test_overrides_that_are_no_list_of_texts_are_refused(overrides: Any) -> None:
    with pytest.raises(ConfigError, match=r"overrides is .*expected a list of texts"):
        load_config("m.gguf", overrides=overrides, environ={})


def test_shorthand_and_full_form_of_model_are_the_same() -> None:
    assert (
        load_config({"model": "m.gguf"}, environ={}).config
        == load_config({"model": {"path": "m.gguf"}}, environ={}).config
    )
    assert load_config({"model": Path("m.gguf")}, environ={}).config.model.path == "m.gguf"
    loaded = load_config({"model": {"path": "m.gguf", "tokenizer": "t.json"}}, overrides=["model=n.gguf"], environ={})
    assert (loaded.config.model.path, loaded.config.model.tokenizer) == ("n.gguf", "t.json")


def test_a_relative_model_path_counts_from_the_file_that_says_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    file = tmp_path / "configs" / "run.yaml"
    file.write_text("model: {path: ../models/m.gguf}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/run.yaml", environ={}).config.model.path == str(tmp_path / "models" / "m.gguf")
    assert load_config("configs/run.yaml", overrides=["model.path=x.gguf"], environ={}).config.model.path == "x.gguf"
    for kept in ("/abs/m.gguf", "~/m.gguf", "hf://o/r/m.gguf", "pypi://p==1/m.gguf"):
        file.write_text(f"model: {kept}\n")
        assert load_config(file, environ={}).config.model.path == kept


def test_a_checksum_does_not_outlive_the_path_it_was_written_for(tmp_path: Path) -> None:
    source = {"model": {"path": "m.gguf", "sha256": "AB" * 32}}
    assert load_config(source, environ={}).config.model.sha256 == "ab" * 32
    for override in ("model.path=n.gguf", "model=n.gguf"):
        loaded = load_config(source, overrides=[override], environ={})
        assert (loaded.config.model.sha256, loaded.origins["model.sha256"]) == (None, "default")
    both = load_config(source, overrides=["model.sha256=" + "0" * 64, "model.path=m.gguf"], environ={})
    assert both.config.model.sha256 == "0" * 64


@given(
    st.text(min_size=1).filter(lambda t: t.strip()[:1] not in ("[", "{", '"', "'") and t.strip() not in ("null", "~"))
)
def test_text_on_the_command_line_is_taken_as_it_is(text: str) -> None:
    assert load_config(BASE, overrides=[f"prompt={text}"], environ={}).config.prompt == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Yes: or # no?", "Yes: or # no?"),
        ("no", "no"),
        ("[a, 'b']", ("a", "b")),
        ('"two\\nlines"', "two\nlines"),
        ("'quoted' text 'here'", "'quoted' text 'here'"),
        ("null", None),
        ("", ""),
    ],
)
def test_only_null_quotes_and_lists_are_special_in_text(text: str, value: object) -> None:
    assert load_config(BASE | {"prompt": "old"}, overrides=[f"prompt={text}"], environ={}).config.prompt == value


def test_a_stop_text_may_look_like_a_comment() -> None:
    assert load_config(BASE, overrides=["sampling.stop=###"], environ={}).config.sampling.stop == ("###",)


def test_null_unsets_what_a_weaker_layer_set() -> None:
    loaded = load_config(BASE | {"runtime": {"context": 5}}, overrides=["runtime.context=null"], environ={})
    assert loaded.config.runtime.context is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.contxt=1", "command line: runtime.contxt: unknown key (did you mean 'context'?)"),
        ("runtme.context=1", "command line: runtme.context: unknown key (did you mean 'runtime.context'?)"),
        ("temperature=1", "command line: temperature: unknown key (did you mean 'sampling.temperature'?)"),
        ("runtime.context", "command line: 'runtime.context' is not KEY=VALUE"),
        ("=5", "command line: '=5' is not KEY=VALUE"),
        ("runtime.context=", "command line: runtime.context: nothing after '='"),
        ("runtime.context=[1", "command line: runtime.context: not valid YAML"),
        ("runtime.context=012", "command line: runtime.context: 012 is octal"),
        (
            "runtime.context=lots",
            'command line: runtime.context: "lots" is not allowed; expected a whole number from 1',
        ),
        ("runtime=5", "command line: runtime: 5 is not allowed; expected a mapping with some of the keys context"),
    ],
)
def test_a_wrong_override_names_itself(override: str, message: str) -> None:
    assert problems(BASE, override)[0].startswith(message)


def test_a_misspelt_variable_is_an_error_and_reserved_ones_are_not() -> None:
    (line,) = problems(BASE, POLYHEAD_RUNTIME__CONTXT="5")
    assert line == (
        "environment POLYHEAD_RUNTIME__CONTXT: no setting has this name (did you mean 'POLYHEAD_RUNTIME__CONTEXT'?)"
    )
    environ = {"POLYHEAD_CACHE": "/c", "POLYHEAD_TEST_X": "1", "POLYHEAD_DEVICE": "", "POLYHEAD_PROMPT": "a: b"}
    config = load_config(BASE, environ=environ).config
    assert (config.device, config.prompt) == ("auto", "a: b")
    assert problems(BASE, POLYHEAD_DEVICE="gpu")[0].startswith(
        'environment POLYHEAD_DEVICE: device: "gpu" is not a device'
    )


def test_parts_of_a_section_come_from_any_layer_and_say_so(run_yaml: Path) -> None:
    run_yaml.write_text("model: m.gguf\nruntime:\n  speculation: {ngram_min: 1, max_tokens: 5}\n")
    environ = {"POLYHEAD_RUNTIME__SPECULATION__MAX_TOKENS": "3"}
    loaded = load_config(run_yaml, environ=environ)
    found = loaded.config.runtime.speculation
    assert found is not None
    assert (found.ngram_min, found.max_tokens) == (1, 3)
    place = f"{run_yaml}:3:3"
    assert loaded.origins["runtime.speculation"] == f"{place}, environment POLYHEAD_RUNTIME__SPECULATION__MAX_TOKENS"
    both = load_config(run_yaml, environ=environ, overrides=["runtime.speculation.ngram_max=4"])
    assert both.origins["runtime.speculation"].endswith("MAX_TOKENS, command line")
    assert load_config(run_yaml, environ={}).origins["runtime.speculation"] == place
    for name in ("POLYHEAD_RUNTIME__SPECULATION__MAX_TOKEN", "POLYHEAD_RUNTIME__CONTEXT__X", "POLYHEAD__X"):
        with pytest.raises(ConfigError, match="no setting has this name"):
            load_config(run_yaml, environ={name: "3"})


def test_the_process_environment_is_used_unless_another_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHEAD_DEVICE", "cpu")
    assert load_config(BASE).config.device == "cpu"
    assert load_config(BASE, environ={}).config.device == "auto"


def test_all_mistakes_of_a_file_are_told_together_in_order(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(
        "model: {path: m.gguf, sha256: abc}\n"
        "devic: cpu\n"
        "runtime:\n"
        "  context: 4096.5\n"
        "  max_batch: true\n"
        "  kv_dtype: F17\n"
        '  block_size: "16"\n'
        "sampling: {top_p: , temperature: .nan, stop: [a, 5], stop_token_ids: [1, -2], logit_bias: {x: 1}}\n"
        "chat: 1\n"
        "plugins: {disable: gpt_mha}\n"
    )
    lines = [line.removeprefix(f"{file}:") for line in problems(file)]
    assert lines == [
        '1:31: model.sha256: "abc" is not a SHA-256: expected 64 hexadecimal digits, got 3 characters',
        "2:1: devic: unknown key (did you mean 'device'?)",
        "4:12: runtime.context: 4096.5 is not allowed; expected a whole number from 1 to 2147483647, or null",
        "5:14: runtime.max_batch: true is not allowed; expected a whole number from 1 to 65536",
        '6:13: runtime.kv_dtype: "F17" is not allowed; expected one of auto, f32, f16, bf16, fp8 '
        "(did you mean 'f16'?)",
        '7:15: runtime.block_size: "16" is not allowed; expected a whole number from 1 to 1024 (without quotes)',
        "8:19: sampling.top_p: null is not allowed; expected a number above 0, at most 1",
        "8:34: sampling.temperature: .nan is not allowed; expected a number, at least 0",
        '8:46: sampling.stop: ["a", 5] is neither text nor a list of texts '
        "(quote what looks like a number or a yes/no)",
        "8:74: sampling.stop_token_ids[1]: -2 is not allowed; expected a whole number from 0 to 2147483647",
        "8:91: sampling.logit_bias: has the key 'x', which is not a token id (a whole number from 0)",
        "9:7: chat: 1 is not allowed; expected true or false, or null",
        '10:20: plugins.disable: "gpt_mha" is not allowed; expected a list, each item text',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "5",
            "3:23: sampling.structured_outputs: 5 is not a mapping with one of the keys json, regex, choice, grammar",
        ),
        ("{}", "3:23: sampling.structured_outputs: must have exactly one of json, regex, choice, grammar, got none"),
        (
            "{regexp: a}",
            "3:23: sampling.structured_outputs: has the key 'regexp'; known are json, regex, choice, grammar",
        ),
        (
            "{choice: [a, no]}",
            "3:23: sampling.structured_outputs: choice[1] must be a string, got False (quote what looks like a number "
            "or a yes/no)",
        ),
        ("{json: '[1'}", "3:23: sampling.structured_outputs: json is not JSON: Expecting ',' delimiter"),
    ],
)
def test_a_form_of_the_output_that_is_none_is_told(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"model: m.gguf\nsampling:\n  structured_outputs: {text}\n")
    assert [line.removeprefix(f"{file}:")[: len(message)] for line in problems(file)] == [message]


@pytest.mark.parametrize("name", ["min_tokens", "ignore_eos"])
def test_a_form_of_the_output_goes_with_nothing_that_goes_on_after_its_end(name: str) -> None:
    sampling = {"structured_outputs": {"regex": "a"}, name: True if name == "ignore_eos" else 1}
    assert problems(BASE | {"sampling": sampling}) == [
        f"configuration: sampling: has structured_outputs and {name}, but a text that is complete can only end"
    ]


def test_very_many_mistakes_are_cut_short(tmp_path: Path) -> None:
    lines = problems(BASE | {f"key{i}": i for i in range(500)})
    assert len(lines) == 21
    assert lines[-1] == "… and 480 more"


def test_a_missing_file_suggests_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "smollm2.yaml").write_text("")
    assert problems(tmp_path / "smolm2.yaml") == [
        f"{tmp_path}/smolm2.yaml: there is no such file (did you mean 'smollm2.yaml'?)"
    ]
    assert "in that folder are smollm2.yaml" in problems(tmp_path / "zzz.yaml")[0]
    assert "nor a folder" in problems(tmp_path / "no" / "x.yaml")[0]
    assert "this is a folder" in problems(tmp_path)[0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "configuration: model: missing"),
        ({"model": {}}, "configuration: model.path: missing"),
        ({"model": ""}, 'configuration: model.path: "" cannot be a model'),
        ({"model": None}, "configuration: model: null is not allowed"),
        ({"model": "http://x/y.gguf"}, 'configuration: model.path: "http://x/y.gguf" cannot be a model'),
        (BASE | {"system": "hi", "chat": False}, "configuration: the configuration has a system message"),
        (BASE | {"sampling": {"min_tokens": 200}}, "configuration: sampling: has min_tokens 200 above max_tokens 128"),
        (BASE | {"prompt": []}, "configuration: prompt: [] is an empty list"),
        (BASE | {"runtime": None}, "configuration: runtime: null is not allowed; expected a mapping"),
        (BASE | {"runtime": {"context": object()}}, 'configuration: runtime.context: "<object>" is not allowed'),
        (BASE | {"runtime": {"context": 10**5000}}, "configuration: runtime.context: <int> is not allowed"),
        (BASE | {"sampling": {"temperature": 10**400}}, "configuration: sampling.temperature: "),
        (BASE | {"prompt": 5}, "configuration: prompt: 5 is neither text nor a list"),
    ],
)
def test_a_wrong_mapping_is_told_by_key(source: dict[str, Any], message: str) -> None:
    assert problems(source)[0].startswith(message)


def test_a_mapping_that_contains_itself_is_refused() -> None:
    loop: dict[str, Any] = {"model": "m.gguf"}
    loop["runtime"] = loop
    assert "nested deeper than 32" in problems(loop)[0]


def test_configurations_cannot_be_changed() -> None:
    config = load_config(BASE, environ={}).config
    with pytest.raises(ValueError, match="frozen"):
        config.device = "cpu"
