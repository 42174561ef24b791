"""One module per kernel family: each op checks shapes and dtypes, picks the grid and launches. Nobody else launches."""

from __future__ import annotations
