"""Threads that share the work of one call; they sleep between calls."""

from __future__ import annotations

import ctypes

from qwenvl_app.engine.native.library import freed_with

_MANY = 128  # rows: from then on a call takes milliseconds


class Team:
    """``few`` threads for a step of few rows, ``many`` for a call of many.

    A step is soon done, and comes again at once: as many threads as cores would leave none to those
    that read requests and write answers, and each step would wait for whichever they interrupt.
    """

    def __init__(self, library: ctypes.CDLL, few: int, many: int):
        library.delete_team.argtypes = (ctypes.c_void_p,)
        self._few, self._many = few, max(few, many)
        self.address = ctypes.c_void_p(library.new_team(self._many))
        freed_with(self, library.delete_team, self.address)

    def threads(self, rows: int) -> int:
        """For a call of so many."""
        return self._many if rows >= _MANY else self._few
