"""The service as its clients see it: questions about pictures, over HTTP."""

from __future__ import annotations

import base64
import json
import mimetypes
import threading
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests
from requests.auth import AuthBase

from qwenvl_app.cli import answers
from qwenvl_app.cli.answers import Answer, Broken, Failed

ROUTE = "/v1/image/recognize"
CHAT = "/v1/chat/completions"
_CONNECT_S = 10.0

Pieces = Generator[str | Answer, None, None]


class Picture(NamedTuple):
    """A file's bytes, and a type, of which the service checks ``image/`` only."""

    data: bytes
    kind: str

    @classmethod
    def named(cls, name: str, data: bytes) -> Picture:
        """The type goes by the name; where that tells none, the content decides all the same."""
        kind = mimetypes.guess_type(name)[0] or ""
        return cls(data, kind if kind.startswith("image/") else "image/unknown")


class _Bearer(AuthBase):
    """A header of the session would give way to what ~/.netrc has for the host."""

    def __init__(self, key: str):
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Client:
    """Asks one server. Any number of threads; each has a connection of its own.

    ``timeout``: seconds without a byte. ``fields``: more of them, for every question.
    ``environment``: whether its proxies count. Raises Failed for what is no URL, and in any method
    where trying again would not help.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        timeout: float,
        fields: Mapping[str, str] | None = None,
        *,
        environment: bool = True,
    ) -> None:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise Failed(f"{url} is no URL such as http://127.0.0.1:8000", code=2)
        if key and not (key.isascii() and key.isprintable()):
            raise Failed("the key has characters that no header may have", code=2)
        self.url = url.rstrip("/").removesuffix("/v1")
        self._auth = _Bearer(key) if key else None
        self._timeout, self._environment = timeout, environment
        self._fields = dict(fields or {})
        self._local = threading.local()

    def ask(self, picture: Picture, prompt: str) -> Answer:
        """The answer in one piece. Raises Refused and Broken."""
        with self._send("POST", ROUTE, **self._form(picture, prompt)) as response:
            return answers.recognized(response)

    def stream(self, picture: Picture, prompt: str) -> Pieces:
        """Pieces as they come, then the answer. Raises Refused and Broken.

        Closing the iterator closes the connection, which frees the place on the server.
        """
        accept = {"Accept": "text/event-stream"}
        with self._send("POST", ROUTE, headers=accept, **self._form(picture, prompt)) as response:
            yield from answers.pieces(response)

    def chat(self, pictures: list[Picture], prompt: str, model: str = "") -> Pieces:
        """As ``stream``, through OpenAI's route: any number of pictures, any server that has it."""
        content = [*map(_part, pictures), {"type": "text", "text": prompt}]
        asked = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        more = {name: _value(text) for name, text in self._fields.items()}
        with self._send("POST", CHAT, json=asked | more) as response:
            yield from answers.chunks(response)

    def models(self) -> list[str]:
        """The names of the models that are served. Raises Refused and Broken."""
        with self._send("GET", "/v1/models") as response:
            listed = answers.read(response).get("data") or ()
            return [str(each.get("id")) for each in listed]

    def status(self) -> tuple[str, str]:
        """The server's phase and its message; empty where it has none. Raises Broken."""
        with self._send("GET", "/readyz") as response:
            told = answers.json_object(answers.body(response))
            return str(told.get("phase", "")), str(told.get("message", ""))

    def slots(self) -> int:
        """Answers that the server writes at once; 0 if it does not say. Raises Broken."""
        with self._send("GET", "/metrics") as response:
            for line in answers.body(response).decode(errors="replace").splitlines():
                name, _, value = line.partition(" ")
                if name == "qwenvl_batch_slots":
                    return int(float(value))
        return 0

    def _form(self, picture: Picture, prompt: str) -> dict[str, Any]:
        text = prompt.encode(errors="replace")  # an argument of the command line may be no Unicode
        # Not under the file's own name: nobody needs it there, and not every name can be sent.
        file = ("picture", picture.data, picture.kind)
        return {"files": {"image": file}, "data": {"prompt": text} | self._fields}

    def _send(self, method: str, path: str, **more: Any) -> requests.Response:
        """An answer whose body is still to be read."""
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.auth, session.trust_env = self._auth, self._environment
        more |= {"stream": True, "timeout": (_CONNECT_S, self._timeout), "allow_redirects": False}
        try:
            response = session.request(method, self.url + path, **more)
        except requests.exceptions.SSLError as error:
            raise Failed(f"no secure connection to {self.url}: {answers.why(error)}") from None
        except (requests.ConnectionError, requests.Timeout, OSError) as error:
            if isinstance(error, requests.exceptions.InvalidURL):
                raise Failed(f"{self.url} is no URL that can be asked", code=2) from None
            raise Broken.of(error) from None
        if response.is_redirect:
            raise Failed(f"{self.url} redirects to {response.headers['Location']}: ask there")
        return response


def _value(text: str) -> Any:
    """A number or the like if it is one in JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _part(picture: Picture) -> dict[str, Any]:
    data = f"data:{picture.kind};base64,{base64.b64encode(picture.data).decode()}"
    return {"type": "image_url", "image_url": {"url": data}}
