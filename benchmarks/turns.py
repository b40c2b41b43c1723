"""What a second turn about a picture waits for its first token: ``python -m benchmarks.turns``.

Over HTTP, from a connection that is there: each turn sends the picture again, which is decoded and
compared, and what was computed for the turn before is used. The bar is a tenth of the first turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.checkpoints import write_checkpoint
from benchmarks.streams import ASKED, data_url
from tests.e2e.server import Server


def turn(connection: HTTPConnection, messages: list[dict[str, Any]]) -> tuple[float, str]:
    """Milliseconds to the first token's event, and the answer."""
    asked = {"messages": messages, "temperature": 0, "max_tokens": 16, "stream": True}
    head = {"Content-Type": "application/json"}
    began, first, text = time.perf_counter(), 0.0, ""
    connection.request("POST", "/v1/chat/completions", json.dumps(asked), head)
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            piece = json.loads(line[6:])["choices"][0]["delta"].get("content")
            if piece and not text:
                first = 1000 * (time.perf_counter() - began)
            text += piece or ""
    return first, text


def main() -> None:
    """Ask about pictures that nobody has seen, and then again."""
    options = argparse.ArgumentParser()
    options.add_argument("--edge", type=int, default=1024, help="of the pictures, in pixels")
    options.add_argument("--rounds", type=int, default=9)
    chosen = options.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model")
        environ = {"QWENVL_MODEL": str(Path(folder) / "model"), "QWENVL_REPETITION_LIMIT": "0"}
        with Server(Path(folder) / "log", **environ) as server:
            server.wait()
            connection = HTTPConnection("127.0.0.1", server.port)
            pairs = []
            for number in range(chosen.rounds + 1):
                url = data_url(rng, chosen.edge)
                shown = {"type": "image_url", "image_url": {"url": url}}
                content = [shown, {"type": "text", "text": ASKED}]
                messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
                first, text = turn(connection, messages)
                messages.append({"role": "assistant", "content": text})
                messages.append({"role": "user", "content": "and what else?"})
                second, _ = turn(connection, messages)
                if number:  # the first of all finds nothing warm
                    pairs.append((first, second))
            connection.close()
    first, second = (statistics.median(each) for each in zip(*pairs, strict=True))
    share = statistics.median(later / earlier for earlier, later in pairs)
    sys.stdout.write(f"first turn {first:.0f} ms, second {second:.0f} ms, share {share:.3f}\n")


if __name__ == "__main__":
    main()
