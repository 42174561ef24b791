"""Speculation: which requests get guesses in a step, and how many, beside what the step has to do anyway.

Knows nothing of how guesses are made (drafting.py) or how choices are recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

from .drafting import NgramDrafter
from .request import Request
from .roster import Roster
from .step import Draft

MAX_ROWS = 16
"""With more rows than this a step costs more for each row, and guesses may cost more than they bring."""


class Speculation:
    """Gives guesses to decoding requests, the lowest ranks first, while a step has fewer than ``max_rows`` rows.

    Guesses never cost anybody blocks: a free one is left for every running request.
    """

    def __init__(self, drafter: NgramDrafter, max_rows: int = MAX_ROWS) -> None:
        self.drafter = drafter
        self.max_rows = max_rows

    def rests(self, requests: Sequence[Request]) -> bool:
        """Whether none of these will get guesses in the next step, if each decodes one token in this one."""
        if len(requests) >= self.max_rows:
            return True
        return all(request.lookup is not None and request.lookup.rests > 0 for request in requests)

    def drafts(self, roster: Roster, rows: int) -> list[Draft]:
        """Guesses for a step in which decoding requests may have so many rows and tokens altogether.

        The blocks that they need are handed out here.
        """
        drafts: list[Draft] = []
        rows = min(rows, self.max_rows) - len(roster.decoding)
        blocks = roster.blocks
        for request in roster.decoding:
            if rows <= 0:
                break
            cached = request.num_cached_tokens
            most = min(rows, request.final - cached - 1)
            if most <= 0 or not request.foreseeable:
                continue
            draft = self.drafter.draft(request, most)
            held = request.held_tokens - cached - 1
            if len(draft) > held:
                missing = blocks.blocks_for(len(draft) - held)
                if blocks.free_blocks - missing < roster.num_running:
                    draft = draft[: max(0, held)]
                elif not roster.extend(request, cached + 1 + len(draft)):
                    raise RuntimeError("blocks that are free cannot be had")
            if draft:
                drafts.append((request, draft))
                rows -= len(draft)
        return drafts
