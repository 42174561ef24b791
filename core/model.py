"""Model: a model file opened, understood and checked, but not yet on any device."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from .architecture import Architecture
from .errors import TemplateError
from .gguf import GGUFFile, open_gguf
from .plugins import Plugin, Registry
from .sources.local import expand
from .weights import Claims, claim

if TYPE_CHECKING:
    from .arch import Decoder
    from .chat import ChatTemplate
    from .tokenizer import Tokenizer

MAX_NAME = 100
"""Most characters of a model's name that are shown; a file may hold a megabyte."""


class Model:
    """An open file with the Decoder its plugin built and the tensors that claims.

    Raises ModelFileError for a broken file, PluginError if no plugin answers to it, ConfigError for metadata the
    plugin refuses, TensorError for tensors that do not fit. A context manager: ``close()`` unmaps the file.
    """

    file: GGUFFile
    decoder: Decoder
    plugin: Plugin
    architecture: Architecture
    claims: Claims

    def __init__(
        self,
        path: str | Path,
        registry: Registry,
        *,
        architecture: str | None = None,
        ignore_metadata: Collection[str] = (),
        tokenizer: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.path = Path(path)
        self._tokenizer_path = tokenizer
        self._chat_template = chat_template
        self.file = open_gguf(path)
        try:
            shapes = {name: info.shape for name, info in self.file.tensors.items()}
            self.decoder, self.plugin, self.architecture = registry.decoder(
                self.file.metadata, shapes, architecture=architecture, ignore=ignore_metadata
            )
            self.claims = claim(self.decoder, self.file.tensors)
            self.file.check_supported(self.file.tensors[spec.name] for spec in self.claims.specs)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the file. Safe to call twice."""
        self.file.close()

    @property
    def name(self) -> str:
        """What the file calls itself, on one line of at most MAX_NAME characters, or its file name."""
        name = self.file.metadata.get("general.name")
        text = name.strip()[: 4 * MAX_NAME] if isinstance(name, str) else ""
        line = " ".join("".join(char if char.isprintable() else " " for char in text).split()) or self.path.stem
        return line if len(line) <= MAX_NAME else line[: MAX_NAME - 1] + "…"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer, or the tokenizer.json that the config names. Raises TokenizerError."""
        from .tokenizer import Tokenizer

        if self._tokenizer_path is not None:
            path = self.path.parent / expand(self._tokenizer_path)
            return Tokenizer.from_json(path, self.file.metadata)
        return Tokenizer.from_gguf(self.file.metadata)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template of the config or of the file. Raises TemplateError when there is none."""
        from .chat import ChatTemplate

        source = self._chat_template or self.tokenizer.chat_template
        if source is None:
            raise TemplateError(
                f"{self.name} has no chat template, so it cannot chat: it is probably a base model. "
                "Set chat: false to continue the prompt as plain text, or give model.chat_template"
            )
        tokens = self.tokenizer
        bos, eos = ("" if token is None else tokens.token(token) for token in (tokens.bos_id, tokens.eos_id))
        return ChatTemplate(source, bos_token=bos, eos_token=eos)

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a template to chat with."""
        return bool(self._chat_template or self.tokenizer.chat_template)
