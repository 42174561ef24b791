"""Architecture: what a plugin offers for a family of models, and the version of that contract."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from .arch import Block, Decoder, Metadata

API_VERSION = 1
SUPPORTED_API_VERSIONS = (1,)  # this one and, once there is one, the previous


@runtime_checkable
class Architecture(Protocol):
    """Turns a model file's metadata into a Decoder. Pure: no files, no device, no state.

    ``name`` is what YAML says (``architecture: my_family``); ``gguf_names`` are the values of ``general.architecture``
    it answers to; ``api_version`` is the contract it was written for. All three may be plain class attributes. Several
    classes may share a name as long as no gguf_name is claimed twice.

    Where files of one ``general.architecture`` belong to different plugins, an architecture may have one method more,
    ``accepts(meta) -> bool``: it is asked only where several architectures answer to a file's name, and one that says
    False leaves the file to the others.
    """

    @property
    def name(self) -> str: ...

    @property
    def gguf_names(self) -> tuple[str, ...]: ...

    @property
    def api_version(self) -> int: ...

    def decoder(self, meta: Metadata) -> Decoder:
        """The whole model. Raises ConfigError for metadata that is missing, contradictory or unsupported."""
        ...

    def block(self, meta: Metadata, index: int) -> Block:
        """Layer ``index``, from 0."""
        ...
