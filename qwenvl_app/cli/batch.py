"""``qwenvl batch``: many questions, as many at once as the server answers."""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from qwenvl_app.cli import batch_source
from qwenvl_app.cli.answers import Broken, Failed, Refused
from qwenvl_app.cli.batch_output import Output
from qwenvl_app.cli.batch_source import Item
from qwenvl_app.cli.client import Client, Picture
from qwenvl_app.cli.patience import Patience

_USUAL_SLOTS = 4  # where the server does not tell: what the documented interface promises
_LARGEST = 2**30  # no service takes more, and all that are under way are in memory


class Work:
    """A source's questions, those that the output has answers to left out. Raises Failed."""

    def __init__(self, source: Path, target: Path, prompt: str | None, *, retry_failed: bool):
        self.items = batch_source.load(source, prompt)
        if target.exists() and target.samefile(source):
            raise Failed(f"{target}: the answers need a file of their own", code=2)
        self.output = Output(target)
        try:
            self.output.check(self.items)
            if retry_failed:
                self.output.forget_failed()
        except BaseException:
            self.output.close()
            raise
        known = self.output.answered | self.output.failed
        self.left = [item for item in self.items if str(item.id) not in known]

    def run(self, client: Client, concurrency: int, patience: float) -> None:
        """Ask what is left, so much at once; 0 is what the server says. ``patience`` in seconds.

        Raises Failed where going on makes no sense, and KeyboardInterrupt.
        """
        team = _Team(client, self, patience)
        try:
            team.run(concurrency or team.patience.slots() or _USUAL_SLOTS)
        finally:
            team.stop.set()

    def end(self) -> int:
        """Close the output, so that no line is torn; say how it went; the exit status."""
        self.output.close()
        failed = sum(str(item.id) in self.output.failed for item in self.items)
        done = sum(str(item.id) in self.output.answered for item in self.items)
        rest = len(self.items) - done - failed
        said = f"qwenvl: {done} of {len(self.items)} answered, {failed} failed"
        said += f", {rest} left: the same command goes on" if rest else ""
        said += ": --retry-failed asks those again" if failed and not rest else ""
        click.echo(said, err=True)
        return 1 if failed or rest else 0


class _Team:
    """Threads that ask. They are daemons: Ctrl-C waits for no answer."""

    def __init__(self, client: Client, work: Work, patience: float):
        self.stop = threading.Event()
        self.patience = Patience(client, patience, self.stop)
        self._items, self._output = iter(work.left), work.output
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        count, already = len(work.items), len(work.items) - len(work.left)
        # Silent where stderr is no terminal.
        self._bar = tqdm(total=count, initial=already, disable=None, unit="picture", leave=False)

    def run(self, count: int) -> None:
        """Until nothing is left, or one of them has found that going on makes no sense."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        with closing(self._bar):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if self._failure:
            raise self._failure

    def _work(self) -> None:
        try:
            while not self.stop.is_set():
                with self._lock:
                    item = next(self._items, None)
                if item is None:
                    return
                result = self._result(item)
                if result is None:
                    return
                self._output.add(item, result)
                with self._lock:
                    self._bar.update()
        except BaseException as failure:  # raised again where the team is waited for
            with self._lock:
                self._failure = self._failure or failure
            self.stop.set()

    def _result(self, item: Item) -> dict[str, Any] | None:
        """What the output is to have of it; None if the batch ended first. Raises Failed."""
        try:
            if item.path.stat().st_size > _LARGEST:
                return {"error": "the file is larger than 1 GiB"}
            picture = Picture.named(item.image, item.path.read_bytes())
        except OSError as error:
            return {"error": error.strerror or "it can't be read"}
        try:
            return asdict(self.patience.ask(picture, item.prompt))
        except (Refused, Broken) as error:
            return None if self.stop.is_set() else {"error": str(error)}
