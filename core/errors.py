"""Every error that polyhead raises on purpose. The command line turns them into one message and exit code 2."""

from __future__ import annotations


def summary(error: BaseException) -> str:
    """Type and message of an error that foreign code raised; safe even where its ``__str__`` fails."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__} (its message cannot be shown)"


class PolyheadError(Exception):
    """Base of all errors a user can act on: the message names the thing, the number, and what would help.

    ``row`` is set where only one row of a step's sampling is concerned: the others are sound.
    """

    row: int | None = None


class ConfigError(PolyheadError):
    """A configuration, or a model's metadata, says something impossible, unknown or contradictory."""


class SourceError(PolyheadError):
    """A model could not be found or fetched, or its checksum differs."""


class ModelFileError(PolyheadError):
    """A model file cannot be used. Subclasses tell apart why."""


class ModelNotFoundError(ModelFileError, SourceError):
    """There is no file at the path."""


class NotGGUFError(ModelFileError):
    """The file is something else; the message shows its first bytes and what they look like."""


class TruncatedFileError(ModelFileError):
    """The file ends before what its header promises; the message has expected and actual bytes."""


class CorruptFileError(ModelFileError):
    """A count, an offset, a string or a type in the file is impossible."""


class MissingShardError(ModelFileError):
    """A part of a split model is absent or does not belong to it."""


class MissingKeyError(ModelFileError, ConfigError):
    """A metadata key that the architecture needs is absent."""


class UnknownMetadataError(ConfigError):
    """A file has keys that its architecture neither read nor ignored: the problem, and advice for who has the file."""

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem, advice)
        self.problem = problem

    def __str__(self) -> str:
        return ". ".join(self.args)


class TensorError(ModelFileError):
    """Tensors of the file are missing, unexpected, claimed twice or of another shape than the architecture says."""


class UnsupportedTypeError(ModelFileError):
    """A tensor is stored in a block format that polyhead does not read."""


class PluginError(PolyheadError):
    """A plugin is broken, collides with another, or none answers to an architecture."""


class TokenizerError(PolyheadError):
    """The file's tokenizer is unknown or inconsistent."""


class TemplateError(PolyheadError):
    """A chat template is missing, fails, or exceeds its limits."""


class RequestError(PolyheadError):
    """A request is impossible: empty prompt, prompt over the context, sampling value or token id out of range."""


class CapacityError(PolyheadError):
    """Memory does not suffice; the message holds the plan's table and what would fit."""


class DeviceError(PolyheadError):
    """A device, a driver or a library is absent or failed."""
