"""Where prompts come from: arguments, files, standard input, the configuration. Knows no model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

from ..errors import RequestError

if TYPE_CHECKING:
    from ..config import RunConfig

MAX_BYTES = 64 << 20


def gather(texts: Sequence[str], files: Sequence[str], config: RunConfig) -> list[str]:
    """The prompts of a run: arguments and files if there are any, else the config's, else what is piped in.

    The config goes before standard input, so that a run from a job whose input is open but silent does not hang.
    Raises RequestError where there is none, one is empty, or bytes are not UTF-8.
    """
    prompts = [*texts, *(read_text(file) for file in files)]
    if not prompts and config.prompt is not None:
        prompts = [config.prompt] if isinstance(config.prompt, str) else list(config.prompt)
    if not prompts and not sys.stdin.isatty():
        prompts = [read_text("-")]
    if not prompts:
        raise RequestError("there is no prompt: give -p TEXT or --prompt-file FILE, pipe text in, or set prompt")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            which = f"prompt {number} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            raise RequestError(f"{which} is empty; give at least one character")
    return prompts


def read_text(file: str, *, strip: bool = True) -> str:
    """The text of a file, ``-`` for standard input; ``strip`` takes off one line end at the end, as $(…) does.

    Raises RequestError for a file that cannot be read, is not UTF-8, or is over 64 MiB.
    """
    name = "standard input" if file == "-" else file
    if file == "-":
        text = decoded(_limited(sys.stdin.buffer, name), name)
    else:
        try:
            with open(file, "rb") as stream:
                text = decoded(_limited(stream, name), name)
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name.
            raise RequestError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return text.removesuffix("\n").removesuffix("\r") if strip else text


def decoded(data: bytes, name: str, first_line: int = 1) -> str:
    """UTF-8 bytes as text. Raises RequestError that says where a wrong byte is."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise RequestError(
            f"{name}: byte 0x{data[error.start]:02x} at offset {error.start} (line {line}) is not UTF-8; "
            "convert the text to UTF-8"
        ) from None


def _limited(stream: BinaryIO, name: str) -> bytes:
    data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RequestError(f"{name} has more than {MAX_BYTES:,} bytes, the most that is read")
    return data
