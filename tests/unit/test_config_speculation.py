"""How runtime.speculation may be written, from every layer, and how mistakes in it are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from polyhead.config import load_config
from polyhead.errors import ConfigError

NO_WAY = "is not a way to guess tokens; expected ngram, a mapping with method, or null"


@pytest.mark.parametrize(
    ("written", "override", "numbers"),
    [
        (None, "runtime.speculation=ngram", (7, 4)),
        (None, "runtime.speculation.max_tokens=5", (5, 4)),
        ("ngram", "runtime.speculation.max_tokens=5", (5, 4)),
        ({"max_tokens": 3, "ngram_max": 6}, "runtime.speculation.max_tokens=5", (5, 6)),
        ({"max_tokens": 3, "ngram_max": 6}, "runtime.speculation={max_tokens: 5}", (5, 6)),
        ({"max_tokens": 3, "ngram_max": 6}, "runtime.speculation=ngram", (7, 4)),
        ({"max_tokens": 3}, "runtime.speculation=null", None),
    ],
)
def test_the_command_line_changes_all_of_it_or_a_key(
    written: Any, override: str, numbers: tuple[int, int] | None
) -> None:
    loaded = load_config({"model": "m.gguf", "runtime": {"speculation": written}}, overrides=[override], environ={})
    found = loaded.config.runtime.speculation
    assert (found and (found.max_tokens, found.ngram_max)) == numbers


@pytest.mark.parametrize(
    ("written", "place", "message"),
    [
        ("ngrm", 16, f'runtime.speculation: "ngrm" {NO_WAY}'),
        ("true", 16, f"runtime.speculation: true {NO_WAY}"),
        ("7", 16, f"runtime.speculation: 7 {NO_WAY}"),
        ("[ngram]", 16, f'runtime.speculation: ["ngram"] {NO_WAY}'),
        ("{max_token: 3}", 17, "runtime.speculation.max_token: unknown key (did you mean 'max_tokens'?)"),
        (
            "{max_tokens: 0}",
            29,
            "runtime.speculation.max_tokens: 0 is not allowed; expected a whole number from 1 to 32",
        ),
        (
            '{max_tokens: "3"}',
            29,
            'runtime.speculation.max_tokens: "3" is not allowed; expected a whole number from 1 to 32 (without quotes)',
        ),
        ("{method: draft}", 25, 'runtime.speculation.method: "draft" is not allowed; expected one of ngram'),
        ("{ngram_min: 9}", 16, "runtime.speculation: has ngram_min 9 above ngram_max 4"),
    ],
)
def test_a_mistake_in_a_file_names_the_key_and_what_it_takes(
    tmp_path: Path, written: str, place: int, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: m.gguf\nruntime:\n  speculation: {written}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ={})
    assert str(caught.value) == f"{path}:3:{place}: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("runtime.speculation.max_tokns=3", "runtime.speculation.max_tokns: unknown key (did you mean 'max_tokens'?)"),
        ("runtime.speculaton.max_tokens=3", "runtime.speculaton: unknown key (did you mean 'speculation'?)"),
        ("sampling.structured_output.regex=a", "sampling.structured_output: unknown key (did you mean 'structured_out"),
        ("runtime.speculation.max_tokens=many", 'runtime.speculation.max_tokens: "many" is not allowed; expected a wh'),
    ],
)
def test_a_wrong_override_names_the_part_that_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"model": "m.gguf"}, overrides=[override], environ={})
    assert str(caught.value).startswith(f"command line: {message}")
