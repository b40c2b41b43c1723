"""Answers that repeat themselves for ever, seen in their text: an upstream would go on and be paid.

The engine of this process counts tokens (``engine/sampling.repeats_itself``). An upstream sends
pieces of text, as a rule one for a token, and sometimes one for several.
"""

from __future__ import annotations

from collections import deque

_OFTEN = 8  # times that the passage is there, as in the engine
_LOOK = 16  # pieces between two looks


class Repetition:
    """Watches one answer. ``limit``: pieces that have to be one passage; 0: it never is."""

    def __init__(self, limit: int):
        self._limit, self._count = limit, 0
        self._pieces: deque[str] = deque(maxlen=limit)

    def add(self, piece: str) -> bool:
        """Whether the last ``limit`` pieces, this one among them, are one passage over and over."""
        self._pieces.append(piece)
        self._count += 1
        due = self._limit and self._count >= self._limit and self._count % _LOOK == 0
        return bool(due) and _repeats_itself("".join(self._pieces))


def _repeats_itself(text: str) -> bool:
    """Whether it has a period of at most an eighth of its length.

    If it has, its first seven eighths are there again at that place, and at none before (Fine and
    Wilf 1965): so one search in C is enough.
    """
    longest = len(text) // _OFTEN
    period = text.find(text[: len(text) - longest], 1)
    return period > 0 and text.startswith(text[period:])
