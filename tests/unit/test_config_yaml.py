"""YAML as configurations are written: where a value stands, what scalars mean, what is refused, what is bounded."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from polyhead.config import LoadedConfig, load_config
from polyhead.errors import ConfigError


def load(folder: Path, text: str | bytes, **settings: Any) -> LoadedConfig:
    file = folder / "run.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(file, environ={}, **settings)


def refused(folder: Path, text: str | bytes) -> list[str]:
    """The error's lines with the folder taken off."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return str(caught.value).replace(f"{folder}/", "").split("\n")


MODEL = "model: m.gguf\n"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1", 1.0),
        ("1e-3", 0.001),
        ("1E2", 100.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("1_0.5", 10.5),
        ("+0.25", 0.25),
    ],
)
def test_a_number_in_any_usual_notation_is_a_number(tmp_path: Path, written: str, read: float) -> None:
    assert load(tmp_path, f"{MODEL}sampling: {{temperature: {written}}}").config.sampling.temperature == read


@pytest.mark.parametrize(
    ("written", "read"), [("1_000", 1000), ("0x1F", 31), ("0o17", 15), ("0b11", 3), ("+7", 7), ("0", 0)]
)
def test_a_whole_number_in_any_usual_notation_is_one(tmp_path: Path, written: str, read: int) -> None:
    assert load(tmp_path, f"{MODEL}sampling: {{seed: {written}}}").config.sampling.seed == read


@pytest.mark.parametrize("written", ["yes", "On", "TRUE", "true"])
def test_the_booleans_of_yaml_1_1_are_booleans(tmp_path: Path, written: str) -> None:
    assert load(tmp_path, f"{MODEL}runtime: {{deterministic: {written}}}").config.runtime.deterministic is True


@pytest.mark.parametrize("text", ["2024-01-31", "12:30:45", "1.2.3", "0x", "1e", "Q4_K_M", "yEs", "=", "!", "'007'"])
def test_what_only_resembles_a_number_stays_text(tmp_path: Path, text: str) -> None:
    if text == "!":
        text = "! 5"  # YAML's way to say: not resolved, text.
    assert load(tmp_path, f"{MODEL}prompt: {text}").config.prompt == {"! 5": "5"}.get(text, text.strip("'"))


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=40))
def test_any_quoted_text_arrives_unchanged(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    quoted = "'" + text.replace("'", "''") + "'"
    if any(c in text for c in "\x85\u2028\u2029\ufeff\ufffe\uffff"):
        return  # YAML folds its line breaks and refuses non-characters.
    folder = tmp_path_factory.getbasetemp()
    assert load(folder, f"{MODEL}prompt: {quoted}").config.prompt == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=0))
