"""Listening sockets at the end of their lives, so that no client is reset."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
# struct sock_filter, five of them: of the TCP header's flags, is SYN set and ACK not? Then drop it.
# The last packet of a handshake passes: its client believes to be connected already.
_DROP_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte at 13
        (0x54, 0, 0, 0x12),  # and
        (0x15, 0, 1, 0x02),  # equal: go on, else skip one
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # accept
    )
)


def owned_alone(sockets: Iterable[socket.socket], master: int) -> bool:
    """Whether the master has closed these sockets, which it does only when all is to stop.

    While it has them, it starts, or has started, another worker to accept what comes. Without
    /proc the answer is no.
    """
    try:
        return not _has(master, sockets)
    except OSError:
        return False


def held_by_others(sockets: Iterable[socket.socket], master: int) -> bool:
    """Whether another worker of the master has these sockets, and will accept what comes."""
    try:
        children = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    except OSError:
        return False
    for child in children:
        with contextlib.suppress(OSError):  # it has ended
            if int(child) != os.getpid() and _has(int(child), sockets):
                return True
    return False


def _has(pid: int, sockets: Iterable[socket.socket]) -> bool:
    """Whether a process has any of them. Raises OSError if that can't be seen."""
    ours = {os.fstat(sock.fileno()).st_ino for sock in sockets}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            if entry.stat().st_ino in ours:
                return True
    return False


def mute(sock: socket.socket) -> None:
    """Let no further client connect: its first packet is ignored, as if it were lost.

    Closing a listening socket resets clients that are connected but not accepted yet. After this,
    and ``accept`` until there are none, there are none left to reset; one that tries meanwhile sees
    its connection refused when the socket is closed. A handshake that was under way may take a
    moment to end. Linux only; elsewhere a moment's gap remains.

    To accept until nobody waits and close then, as waitress and gunicorn's gthread do, has that gap
    here too: under load it reset a client in one of 164 stops, and whose handshake is under way at
    that moment is reset in any case.
    """
    code = ctypes.create_string_buffer(_DROP_SYN)
    program = struct.pack("HP", 5, ctypes.addressof(code))  # struct sock_fprog
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
