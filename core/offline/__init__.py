"""Offline batches: a file of requests in, a file of answers out, to be continued after any kind of end.

Knows nothing of the command line; what a request may say is ``openai``'s business.
"""

from __future__ import annotations

from .input import Input, Line, Survey
from .output import Output
from .run import OfflineRun, Tally, settings_fingerprint

__all__ = ["Input", "Line", "OfflineRun", "Output", "Survey", "Tally", "settings_fingerprint"]
