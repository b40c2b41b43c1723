"""``make bench`` at its smallest: it asks, and tables and plots come out."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as bench
from benchmarks.serving import parts, tables
from benchmarks.serving.asking import Question, Sample, noise
from benchmarks.serving.contenders import Peer, over_chat
from benchmarks.serving.load import arrivals, at_random, clients_at_once
from benchmarks.serving.rows import ratio
from tests.e2e.server import Server

APP = "tests.e2e.scripted_app:app"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("scripted") / "log"
    with Server(log, APP, QWENVL_MAX_WAITING="64") as server:
        server.wait()
        yield server.url


def question(tokens: int = 4) -> Question:
    return noise(random.Random(), 8, tokens)


def test_tables_and_plots(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Only a peer, a scripted one, so that no model is loaded."""

    def peers_only(stack: object, checkpoint: str, settings: object, urls: dict[str, str]):
        return [over_chat(name, url) for name, url in urls.items()]

    monkeypatch.setattr(bench, "all_of", peers_only)
    monkeypatch.setattr(bench, "write_checkpoint", lambda folder: None)
    page = tmp_path / "RESULTS.md"
    page.write_text(f"# By hand\n\n{tables.BEGIN}\nold\n{tables.END}\n\n## By hand too\n")
    command = ["--smallest", "--into", str(tmp_path), "--peers", f"scripted={url},{url}"]
    bench.main(command)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# By hand\n\n<!--")
    assert text.endswith("-->\n\n## By hand too\n")
    assert "old" not in text
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert {row["part"] for row in rows} == {*parts.DEMO, *parts.LONG}
    assert not any(row.get("failed") for row in rows)
    for title in ("Requests and tokens", "Piece by piece", "Arrivals", "Pictures", "CPU and mem"):
        assert f"### {title}" in text
    assert "8 wrong, 0 failed" in text  # it knows no easy-VQA
    drawn = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert drawn == ["clients.svg", "first.svg", "load.svg", "pixels.svg", "tokens.svg"]
    for name in drawn:
        assert f"](plots/{name})" in text
        assert "scripted" in (tmp_path / "plots" / name).read_text(encoding="utf-8")
    bench.main([*command, "--again"])
    assert page.read_text(encoding="utf-8") == text


def test_pieces_are_timed_and_processes_found(url: str):
    service = over_chat("scripted", url)
    asked = question(tokens=5)
    sample = service.ask(asked, stream=True)
    assert (sample.error, sample.tokens, len(sample.pieces)) == ("", 5, 5)
    assert list(sample.pieces) == sorted(sample.pieces)
    assert sample.per_token is not None
    whole = service.ask(asked, stream=False)
    assert (whole.text, whole.per_token, len(whole.pieces)) == (sample.text, None, 1)
    cpu, resident = service.used()
    assert cpu > 0.1
    assert resident and resident > 20


def test_what_is_refused_is_counted(url: str):
    asked = [question()._replace(prompt="fail"), question()]
    row = clients_at_once(over_chat("scripted", url), asked, 1, stream=False)
    assert (row["answered"], row["failed"], len(row["whole_ms"])) == (1, 1, 1)
    assert row["errors"][0].startswith("500")


def test_who_comes_at_random_waits_for_nobody():
    """A server that answers the first one only after the third has come."""
    came: list[int] = []

    class Slow:
        name = "slow"

        def ask(self, question: Question, *, stream: bool) -> Sample:
            came.append(1)
            for _ in range(1000):
                if len(came) >= 3:
                    return Sample((0.1,), 1)
                time.sleep(0.01)
            return Sample((), 0, error="nobody else came")

        def used(self) -> tuple[float, float | None]:
            return 0.0, None

    row = at_random(Slow(), [question() for _ in range(3)], [0.0, 0.01, 0.02])
    assert (row["answered"], row["failed"]) == (3, 0)


def test_arrivals_have_their_rate():
    times = list(islice(arrivals(random.Random(0), 50.0), 5000))
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] == pytest.approx(100, rel=0.05)  # 3.5 standard deviations
    slower = list(islice(arrivals(random.Random(0), 5.0), 5000))
    assert slower == pytest.approx([10 * at for at in times])


def test_ratios_are_of_pairs():
    ours = [{"block": 0, "x": 4.0}, {"block": 1, "x": 1.0}, {"block": 2, "x": 9.0}]
    theirs = [{"block": 0, "x": 2.0}, {"block": 1, "x": 2.0}, {"block": 2, "x": 3.0}]
    assert ratio(ours, theirs, lambda row: row["x"]) == 2.0


def test_a_peer_that_is_none_is_told(url: str):
    for text in ("x", "x=http://127.0.0.1:1", "=a,b", "x=,"):
        with pytest.raises(ValueError):
            Peer.parse(text)
    assert Peer.parse("x=,http://127.0.0.1:1/") == ("x", "", "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="x at http"):
        over_chat("x", "http://127.0.0.1:1")
