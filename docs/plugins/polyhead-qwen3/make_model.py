"""Writes a tiny Qwen3 file with random weights, to try things on where there is no real one. Talks nonsense.

python make_model.py tiny-qwen3.gguf
"""

from __future__ import annotations

import sys
from pathlib import Path

import polyhead_qwen3
from polyhead.testing import Case, make_model

sys.path.append(str(Path(__file__).parent / "tests"))

from qwen3_reference import METADATA

make_model(sys.argv[1], polyhead_qwen3, Case("qwen3", METADATA))