def test_every_float_that_python_prints_is_read_back(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert load(folder, f"{MODEL}sampling: {{temperature: {value!r}}}").config.sampling.temperature == value


def test_a_ban_in_logit_bias_is_minus_infinity(tmp_path: Path) -> None:
    bias = load(tmp_path, f"{MODEL}sampling: {{logit_bias: {{7: -.inf, 8: 2}}}}").config.sampling.logit_bias
    assert bias == {7: -math.inf, 8: 2.0}


def test_anchors_aliases_and_merge_keys_work(tmp_path: Path) -> None:
    text = MODEL + "sampling: &s {seed: 1, top_k: 2}\n"
    assert load(tmp_path, text + "prompt: [&p hello, *p]").config.prompt == ("hello", "hello")
    text = "model: {<<: [{path: a.gguf}, {path: b.gguf, tokenizer: t.json}], tokenizer: own.json}\n"
    model = load(tmp_path, text).config.model
    assert (Path(model.path).name, model.tokenizer) == ("a.gguf", "own.json")


def test_windows_line_ends_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    loaded = load(tmp_path, b"\xef\xbb\xbfmodel: m.gguf\r\nsystem: |\r\n  a\r\n  b\r\n")
    assert loaded.config.system == "a\nb\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "run.yaml:1:1: the file is empty"),
        ("# only a comment\n", "run.yaml:1:1: the file is empty"),
        ("- a\n- b\n", 'run.yaml:1:1: ["a", "b"] stands where settings should'),
        ("hello", 'run.yaml:1:1: "hello" stands where settings should'),
        ("model: m.gguf\n\truntime: {}\n", "run.yaml:2:1: a tab is used for indentation"),
        ("model: m.gguf\nprompt: a: b\n", "run.yaml:2:10: not valid YAML: mapping values are not allowed"),
        ("model: m.gguf\nprompt: @x\n", "run.yaml:2:9: not valid YAML: found character"),
        ("model: [m.gguf\n", "run.yaml:2:1: not valid YAML"),
        ("model: m.gguf\n---\nmodel: n.gguf\n", "run.yaml:2:1: a second document"),
        ("model: m.gguf\nprompt: *p\n", "run.yaml:2:9: *p has no &p before it"),
        ("model: m.gguf\nprompt: &p [*p]\n", "run.yaml:2:13: *p has no &p before it (or contains itself)"),
        ("model: m.gguf\n? [a]\n: b\n", "run.yaml:2:3: a key must be plain text"),
        (b"model: m.gguf\nprompt: caf\xe9\n", "run.yaml:2:12: byte 0xe9 is not UTF-8"),
        ("model: m.gguf\nprompt: é\x07\n", "run.yaml:2:10: character U+0007 is not allowed"),
        ("model: m.gguf\n".encode("utf-16"), "run.yaml:1:1: byte 0xff is not UTF-8"),
        ("model: m.gguf\n<<: 5\n", "run.yaml:2:1: '<<' takes a mapping"),
        ("model: m.gguf\nmodel: n.gguf\n", "run.yaml:2:1: model: the key is there twice, first at run.yaml:1:1"),
        ("model: m.gguf\nruntime: {threads: 010}", "run.yaml:2:20: 010 is octal to some YAML readers"),
    ],
)
def test_what_is_no_configuration_is_refused_with_its_place(tmp_path: Path, text: str | bytes, line: str) -> None:
    found = refused(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith(line)


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch owned']",
        "!!python/name:os.system",
        "!!binary aGk=",
        "!include other.yaml",
        "!!set {a, b}",
    ],
)
def test_tags_are_refused_and_run_nothing(tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = refused(tmp_path, f"{MODEL}prompt: {value}\n")
    assert found[0].startswith("run.yaml:2:9: the tag ")
    assert len(found) == 1
    assert not (tmp_path / "owned").exists()


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


def chain(anchors: int, each: int) -> str:
    """Anchors that each nest the one before a few levels deeper."""
    lines = [f"a0: &a0 {'[' * each}{']' * each}"]
    lines += [f"a{i}: &a{i} {'[' * each}*a{i - 1}{']' * each}" for i in range(1, anchors)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (bomb(12), "more than 10000 values"),
        ("prompt: [" + "x, " * 20_000 + "x]", "more than 10000 values"),
        ("prompt: " + "[" * 100_000, "nested deeper than 32 levels"),
        ("prompt: " + "{a: " * 5_000, "nested deeper than 32 levels"),
        ("\n".join("- " * i + "a" for i in range(60, 61)), "nested deeper than 32 levels"),
        (chain(60, 30), "nests deeper than 32 levels"),
        ("prompt: " + "x" * (1 << 20), "larger than 1048576 bytes"),
    ],
    ids=["aliases", "long", "deep list", "deep mapping", "deep block", "deep aliases", "large"],
)
def test_hostile_files_are_refused_quickly(tmp_path: Path, text: str, says: str) -> None:
    start = time.perf_counter()
    found = refused(tmp_path, text)
    assert says in found[0]
    assert len(found) == 1
    assert time.perf_counter() - start < 2.0


def test_places_count_characters_not_bytes(tmp_path: Path) -> None:
    assert refused(tmp_path, f"{MODEL}sampling: {{stop: [äöü🙂], seed: -1}}\n")[0].startswith("run.yaml:2:32: ")


@given(
    st.one_of(
        st.binary(max_size=60),
        st.text("model:runtimepth{}[]&*<|>!-?#'\"%@ \n\t0_.e", max_size=60).map(str.encode),
        st.text(max_size=30).map(lambda t: f"model: m.gguf\nprompt: {t}".encode("utf-8", "surrogatepass")),
    )
)
def test_whatever_is_in_the_file_only_config_errors_come_out(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    try:
        load(tmp_path_factory.getbasetemp(), content)
    except ConfigError:
        return
