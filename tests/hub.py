"""A stand-in for ModelScope on 127.0.0.1, which can't be reached from here.

It speaks what ``modelscope_hub`` asks for to download a model, and answers as the true one was seen
to by others: the listing has a hash of every file; an unknown revision has no files, which is no
error; weights are redirected to where ranges are honoured, small files come whole whatever is asked
for. It can be told to fail. As a program, for a directory or several:

    python -m tests.hub PORT Owner/Name=DIRECTORY ... [--rate BYTES_PER_SECOND]
    MODELSCOPE_ENDPOINT=http://127.0.0.1:PORT QWENVL_MODEL=Owner/Name ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, urlsplit

from safetensors.torch import load_file, save_file

from qwenvl_app.loading.checkpoint import DEMO

NAME = "Org/Some-Model.v1"
SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
UNWANTED = ["README.md", "modeling_evil.py", "pytorch_model.bin", "onnx/config.json"]
COMMITS = ("5a1f7c0e00000000000000000000000000000001", "5a1f7c0e00000000000000000000000000000002")
_PIECE = 16 * 1024


class Request(NamedTuple):
    """What was asked: ``path`` without its query, the first byte of a range, all headers."""

    path: str
    file: str
    start: int
    headers: dict[str, str]


def publish(directory: Path) -> Path:
    """The embedded model in three shards, as large ones come, and files that nobody needs."""
    shutil.copytree(DEMO, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: SHARDS[number * 3 // len(names)] for number, name in enumerate(names)}
    for file in SHARDS:
        part = {name: tensors[name] for name in names if weight_map[name] == file}
        save_file(part, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "onnx").mkdir()
    for file in UNWANTED:
        (directory / file).write_text("not to be downloaded")
    return directory


@dataclass
class Hub:
    """The server, on a thread of its own and one for every connection; ``close`` ends it.

    What may be set at any time: ``cut`` has the bytes after which the connection is cut, once each,
    ``stall`` a file that stops in its middle until ``close``, ``spoiled`` files whose first byte is
    wrong, ``announced`` lengths that are not true, ``listed`` paths that are not there, ``status``
    what every answer has instead.
    """

    port: int = 0
    rate: float | None = None
    models: dict[tuple[str, str], Path] = field(default_factory=dict)  # by name and revision
    requests: list[Request] = field(default_factory=list)
    cut: dict[str, list[int]] = field(default_factory=dict)
    stall: str = ""
    spoiled: set[str] = field(default_factory=set)
    announced: dict[str, int] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    status: int | None = None
    sent: dict[str, int] = field(default_factory=dict)  # bytes of each file, all in all

    def __post_init__(self) -> None:
        self.closed = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        """Any number of times."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()  # waits for the connections' threads
        self._thread.join()

    def asked(self, file: str) -> list[int]:
        """Where the requests for the bytes of ``file`` began."""
        return [r.start for r in self.requests if r.file == file and "/cdn/" in r.path]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        file = query.get("FilePath", "")
        self.hub.requests.append(Request(url.path, file, self._start(), dict(self.headers)))
        if self.hub.status is not None:
            self._json({"Message": "told to", "Success": False}, self.hub.status)
        elif url.path == "/api/v1/repos/internalAccelerationInfo":
            self._json({"Data": {"InternalRegionQueryAddress": ""}})
        elif match := re.fullmatch(r"(/cdn)?/api/v1/models/([^/]+/[^/]+)/repo(/files)?", url.path):
            self._model(match[2], query.get("Revision", "master"), file if not match[3] else None)
        else:
            self._json({"Message": "no such thing"}, 404)

    def _model(self, name: str, revision: str, file: str | None) -> None:
        """The listing, or ``file``."""
        directory = self.hub.models.get((name, revision))
        cdn = self.path.startswith("/cdn")
        if not any(name == model for model, _ in self.hub.models):
            self._json({"Code": 10010205001, "Message": "no such model"}, 404)
        elif file is None:
            self._json({"Data": {"Files": directory and self._files(directory)}})
        elif directory is None or not (directory / file).is_file():
            self._json({"Code": 10990101007, "Message": "no such file"}, 404)
        elif file.endswith(".safetensors") and not cdn:
            self._redirect(f"/cdn{self.path}", directory / file)
        else:
            self._send(directory / file, self._start() if cdn else 0)

    def _start(self) -> int:
        ranged = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        return int(ranged[1]) if ranged else 0

    def _json(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps({"Code": status, "Success": status == 200} | body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _redirect(self, location: str, path: Path) -> None:
        self.send_response(302)
        self.send_header("Location", quote(location, safe="/?&=%"))
        self.send_header("X-Linked-ETag", f'"{_sha256(path)}"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _files(self, directory: Path) -> list[dict[str, Any]]:
        paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
        return [
            {
                "CommittedDate": 1760000000 + number,
                "IsLFS": path.suffix == ".safetensors",
                "Name": path.name,
                "Path": str(path.relative_to(directory)),
                "Revision": COMMITS[number == len(paths) - 1],
                "Sha256": _sha256(path),
                "Size": self.hub.announced.get(path.name, path.stat().st_size),
                "Type": "blob",
            }
            for number, path in enumerate(paths)
        ] + [{"Path": path, "Type": "blob", "Size": 1, "Sha256": ""} for path in self.hub.listed]

    def _send(self, path: Path, start: int) -> None:
        """What follows ``start``."""
        data = path.read_bytes()
        if path.name in self.hub.spoiled:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        position = start
        cuts = self.hub.cut.get(path.name, [])
        end = cuts.pop(0) if cuts else len(data)
        try:
            while position < end and not self.hub.closed.is_set():
                piece = data[position : min(position + _PIECE, end)]
                self.wfile.write(piece)
                position += len(piece)
                self.hub.sent[path.name] = self.hub.sent.get(path.name, 0) + len(piece)
                if self.hub.rate:
                    time.sleep(len(piece) / self.hub.rate)
                if path.name == self.hub.stall and position > len(data) / 2:
                    self.wfile.flush()
                    self.hub.closed.wait()
        except OSError:  # the client has gone
            pass
        self.close_connection = True


_hashes: dict[tuple[Path, float], str] = {}


def _sha256(path: Path) -> str:
    key = (path, path.stat().st_mtime)
    if key not in _hashes:
        _hashes[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _hashes[key]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("models", nargs="+", metavar="Owner/Name=DIRECTORY")
    parser.add_argument("--rate", type=float)
    arguments = parser.parse_args()
    models = dict(pair.split("=", 1) for pair in arguments.models)
    Hub(
        arguments.port,
        arguments.rate,
        {(name, "master"): Path(directory) for name, directory in models.items()},
    )


if __name__ == "__main__":
    main()
