"""``qwenvl ask``: one question, its answer in the terminal as it is written."""

from __future__ import annotations

import io
import json
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import click

from qwenvl_app.cli.answers import Answer, Broken, Failed, Refused
from qwenvl_app.cli.client import Client, Picture, Pieces


def ask(client: Client, pictures: list[Picture], prompt: str, *, as_json: bool) -> None:
    """Ask and print. Raises Failed."""
    began = time.monotonic()
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every terminal has all characters
        sys.stdout.reconfigure(errors="replace")
    # Several pictures fit no form; one is asked about as every documented client does it.
    if len(pictures) == 1:
        pieces = client.stream(pictures[0], prompt)
    else:
        pieces = client.chat(pictures, prompt)
    try:
        with closing(pieces):  # an interrupted answer frees its place now, not some time later
            answer = _print(pieces, silent=as_json)
    except Refused as error:
        again = f" Try again in {error.retry_after} s." if error.retry_after else ""
        raise Failed(f"{error}{again}") from None
    except Broken as error:
        raise Failed(f"no answer from {client.url}: {error}") from None
    if as_json:
        seconds = round(time.monotonic() - began, 3)
        click.echo(json.dumps(asdict(answer) | {"seconds": seconds}, ensure_ascii=False))
    elif answer.finish_reason not in ("stop", None):
        click.echo(f"qwenvl: the answer is not whole ({answer.finish_reason})", err=True)


def _print(pieces: Pieces, *, silent: bool) -> Answer:
    """Print the pieces, and the end of the line however they end."""
    begun, terminal = False, sys.stdout.isatty()
    try:
        for piece in pieces:
            if isinstance(piece, Answer):
                return piece
            if not silent:
                begun = True
                click.echo(_harmless(piece) if terminal else piece, nl=False)
    finally:
        if begun:
            click.echo()
    raise Broken("the answer was broken off")


def _harmless(text: str) -> str:
    """Without what a terminal would obey: a picture may have made the model write it."""
    return "".join(c for c in text if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))


def load(names: tuple[str, ...]) -> list[Picture]:
    """The files, or standard input for ``-``. Raises Failed."""
    if names.count("-") > 1:
        raise Failed("standard input has one picture only", code=2)
    pictures = []
    for name in names:
        try:
            data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        except OSError as error:
            raise Failed(f"{name}: {error.strerror}", code=2) from None
        pictures.append(Picture.named(name, data))
    return pictures
