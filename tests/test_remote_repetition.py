"""An upstream's answer that repeats itself for ever is ended from here."""

from __future__ import annotations

import random

import pytest

from qwenvl_app.backends.remote.repetition import Repetition
from qwenvl_app.testing import ScriptedBackend
from tests.remote import fronted, served
from tests.waiting import until

CHAT = "/v1/chat/completions"
PASSAGE = "The same line, again.\n"


def noticed(pieces: list[str], limit: int) -> int | None:
    """After how many pieces, if ever."""
    watch = Repetition(limit)
    return next((n for n, piece in enumerate(pieces, 1) if watch.add(piece)), None)


@pytest.mark.parametrize("size", [1, 3, 7, len(PASSAGE), 50])
def test_however_it_is_cut_into_pieces(size: int):
    text = "A page that begins well. " + PASSAGE * 500
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    after = noticed(pieces, 8 * len(PASSAGE))
    assert after is not None
    assert after * size <= len("A page that begins well. ") + (8 * len(PASSAGE) + 32) * size


def test_a_table_is_no_repetition():
    numbers = random.Random(0)
    rows = [f"| {numbers.randrange(100)} | yes | no |\n" for _ in range(400)]
    assert noticed([*"".join(rows)], 512) is None


def test_eight_times_are_needed_and_zero_is_never():
    assert noticed([*"abcdefgh" * 8], 64) == 64
    assert noticed([*"abcdefghi" * 20], 64) is None  # nine: 64 have it seven times
    assert noticed(["a"] * 1000, 0) is None


@pytest.mark.parametrize("stream", [False, True])
def test_it_is_ended_and_the_upstream_stops(stream: bool):
    endless = ScriptedBackend(*["no "] * 20_000)
    endless.apart_s = 0.0005
    with (
        served(endless, QWENVL_REPETITION_LIMIT="0") as url,
        fronted(url, QWENVL_REPETITION_LIMIT="64") as (app, _),
    ):
        asked = {"messages": [{"role": "user", "content": "read"}], "stream": stream}
        answer = app.test_client().post(CHAT, json=asked)
        assert answer.status_code == 200
        assert answer.text.count("no ") < 200
        answer.close()
        assert 'finished_reason="repetition"} 1.0' in app.test_client().get("/metrics").text
        until(lambda: endless.generations[0].cancelled)
