"""Makes the tokenizer and chat goldens beside this script from other people's implementations.

Needs transformers and sentencepiece, and reads only local files:

    python make_tokenizer_goldens.py SMOLLM2.gguf [PRE=PATH/tokenizer.json ...]

With PRE=PATH pairs it also writes how the real tokenizer of a family cuts text (llama-bpe, qwen2, deepseek-v3, gpt-4o).
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces   three ",
    "I've told him he's late; WE'LL see, they'D go",
    "3 33 333 3333 33333 3.14 1,000,000 ½ ² Ⅷ ٣",
    "line\nline\r\nline\n\n\n  indented\n\ttab\t\t",
    "naïve café Straße ΑΒΓδ Привет, мир! שלום नमस्ते",
    "e\u0301 and \u00e9, \u1100\u1161\u11a8",
    "你好，世界。こんにちは 안녕하세요 ภาษาไทย",
    "😀 👩‍👩‍👧 🤦🏽‍♂️ \ufe0f \u200d",
    "def f(x): return x**2 + foo_bar[0]  # HTTPServer, camelCase",
    "<html>&amp;</html> <|im_start|>user\nHi<|im_end|> </s> <s>",
    "a\u00a0b\u3000c\u2028d\u0085e\x00f\x7fg",
    "''''''```\"\"\"......!!!!!!?????? ------======= //\n/x",
    "1234567890123456789 x1y22z333",
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What is 2+2?\n"}],
    [
        {"role": "user", "content": "Tell me a joke."},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Why not? <b>é</b> 😀 {{ 7 * 7 }}"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "…"}],
]
# Written for these tests in the manner of the usual formats; what counts is that two implementations agree.
TEMPLATES = {
    "chatml": (
        "{%- for m in messages %}\n    {%- if loop.first and m.role != 'system' %}\n"
        "        {{- '<|im_start|>system\\nHelp.<|im_end|>\\n' }}\n    {%- endif %}\n"
        "    {{- '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>' + '\\n' }}\n{%- endfor %}\n"
        "{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}\n"
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}{% set text = '<|h|>' ~ m.role ~ '<|/h|>\\n\\n' ~ (m.content | trim) %}"
        "{{ text }}{% if not loop.last %}{{ eos_token }}{% endif %}{% generation %}{{ loop.index }}/{{ loop.length }}"
        "{% endgeneration %}{% endfor %}{{ missing }}{{ missing is defined }}"
    ),
    "namespace": (
        "{% set ns = namespace(turns=0, seen=[]) %}{% macro show(m, mark='*') %}{{ mark }}{{ m.role | upper }}: "
        "{{ m.content | replace('e', '3') | tojson }}{% endmacro %}{% for m in messages if m.role != 'system' %}"
        "{% set ns.turns = ns.turns + 1 %}{% set ns.seen = ns.seen + [m.role] %}{{ show(m) }}{{ show(m, mark='-') }}"
        "{% if ns.turns == 2 %}{% break %}{% endif %}{% endfor %}|{{ ns.seen|join(',') }}|{{ messages[-1:] | length }}"
        "|{{ messages | map(attribute='role') | unique | list }}|{{ messages | selectattr('role', 'equalto', 'user') "
        "| list | length }}|{{ '%s-%03d' % ('a', ns.turns) }}|{{ 'x,y'.split(',')[1] }}{{ 'ab'[::-1] }}|"
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ messages | tojson(indent=2) }}"
    ),
    "tools": (
        "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{{ t.function.name }}{% for p in t.function.parameters "
        "| dictsort %}{{ p[0] }}:{{ p[1] }},{% endfor %}{% endfor %}{% else %}none{% endif %}{{ messages | length }}"
    ),
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": 'é < "2"', "parameters": {"b": [1, 2.5], "a": None}},
    }
]


def words(rng: random.Random) -> str:
    """Random text of words, spaces, symbols and rare characters."""
    pool = [
        "hello",
        "World",
        "tokens",
        "the",
        "of",
        "don't",
        "12",
        "3.5",
        "naïve",
        "日本",
        "<u>",
        "\n",
        "  ",
        ",",
        "(x)",
    ]
    rare = [*range(32, 127), 0x301, 0x4E00, 0x1F600, 0x3042, 0x5D0, 0xFFFD, 0x200D]
    parts = [rng.choice(pool) if rng.random() < 0.7 else chr(rng.choice(rare)) for _ in range(rng.randint(0, 14))]
    return "".join(part + " " * rng.choice([0, 0, 1, 1, 1, 2, 4]) for part in parts)


def sentencepiece_goldens() -> dict[str, object]:
    import sentencepiece as spm

    rng = random.Random(11)
    corpus = "\n".join(
        "the tokens of the world say hello to the naïve model, don't they? 日本 こんにちは (x) 12 3.5 " + words(rng)
        for _ in range(300)
    )
    out: dict[str, object] = {}
    options = {
        "llama": {"byte_fallback": True, "remove_extra_whitespaces": False, "user_defined_symbols": ["<u>", "<user>"]},
        "squeezed": {"byte_fallback": False, "remove_extra_whitespaces": True},
        "unprefixed": {
            "byte_fallback": True,
            "remove_extra_whitespaces": False,
            "add_dummy_prefix": False,
            "split_by_whitespace": False,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "corpus.txt").write_text(corpus, encoding="utf-8")
        for name, option in options.items():
            spm.SentencePieceTrainer.train(
                input=f"{folder}/corpus.txt",
                model_prefix=f"{folder}/{name}",
                vocab_size=420 if option["byte_fallback"] else 200,
                model_type="bpe",
                normalization_rule_name="identity",
                character_coverage=0.98,
                minloglevel=2,
                **option,
            )
            model = spm.SentencePieceProcessor(model_file=f"{folder}/{name}.model")
            size = model.vocab_size()
            named = set(option.get("user_defined_symbols", []))
            kinds = [
                2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i)
                else 4 if model.id_to_piece(i) in named else 1
                for i in range(size)
            ]  # fmt: skip
            texts = [*TEXTS, *(words(rng) for _ in range(120))]
            known = [i for i in range(size) if kinds[i] != 2]
            sampled = [[rng.choice(known) for _ in range(rng.randint(1, 7))] for _ in range(80)]
            out[name] = {
                "metadata": {
                    "tokenizer.ggml.model": "llama",
                    "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(size)],
                    "tokenizer.ggml.scores": [model.get_score(i) for i in range(size)],
                    "tokenizer.ggml.token_type": kinds,
                    "tokenizer.ggml.unknown_token_id": 0,
                    "tokenizer.ggml.bos_token_id": 1,
                    "tokenizer.ggml.eos_token_id": 2,
                    "tokenizer.ggml.add_space_prefix": bool(option.get("add_dummy_prefix", True)),
                    "tokenizer.ggml.remove_extra_whitespaces": option["remove_extra_whitespaces"],
                },
                "encoded": [[text, model.encode(text)] for text in texts],
                "decoded": [[ids, model.decode(ids)] for ids in sampled],
            }
    return out


def byte_level_goldens() -> dict[str, object]:
    """A small byte-level vocabulary without some bytes, with control and user-defined tokens."""
    import tokenizers
    from tokenizers import AddedToken, models, pre_tokenizers, trainers

    rng = random.Random(12)
    engine = tokenizers.Tokenizer(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=[], special_tokens=["<|end|>", "<|user|>", "<u>"])
    engine.train_from_iterator([*TEXTS[:8], *(words(rng) for _ in range(300))], trainer)
    state = json.loads(engine.to_str())["model"]
    tokens = [""] * len(state["vocab"])
    for token, index in state["vocab"].items():
        tokens[index] = token
    model = models.BPE(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    reference = tokenizers.Tokenizer(model)
    reference.pre_tokenizer = engine.pre_tokenizer
    reference.decoder = tokenizers.decoders.ByteLevel()
    reference.add_special_tokens(["<|end|>", "<|user|>"])
    reference.add_tokens([AddedToken("<u>", normalized=False)])
    texts = [
        *TEXTS,
        *(words(rng) + rng.choice(["", "<|end|>", "<|user|>x", "<u>", "<|us"]) + words(rng) for _ in range(120)),
    ]
    sampled = [[rng.randrange(len(tokens)) for _ in range(rng.randint(1, 9))] for _ in range(120)]

    def encoded(plain: bool) -> list[list[object]]:
        reference.encode_special_tokens = plain
        return [[text, reference.encode(text, add_special_tokens=False).ids] for text in texts]

    return {
        "metadata": {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (len(tokens) - 3),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in state["merges"]],
            "tokenizer.ggml.eos_token_id": 0,
        },
        "plain": encoded(True),
        "special": encoded(False),
        "decoded": [
            [ids, reference.decode(ids, skip_special_tokens=True), reference.decode(ids, skip_special_tokens=False)]
            for ids in sampled
        ],
        "tokenizer_json": json.loads(reference.to_str()),
    }


def smollm2_goldens(path: Path) -> dict[str, object]:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Loading from GGUF leaves out the splitting of digits that SmolLM2's own tokenizer.json begins with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    rng = random.Random(13)
    texts = [*TEXTS, *(words(rng) for _ in range(40))]
    sampled = [[rng.randrange(17, 49152) for _ in range(rng.randint(1, 8))] for _ in range(40)]
    return {
        "encoded": [[text, tokenizer(text, add_special_tokens=False).input_ids] for text in texts],
        "decoded": [[ids, tokenizer.decode(ids, clean_up_tokenization_spaces=False)] for ids in sampled],
        "chats": [
            [chat, prompt, tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)]
            for chat in CONVERSATIONS
            for prompt in (True, False)
        ],
    }


def chat_goldens() -> list[dict[str, object]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    cases = []
    for name, source in TEMPLATES.items():
        for chat in CONVERSATIONS:
            for prompt in (True, False):
                tools = TOOLS if name == "tools" and prompt else None
                text = render_jinja_template(
                    [chat],
                    tools=tools,
                    chat_template=source,
                    add_generation_prompt=prompt,
                    bos_token="<s>",
                    eos_token="</s>",
                )[0][0]
                cases.append(
                    {"name": name, "source": source, "messages": chat, "tools": tools, "prompt": prompt, "text": text}
                )
    return cases


def split_goldens(pairs: list[str]) -> dict[str, object]:
    """How the real tokenizers of some families cut text, pieces in the byte alphabet."""
    import tokenizers

    out: dict[str, object] = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        real = tokenizers.Tokenizer.from_file(path)

        def pieces(text: str, real: tokenizers.Tokenizer = real) -> list[str]:
            text = real.normalizer.normalize_str(text) if real.normalizer else text
            return [piece for piece, _ in real.pre_tokenizer.pre_tokenize_str(text)]

        out[name] = [[text, pieces(text)] for text in TEXTS]
    return out


def write(name: str, value: object) -> None:
    (HERE / name).write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write("tokenizer_sentencepiece.json", sentencepiece_goldens())
    write("tokenizer_byte_level.json", byte_level_goldens())
    write("tokenizer_smollm2.json", smollm2_goldens(Path(sys.argv[1])))
    write("chat_templates.json", chat_goldens())
    if sys.argv[2:]:
        write("tokenizer_splits.json", split_goldens(sys.argv[2:]))
