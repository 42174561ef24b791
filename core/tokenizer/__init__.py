"""Text to token ids and back, from the vocabulary that a model file carries. Knows nothing of models or devices."""

from .stream import StreamDecoder
from .tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
