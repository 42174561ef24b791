"""Chat templates: a conversation to the text a model was trained on, in a sandbox with limits on size and time."""

from __future__ import annotations

from .template import ChatTemplate

__all__ = ["ChatTemplate"]
