"""The tokenizer of a model: text to token ids and back, and the ids that begin and end a text.

Knows nothing of how words are merged (bpe.py, sentencepiece.py) and of chat formats (polyhead.chat).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import RequestError, TokenizerError
from .bpe import ByteLevelBPE, unescape_bytes
from .hf_json import JsonConfig, JsonEncoder
from .pretokenizers import pre_tokenizer
from .sentencepiece import SentencePieceBPE, piece_bytes
from .stream import EACH_BYTE, StreamDecoder
from .vocabulary import HIDDEN_KINDS, TokenKind, Vocabulary, scalar, token_id

_TEMPLATE = "tokenizer.chat_template"


class Encoder(Protocol):
    """Text to ids, without BOS and EOS."""

    def encode(self, text: str, special: bool) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class Roles:
    """Ids with a role; None where the vocabulary has no such token. ``add_*``: what encoding adds by itself."""

    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    pad: int | None = None
    add_bos: bool = False
    add_eos: bool = False
    stop: frozenset[int] = field(default_factory=frozenset)


class Tokenizer:
    """Encodes and decodes text for one model. Make one with ``from_gguf`` or ``from_json``; safe to share.

    ``vocab_size`` counts ids; ``bos_id``, ``eos_id``, ``unk_id``, ``pad_id`` are None where absent; ``add_bos`` and
    ``add_eos`` say what the model was trained with; ``stop_ids`` end a generation; ``chat_template`` is the default
    template's source and ``chat_templates`` has all by name ("default" among them).
    """

    def __init__(
        self,
        encoder: Encoder,
        vocabulary: Vocabulary,
        roles: Roles,
        *,
        byte_level: bool,
        strips_space: bool,
        chat_templates: Mapping[str, str],
    ) -> None:
        self._encoder = encoder
        self._vocabulary = vocabulary
        self._roles = roles
        self._byte_level = byte_level
        self._strips_space = strips_space
        self._pieces: list[bytes | None] = [None] * len(vocabulary.tokens)
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id, self.unk_id, self.pad_id = roles.bos, roles.eos, roles.unk, roles.pad
        self.add_bos, self.add_eos, self.stop_ids = roles.add_bos, roles.add_eos, roles.stop
        self.chat_templates = dict(chat_templates)
        self.chat_template: str | None = self.chat_templates.get("default")

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that a GGUF file's metadata describes.

        Raises TokenizerError for a missing key, an unknown ``tokenizer.ggml.model`` or ``.pre``, lists whose lengths
        disagree, and ids out of range.
        """
        model = scalar(metadata, "tokenizer.ggml.model", str)
        if model not in ("gpt2", "llama"):
            what = "is missing" if model is None else f"is {model!r}"
            raise TokenizerError(
                f"tokenizer.ggml.model {what}; polyhead reads 'gpt2' (byte-level BPE) and 'llama' (SentencePiece "
                "BPE). With a tokenizer.json beside the model, use Tokenizer.from_json."
            )
        vocabulary = Vocabulary.from_metadata(metadata, scored=model == "llama")
        if model == "gpt2":
            pre = scalar(metadata, "tokenizer.ggml.pre", str)
            if pre is None:
                raise TokenizerError(
                    "tokenizer.ggml.pre is missing, so it is unknown how this model cuts text into words, and a guess "
                    "would give wrong tokens. Convert the model again, or write the name into the file: "
                    "gguf-new-metadata --pre-tokenizer NAME old.gguf new.gguf (gpt-2, llama-bpe, qwen2, ...)"
                )
            rules = pre_tokenizer(pre)
            roles = cls._roles_from(metadata, vocabulary, rules.add_bos)
            prefix = scalar(metadata, "tokenizer.ggml.add_space_prefix", bool, False)
            if prefix:
                raise TokenizerError(
                    "tokenizer.ggml.add_space_prefix is true for a byte-level vocabulary, which polyhead does not "
                    "read; use the model's tokenizer.json with Tokenizer.from_json"
                )
            encoder: Encoder = ByteLevelBPE(vocabulary, metadata, rules)
        else:
            if metadata.get("tokenizer.ggml.precompiled_charsmap") is not None:
                raise TokenizerError(
                    "tokenizer.ggml.precompiled_charsmap: polyhead does not apply SentencePiece normalisation "
                    "tables; use the model's tokenizer.json with Tokenizer.from_json"
                )
            roles = cls._roles_from(metadata, vocabulary, True)
            prefix = scalar(metadata, "tokenizer.ggml.add_space_prefix", bool, True)
            squeeze = scalar(metadata, "tokenizer.ggml.remove_extra_whitespaces", bool, False)
            encoder = SentencePieceBPE(vocabulary, roles.unk, prefix, squeeze)
        templates = {
            ("default" if key == _TEMPLATE else key[len(_TEMPLATE) + 1 :]): scalar(metadata, key, str)
            for key in metadata
            if key == _TEMPLATE or key.startswith(_TEMPLATE + ".")
        }
        return cls(
            encoder,
            vocabulary,
            roles,
            byte_level=model == "gpt2",
            strips_space=prefix,
            chat_templates={name: source for name, source in templates.items() if source is not None},
        )

    @staticmethod
    def _roles_from(
        metadata: Mapping[str, Any], vocabulary: Vocabulary, add_bos: bool, fallback: Roles | None = None
    ) -> Roles:
        """Ids with a role from ``tokenizer.ggml.*``, or else ``fallback``'s; checks that what is added exists."""
        fallback = fallback or Roles()

        def named(name: str, default: int | None = None) -> int | None:
            value = token_id(metadata, name, len(vocabulary.tokens))
            return default if value is None else value

        bos, eos = named("bos", fallback.bos), named("eos", fallback.eos)
        adds_bos = scalar(metadata, "tokenizer.ggml.add_bos_token", bool, add_bos)
        adds_eos = scalar(metadata, "tokenizer.ggml.add_eos_token", bool, fallback.add_eos)
        for adds, index, name in ((adds_bos, bos, "bos"), (adds_eos, eos, "eos")):
            if adds and index is None:
                raise TokenizerError(
                    f"the tokenizer adds {name.upper()} (tokenizer.ggml.add_{name}_token), but "
                    f"tokenizer.ggml.{name}_token_id is missing"
                )
        return Roles(
            bos=bos,
            eos=eos,
            unk=named("unknown", fallback.unk),
            pad=named("padding", fallback.pad),
            add_bos=adds_bos,
            add_eos=adds_eos,
            stop=vocabulary.stop_ids(eos, named("eot"), named("eom")),
        )

    @classmethod
    def from_json(cls, path: str | Path, metadata: Mapping[str, Any] | None = None) -> Tokenizer:
        """The tokenizer in a ``tokenizer.json``. Roles come from ``metadata`` (GGUF keys), then from a
        ``tokenizer_config.json`` beside the file, then from what the file itself puts in front of a text.

        Raises TokenizerError where the file cannot be read, or decodes in a way that polyhead does not.
        """
        metadata = metadata or {}
        path = Path(path)
        encoder = JsonEncoder(path)
        config = JsonConfig.beside(path)
        vocabulary = encoder.vocabulary

        def find(token: str | None, role: str) -> int | None:
            if token is None:
                return None
            if token not in vocabulary.ids:
                raise TokenizerError(f"the {role} {token!r} of tokenizer_config.json is not in the vocabulary")
            return vocabulary.ids[token]

        fallback = Roles(
            bos=find(config.bos_token, "bos_token"),
            eos=find(config.eos_token, "eos_token"),
            unk=find(config.unk_token, "unk_token"),
            pad=find(config.pad_token, "pad_token"),
            add_eos=bool(config.add_eos),
        )
        add_bos = config.add_bos
        if add_bos is None:
            bos = token_id(metadata, "bos", len(vocabulary.tokens))
            bos = fallback.bos if bos is None else bos
            add_bos = bos is not None and encoder.first_id == bos
        template = scalar(metadata, _TEMPLATE, str, config.chat_template)
        return cls(
            encoder,
            vocabulary,
            cls._roles_from(metadata, vocabulary, add_bos, fallback),
            byte_level=encoder.byte_level,
            strips_space=encoder.strips_space,
            chat_templates={} if template is None else {"default": template},
        )

    def encode(self, text: str, special: bool = False, bos: bool | None = None) -> list[int]:
        """Ids of ``text``.

        ``special``: names of control tokens in the text become those tokens (names of user-defined tokens always do);
        use it for templates, not for what a user typed. ``bos``: True or False forces or forbids BOS; None adds BOS
        and EOS as the model was trained, and only where ``special``. Neither is ever doubled. Raises RequestError for
        text that is not Unicode (lone surrogates) and where BOS is asked for but the model has none.
        """
        if not isinstance(text, str):
            raise RequestError(f"text must be a string, not {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text has a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}, which "
                "is not a Unicode character; decode the input properly or replace it"
            ) from None
        if bos and self.bos_id is None:
            raise RequestError("BOS was asked for, but the model has no BOS token")
        ids = self._encoder.encode(text, special)
        by_default = special and bos is None
        # Only a text with special tokens can begin with BOS itself; without them "<s>" is what the user typed.
        if (bos or (by_default and self.add_bos)) and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        if by_default and self.add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, continues: bool = False) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD. RequestError for an id that is
        no integer or out of range.

        ``skip_special`` leaves control tokens out. The space that encoding puts in front of a text is taken off,
        unless the ids continue other text (``continues``).
        """
        if not isinstance(ids, Iterable):
            raise RequestError(f"token ids must be a sequence of integers, not {type(ids).__name__}")
        data = b"".join([self._piece(i, skip_special) for i in ids])
        text = data.decode("utf-8", self._errors)
        return text.removeprefix(" ") if self._strips_space and not continues else text

    def stream(self, skip_special: bool = True, continues: bool = False) -> StreamDecoder:
        """A decoder for ids that arrive one by one; see ``decode`` for the arguments."""
        return StreamDecoder(lambda i: self._piece(i, skip_special), self._errors, self._strips_space and not continues)

    @property
    def _errors(self) -> str:
        return "replace" if self._byte_level else EACH_BYTE

    def token(self, token_id: int) -> str:
        """The token as the vocabulary spells it (``Ġthe``, ``▁the``, ``<0x0A>``)."""
        return self._vocabulary.tokens[self._checked(token_id)]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of text that the token stands for; of a control token, its name."""
        return self._piece(token_id, False)

    def is_control(self, token_id: int) -> bool:
        """Whether the token is no text: decoding leaves it out."""
        return self._vocabulary.kinds[self._checked(token_id)] in HIDDEN_KINDS

    def is_text(self, token_id: int) -> bool:
        """Whether the token is text that may be written: no control token, and not marked as unused."""
        kind = self._vocabulary.kinds[self._checked(token_id)]
        return kind not in HIDDEN_KINDS and kind != TokenKind.UNUSED

    def _checked(self, token_id: int) -> int:
        try:
            token_id = operator.index(token_id)
        except TypeError:
            raise RequestError(f"a token id is an integer, not {type(token_id).__name__}") from None
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id {token_id} is out of range: the vocabulary has {self.vocab_size} tokens")
        return token_id

    def _piece(self, token_id: int, skip_special: bool) -> bytes:
        token_id = self._checked(token_id)
        piece = self._pieces[token_id]
        kind = self._vocabulary.kinds[token_id]
        if piece is None:
            token = self._vocabulary.tokens[token_id]
            if not self._byte_level:
                piece = piece_bytes(token, kind)
            elif kind in (TokenKind.CONTROL, TokenKind.UNKNOWN, TokenKind.USER_DEFINED):
                piece = token.encode("utf-8", "replace")
            else:
                piece = unescape_bytes(token)
            self._pieces[token_id] = piece
        return b"" if skip_special and kind in HIDDEN_KINDS else piece
