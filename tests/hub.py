"""A stand-in for ModelScope and Hugging Face on 127.0.0.1, which can't be reached from here.

It speaks what ``modelscope_hub`` and ``huggingface_hub`` ask for to download a model, and answers
as the true ones were seen to by others: the listing has a hash of every file; an unknown revision
has no files, which is no error to ModelScope; weights are redirected to where ranges are honoured,
small files come whole whatever is asked for. It can be told to fail. As a program, for a directory
or several:

    python -m tests.hub PORT Owner/Name=DIRECTORY ... [--rate BYTES_PER_SECOND]
    MODELSCOPE_ENDPOINT=http://127.0.0.1:PORT QWENVL_MODEL=Owner/Name ...
    HF_ENDPOINT=http://127.0.0.1:PORT QWENVL_MODEL=hf:Owner/Name ...
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
    what every answer has instead, ``token`` what Hugging Face's must be asked with.
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
    token: str = ""
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
        hugging = re.fullmatch(r"(/cdn)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path)
        file = hugging[4] if hugging else query.get("FilePath", "")
        self.hub.requests.append(Request(url.path, file, self._start(), dict(self.headers)))
        if self.hub.status is not None:
            self._json({"Message": "told to", "Success": False}, self.hub.status)
        elif url.path == "/api/v1/repos/internalAccelerationInfo":
            self._json({"Data": {"InternalRegionQueryAddress": ""}})
        elif match := re.fullmatch(r"(/cdn)?/api/v1/models/([^/]+/[^/]+)/repo(/files)?", url.path):
            self._model(match[2], query.get("Revision", "master"), file if not match[3] else None)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", url.path):
            self._hugging_listing(match[1], match[3], tree=match[2] == "tree")
        elif hugging:
            self._hugging_file(hugging[2], hugging[3], file)
        else:
            self._json({"Message": "no such thing"}, 404)

    def do_HEAD(self) -> None:
        """Of Hugging Face's files, which only the client's own download asks for."""
        _, owner, model, _, revision, file = self.path.split("/", 5)
        directory = self._hugging(f"{owner}/{model}", revision)
        assert directory is not None
        path, weights = directory / file, file.endswith(".safetensors")
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit(directory))
        self.send_header("ETag", f'"{_sha256(path) if weights else git_id(path)}"')
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()

    def _hugging_listing(self, name: str, revision: str, tree: bool) -> None:
        """Of a tree as the client's own download asks for it. No token, no model."""
        directory = self._hugging(name, revision)
        if not any(name == model for model, _ in self.hub.models):
            self._json({"error": "Invalid username or password."}, 401, "RepoNotFound")
        elif self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._json({"error": "Access is restricted."}, 401, "GatedRepo")
        elif directory is None:
            self._json({"error": "Invalid rev id"}, 404, "RevisionNotFound")
        else:
            files = [self._hugging_entry(directory, file) for file in self._files(directory)]
            body = {"id": name, "sha": commit(directory), "siblings": files}
            self._json(files if tree else body)

    def _hugging_entry(self, directory: Path, file: dict[str, Any]) -> dict[str, Any]:
        """As of a listing, and as of a tree."""
        path, size = file["Path"], file["Size"]
        oid = git_id(directory / path) if file["Sha256"] else "0" * 40
        lfs = {"sha256": file["Sha256"], "oid": file["Sha256"], "size": size, "pointerSize": 134}
        return {
            **{"rfilename": path, "path": path, "type": "file"},
            **{"size": size, "blobId": oid, "oid": oid},
            "lfs": lfs if file.get("IsLFS") else None,
        }

    def _hugging_file(self, name: str, revision: str, file: str) -> None:
        directory = self._hugging(name, revision)
        if directory is None or not (directory / file).is_file():
            self._json({"error": "Entry not found"}, 404, "EntryNotFound")
        elif file.endswith(".safetensors") and not self.path.startswith("/cdn"):
            self._redirect(f"http://localhost:{self.hub.port}/cdn{self.path}", directory / file)
        else:
            self._send(directory / file, self._start() if self.path.startswith("/cdn") else 0)

    def _hugging(self, name: str, revision: str) -> Path | None:
        """Where a branch, a tag or a commit lies."""
        for (model, known), directory in self.hub.models.items():
            if model == name and revision in (known, commit(directory)):
                return directory
        return None

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

    def _json(self, body: Any, status: int = 200, error_code: str = "") -> None:
        if isinstance(body, dict):
            body = {"Code": status, "Success": status == 200} | body
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if error_code:
            self.send_header("X-Error-Code", error_code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _redirect(self, location: str, path: Path) -> None:
        self.send_response(302)
        self.send_header("Location", quote(location, safe=":/?&=%"))
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


def commit(directory: Path) -> str:
    """Hugging Face's, of what lies there."""
    return hashlib.sha1(str(directory).encode()).hexdigest()


def git_id(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


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
        {
            (name, branch): Path(directory)
            for name, directory in models.items()
            for branch in ("master", "main")
        },
    )


if __name__ == "__main__":
    main()
