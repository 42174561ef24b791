"""``python -m polyhead.cli``, the same as the command ``polyhead``."""

from __future__ import annotations

import sys

from . import main

sys.exit(main())
