"""OpenAI's protocol: bodies of requests become sampling parameters and prompts, completions become bodies of answers.

Knows nothing of files, sockets or how a request is run.
"""

from __future__ import annotations

from .answer import answer
from .body import Asked, Endpoint, read_body
from .problem import BodyError, problem

__all__ = ["Asked", "BodyError", "Endpoint", "answer", "problem", "read_body"]
