"""How text is cut into words before byte-level BPE: a table from ``tokenizer.ggml.pre`` to rules.

GGUF does not carry the rules themselves, only a name that stands for those of a model family's ``tokenizer.json``; a
wrong rule gives plausible but wrong ids, so an unknown name is an error. Knows nothing of vocabularies and merges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import TokenizerError

# Contractions, letters with one leading non-letter, digits, punctuation, line ends, spaces: tiktoken's cl100k shape.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _CL100K.format(digits=r"\p{N}{1,3}")
_QWEN2 = _CL100K.format(digits=r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Words that end in lower case, or are all capitals: o200k's shape, with a contraction glued on in GPT-4o only.
_O200K = (
    r"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+{tail}"
    r"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}]+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*{tail}"
    r"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = _O200K.format(tail=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?", digits=r"\p{N}{1,3}")
_TEKKEN = _O200K.format(tail="", digits=r"\p{N}")

_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
# The model's own rule for the end of a piece is ``\s+$``, which is quadratic in a run of spaces; with the look-behind
# it is linear and the same, because the leftmost match starts at the start of a run.
_TRAILING_SPACE = r"(?<!\s)\s+$"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def _char_class(ranges: str) -> str:
    """Ranges of hexadecimal code points as the inside of a character class."""
    ends = (part.partition("-")[::2] for part in ranges.split())
    return "".join(chr(int(a, 16)) + (f"-{chr(int(b, 16))}" if b else "") for a, b in ends)


# Letters of cased scripts, as deepseek-llm lists them; by number, because several look alike or normalise to others.
_CASED = _char_class(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Rules of one family: an optional Unicode normal form, splits in order, and two habits of its vocabulary.

    ``splits`` are regular expressions whose matches are isolated, or the names ``bytes`` (to the byte alphabet),
    ``gpt2`` (GPT-2's expression, then to the byte alphabet), ``digits``, ``digit-runs`` and ``punctuation``.
    ``whole_words``: a word that is a token is taken whole, without merging (``ignore_merges`` of ``tokenizer.json``).
    ``add_bos`` holds where the file does not say.
    """

    splits: tuple[str, ...]
    normal_form: str | None = None
    whole_words: bool = False
    add_bos: bool = False


_TABLE: dict[tuple[str, ...], PreTokenizer] = {
    ("gpt-2", "phi-2", "jais", "mellum", "exaone4", "trillion", "gigachat", "granite-docling"): PreTokenizer(("gpt2",)),
    ("mpt", "olmo"): PreTokenizer(("gpt2",), normal_form="NFC"),
    ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"): PreTokenizer(("digits", "gpt2")),
    ("command-r",): PreTokenizer(("digits", "gpt2"), normal_form="NFC"),
    ("llama-bpe", "llama3", "llama-v3", "falcon3"): PreTokenizer((_LLAMA3, "bytes"), whole_words=True, add_bos=True),
    ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): PreTokenizer((_LLAMA3, "bytes")),
    ("qwen2", "deepseek-r1-qwen", "megrez", "hunyuan"): PreTokenizer((_QWEN2, "bytes"), normal_form="NFC"),
    ("qwen35",): PreTokenizer((_QWEN35, "bytes"), normal_form="NFC"),
    ("stablelm2", "grok-2"): PreTokenizer((_QWEN2, "bytes")),
    ("seed-coder",): PreTokenizer((_SEED, "bytes")),
    ("bailingmoe", "bailingmoe2"): PreTokenizer((_BAILING, "bytes")),
    ("gpt-4o", "llama4", "kanana2"): PreTokenizer((_GPT4O, "bytes")),
    ("tekken",): PreTokenizer((_TEKKEN, "bytes"), whole_words=True, add_bos=True),
    ("deepseek-v3", "hunyuan-dense"): PreTokenizer((*_DEEPSEEK_V3, "bytes")),
    ("deepseek-coder",): PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, "digits", "bytes")),
    ("deepseek-llm",): PreTokenizer(
        (
            "[\r\n]",
            rf"\s?[{_CASED}]+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            _TRAILING_SPACE,
            _CJK,
            "digits",
            "bytes",
        )
    ),
    # Falcon looks for digits after the mapping to bytes, so a byte shown as ² or ¼ ends a word: the order matters.
    ("falcon",): PreTokenizer(("punctuation", "gpt2", "digit-runs", "[0-9][0-9][0-9]")),
    # What converters wrote before the families had names; defined by its first reader and kept as it was.
    ("default",): PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]", "bytes")),
}
_BY_NAME = {name: rules for names, rules in _TABLE.items() for name in names}


def pre_tokenizer_names() -> tuple[str, ...]:
    """All values of ``tokenizer.ggml.pre`` that are known, sorted."""
    return tuple(sorted(_BY_NAME))


def pre_tokenizer(name: str) -> PreTokenizer:
    """The rules for a value of ``tokenizer.ggml.pre``; TokenizerError that lists the known ones if there are none."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise TokenizerError(
            f"tokenizer.ggml.pre is {name!r}, a pre-tokenizer that polyhead does not know; encoding with another "
            f"would give wrong tokens. Known: {', '.join(pre_tokenizer_names())}. If the model's tokenizer.json is at "
            f"hand, load it with Tokenizer.from_json."
        ) from None


def build(rules: PreTokenizer) -> tuple[Any, Any]:
    """The rules as a pair of ``tokenizers`` objects: (normalizer or None, pre-tokenizer)."""
    from tokenizers import Regex, normalizers, pre_tokenizers

    named: dict[str, Callable[[], Any]] = {
        "bytes": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "digits": lambda: pre_tokenizers.Digits(individual_digits=True),
        "digit-runs": lambda: pre_tokenizers.Digits(individual_digits=False),
        "punctuation": lambda: pre_tokenizers.Punctuation("contiguous"),
    }
    parts = [
        named[split]() if split in named else pre_tokenizers.Split(Regex(split), "isolated") for split in rules.splits
    ]
    form = {None: None, "NFC": normalizers.NFC}[rules.normal_form]
    return (form() if form else None), pre_tokenizers.Sequence(parts)
