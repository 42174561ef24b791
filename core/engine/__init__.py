"""How requests flow: sampling parameters, stop strings, requests, KV blocks and the scheduler.

Pure policy in plain Python: knows nothing of devices, models, tokenizers or files.
"""

from __future__ import annotations

from .block_manager import BlockManager
from .drafting import NgramDrafter
from .request import FinishReason, Request, Status
from .sampling import SamplingParams
from .scheduler import Scheduler
from .speculation import Speculation
from .step import Chunk, ScheduledStep
from .stop import StopMatcher
from .structured import Guide, StructuredOutputs

__all__ = [
    "BlockManager",
    "Chunk",
    "FinishReason",
    "Guide",
    "NgramDrafter",
    "Request",
    "SamplingParams",
    "ScheduledStep",
    "Scheduler",
    "Speculation",
    "Status",
    "StopMatcher",
    "StructuredOutputs",
]
