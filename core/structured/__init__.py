"""Structured output: StructuredOutputs compiled by llguidance into guides, which say token by token what may follow.

llguidance is imported when the first guide is made; what it refuses becomes a RequestError. Knows nothing of requests,
steps or devices.
"""

from __future__ import annotations

from .guides import Guides

__all__ = ["Guides"]
