"""Core speaks of capabilities: no source of it names an architecture or a family of models, not even in prose."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import polyhead

CORE = Path(polyhead.__file__).resolve().parent
SOURCES = (".py", ".cu", ".cuh", ".tmpl")
FAMILY = re.compile(
    r"llama(?!\.cpp|-bench)|gpt[-_ ]?\d|gpt[-_ ]?neo|gpt_mha|\bgpt\b|qwen|phi[-_ ]?\d|mistral|mixtral|gemma|smollm"
    r"|pythia|falcon|deepseek|granite|olmo|starcoder|exaone|mamba|command-r|bloom|grok|baichuan|chatglm|minicpm|nemotron",
    re.IGNORECASE,
)
# What may, and why. Nothing here is asked which architecture a model has.
EXCUSED = {
    # tokenizer.ggml.model and .pre say how text becomes tokens; their values are named after the models that began it.
    "tokenizer/bpe.py": {"gpt2", "gpt-2"},
    "tokenizer/pretokenizers.py": None,  # all of them: the table of tokenizer.ggml.pre
    "tokenizer/sentencepiece.py": {"llama"},
    "tokenizer/tiny.py": {"gpt2", "gpt-2"},
    "tokenizer/tokenizer.py": {"gpt2", "gpt-2", "llama", "qwen"},
    "tokenizer/vocabulary.py": {"llama"},
    # The benchmark invents files of known models, so that speeds have something to be compared with.
    "bench/shapes.py": {"llama", "gpt2", "gpt-6", "smollm"},
}


def found() -> Iterator[tuple[str, int, str]]:
    """(file, line, name) of every mention; line 0 is the file's own name."""
    for path in sorted(path for path in CORE.rglob("*") if path.suffix in SOURCES):
        name = path.relative_to(CORE).as_posix()
        for number, line in enumerate([name, *path.read_text(encoding="utf-8").splitlines()]):
            for match in FAMILY.finditer(line):
                yield name, number, match[0].lower()


def excused(file: str, name: str) -> bool:
    return file in EXCUSED and name in (EXCUSED[file] or {name})


def test_no_source_of_core_names_a_model():
    wrong = [f"core/{file}:{line}: {name}" for file, line, name in found() if not excused(file, name)]
    assert not wrong, "\n".join(wrong)


def test_every_excuse_is_still_needed():
    mentions = {(file, name) for file, _, name in found()}
    for file, names in EXCUSED.items():
        for name in names or {next((name for other, name in mentions if other == file), "")}:
            assert (file, name) in mentions


def test_the_search_sees_kernels_and_templates():
    seen = {path.suffix for path in CORE.rglob("*") if path.suffix in SOURCES}
    assert seen == set(SOURCES)
    assert all(FAMILY.search(word) for word in ("LlamaGQA", "is_gpt2", "PHI3", "Qwen3Moe", "gpt-neox", "a GPT model"))
    assert not any(FAMILY.search(word) for word in ("llama.cpp", "llama-bench", "x Phi(x)", "philox"))


def names_of_plugins() -> set[str]:
    """What the repository's plugins call their architectures, and what files call them: read from their classes."""
    root = Path(__file__).parents[2]
    sources = [*(root / "plugins").rglob("*.py"), *(root / "docs" / "plugins").glob("polyhead-*/polyhead_*.py")]
    sources += (root / "docs" / "plugins").glob("polyhead-*/polyhead_*/*.py")
    classes = (node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names: set[object] = set()
    for statement in (each for node in classes if isinstance(node, ast.ClassDef) for each in node.body):
        if isinstance(statement, ast.Assign) and {"name", "gguf_names"} & set(
            re.findall(r"\w+", ast.unparse(statement))
        ):
            names |= {each.value for each in ast.walk(statement.value) if isinstance(each, ast.Constant)}
    return {name for name in names if isinstance(name, str)}


def test_the_search_knows_every_architecture_of_the_repository():
    names = names_of_plugins()
    assert {"gpt2", "llama_gqa", "phi3", "qwen3", "qwen2moe", "moe_llama"} <= names
    assert [name for name in sorted(names) if not FAMILY.search(name)] == []
