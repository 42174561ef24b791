"""polyhead run: where prompts come from, where output goes, and what --json says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from polyhead import LLM, SamplingParams

Invoke = Callable[..., object]
PLAIN = ("--set", "chat=false", "--temperature", "0")


def expected(model: str, prompts: list[str], tokens: int) -> list[str]:
    with LLM({"model": model, "device": "cpu"}) as llm:
        return [out.text for out in llm.generate(prompts, SamplingParams(max_tokens=tokens, temperature=0.0))]


def test_one_prompt_is_streamed_to_stdout_alone(invoke: Invoke, llama: str) -> None:
    result = invoke("run", llama, *PLAIN, "-n", "5", "-p", "the sing")
    assert result.exit_code == 0
    assert result.stdout == expected(llama, ["the sing"], 5)[0] + "\n"
    first, last = result.stderr.splitlines()
    for part in ("llama-gqa", "llama_gqa (polyhead ", "F32 100 %", "cpu", "context 64", "loaded in"):
        assert part in first
    assert "5 generated" in last
    assert "tok/s" in last
    assert "cut at max_tokens 5" in last


def test_quiet_leaves_only_the_text(invoke: Invoke, llama: str) -> None:
    assert invoke("run", llama, *PLAIN, "-n", "2", "-p", "the", "-q").stderr == ""
    assert invoke("-q", "run", llama, *PLAIN, "-n", "2", "-p", "the").stderr == ""


def test_verbose_shows_settings_and_the_memory_plan(invoke: Invoke, llama: str) -> None:
    err = invoke("run", llama, *PLAIN, "-n", "2", "-p", "the", "-v").stderr
    assert "sampling.max_tokens = 2 (command line)" in err
    assert "KV cache" in err
    assert llama in err


def test_several_prompts_run_as_one_batch_and_come_in_order(invoke: Invoke, llama: str) -> None:
    prompts = ["the", "and in", "or"]
    result = invoke("run", llama, *PLAIN, "-n", "4", *(part for prompt in prompts for part in ("-p", prompt)))
    texts = expected(llama, prompts, 4)
    wanted = [
        f"=== {n} of 3: {prompt} ===\n{text}\n" for n, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1)
    ]
    assert result.stdout == "".join(wanted)


def test_json_gives_a_line_for_each_prompt(invoke: Invoke, llama: str) -> None:
    args = ("--json", "--set", "sampling.logprobs=2", "-n", "3", "-p", "the", "-p", "and")
    result = invoke("run", llama, *PLAIN, *args)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == ["the", "and"]
    assert [line["text"] for line in lines] == expected(llama, ["the", "and"], 3)
    for line in lines:
        assert line["finish_reason"] == "length"
        assert len(line["token_ids"]) == len(line["logprobs"]) == line["timing"]["generated_tokens"] == 3
        assert line["timing"]["prompt_tokens"] >= 1
        assert 0 < line["timing"]["first_token_seconds"] <= line["timing"]["seconds"]
        for token_id, entry in zip(line["token_ids"], line["logprobs"], strict=True):
            assert entry["token_id"] == token_id == entry["top"][0][0]
            assert entry["logprob"] == entry["top"][0][1] < 0
            assert len(entry["top"]) == 2


def test_times_are_those_at_which_tokens_came_also_for_later_prompts(invoke: Invoke, llama: str) -> None:
    args = ("--json", "--set", "sampling.ignore_eos=true", "-n", "50", "-p", "the", "-p", "and")
    first, second = (json.loads(line)["timing"] for line in invoke("run", llama, *PLAIN, *args).stdout.splitlines())
    assert second["first_token_seconds"] < first["seconds"] / 2


def test_prompts_come_from_arguments_files_config_or_stdin_in_this_order(
    invoke: Invoke, llama: str, tmp_path: Path
) -> None:
    def prompts(*args: str, stdin: str = "") -> list[str]:
        result = invoke("run", *args, *PLAIN, "-n", "1", "--json", stdin=stdin)
        assert result.exit_code == 0, result.stderr
        return [json.loads(line)["prompt"] for line in result.stdout.splitlines()]

    config = tmp_path / "run.yaml"
    config.write_text(f"model: {llama}\nprompt: [from config, second]\n")
    file = tmp_path / "prompt.txt"
    file.write_text("from file\n")
    assert prompts(str(config), stdin="from stdin") == ["from config", "second"]
    assert prompts(str(config), "-p", "from argument", stdin="from stdin") == ["from argument"]
    assert prompts(str(config), "--prompt-file", str(file), "-p", "and") == ["and", "from file"]
    assert prompts(str(config), "--prompt-file", "-", stdin="from stdin\n") == ["from stdin"]
    assert prompts(llama, stdin="two\nlines\n\n") == ["two\nlines\n"]


@pytest.mark.parametrize("prompt", ["[1] a list?", '"quoted"', "null", "{a: b}", "- x", "# no comment"])
def test_a_prompt_argument_is_never_read_as_yaml(invoke: Invoke, llama: str, prompt: str) -> None:
    result = invoke("run", llama, *PLAIN, "-n", "1", "--json", "-p", prompt)
    assert json.loads(result.stdout)["prompt"] == prompt


def test_a_seed_repeats_the_text_and_another_one_changes_it(invoke: Invoke, llama: str) -> None:
    def text(seed: str) -> str:
        args = ("--set", "chat=false", "--temperature", "2", "--seed", seed, "-n", "20", "-p", "the")
        return invoke("run", llama, *args).stdout

    assert text("1") == text("1") != text("2")


def test_chat_puts_the_prompt_and_the_system_message_into_the_template(
    invoke: Invoke, llama: str, chat_template: str
) -> None:
    args = ("--temperature", "0", "-n", "4", "-p", "the")
    plain = invoke("run", llama, *args, "--set", "chat=false")
    rendered = expected(llama, ["system: sing user: the assistant:"], 4)[0]
    result = invoke("run", llama, *args, "--set", chat_template, "--set", "chat=true", "--set", "system=sing")
    assert result.stdout == rendered + "\n" != plain.stdout


def test_a_model_chats_if_it_can_unless_the_config_says_otherwise(
    invoke: Invoke, llama: str, chat_template: str
) -> None:
    def text(*args: str) -> str:
        return invoke("run", llama, "--temperature", "0", "-n", "4", "-p", "the", *args).stdout

    plain = text("--set", "chat=false")
    chatting = text("--set", "chat=true", "--set", chat_template)
    assert text() == text("--set", "chat=false", "--set", chat_template) == plain != chatting
    assert text("--set", chat_template) == chatting


def test_a_system_message_that_nothing_can_take_is_an_error(invoke: Invoke, llama: str) -> None:
    result = invoke("run", llama, "-p", "the", "--set", "system=be brief")
    assert result.exit_code == 2
    assert "system message" in result.stderr


def test_chat_true_without_a_template_is_refused(invoke: Invoke, llama: str) -> None:
    result = invoke("run", llama, "--set", "chat=true", "-p", "the")
    assert result.exit_code == 2
    assert "no chat template" in result.stderr
    assert result.stdout == ""


def test_a_full_context_is_named_as_what_cut_the_text(invoke: Invoke, llama: str) -> None:
    result = invoke("run", llama, *PLAIN, "--set", "sampling.ignore_eos=true", "-n", "1000", "-p", "the")
    assert "cut at the context of 64" in result.stderr


def test_speculation_changes_no_token_and_says_how_good_the_guesses_were(invoke: Invoke, llama: str) -> None:
    args = ("run", llama, "-p", "the the the", "--json", "-n", "30", "--temperature", "0", "--set", "chat=false")
    more = ("--set", "sampling.ignore_eos=true", "--set", "sampling.logit_bias={7: 50.0}")
    plain = invoke(*args, *more)
    spec = "runtime.speculation={max_tokens: 4, ngram_max: 2, ngram_min: 1}"
    guessing = invoke(*args, *more, "--set", spec, "--set", "sampling.prompt_logprobs=1")
    assert (plain.exit_code, guessing.exit_code) == (0, 0), guessing.stderr
    found, expected = json.loads(guessing.stdout), json.loads(plain.stdout)
    assert found["token_ids"] == expected["token_ids"]
    assert found["drafted_tokens"] >= found["accepted_tokens"] > 10
    assert expected["drafted_tokens"] == 0
    assert expected["prompt_logprobs"] is None
    assert found["prompt_logprobs"][0] is None
    assert all(each["logprob"] < 0 and len(each["top"]) == 1 for each in found["prompt_logprobs"][1:])
    told = f"{found['accepted_tokens']} of {found['drafted_tokens']} guessed tokens were right"
    assert told in guessing.stderr
    assert "guessed" not in plain.stderr


def test_rows_that_only_pad_the_embedding_have_no_name_in_json(
    invoke: Invoke, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = LLM.__init__

    def init(self: LLM, *args: Any, **more: Any) -> None:
        opened(self, *args, **more)
        self.tokenizer.vocab_size = 90

    monkeypatch.setattr(LLM, "__init__", init)
    always = ("--set", "sampling.logit_bias={94: 100}", "--set", "sampling.logprobs=2", "-n", "3")
    result = invoke("run", llama, *PLAIN, "-p", "the", "--json", *always)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["text"], found["token_ids"]) == ("", [94] * 3)
    assert [each["token"] for each in found["logprobs"]] == [None] * 3
