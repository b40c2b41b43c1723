"""Multipart bodies and HTTP requests, built and read byte by byte."""

from __future__ import annotations

import io
import socket
from typing import NamedTuple

from PIL import Image, ImageDraw

ROUTE = "/v1/image/recognize"
BOUNDARY = "X-BOUNDARY-X"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
END = f"--{BOUNDARY}--\r\n".encode()


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


def part(
    name: str | None, value: bytes, filename: str | None = None, content_type: str | None = None
) -> bytes:
    """One part of a multipart body, headers and all."""
    head = f"--{BOUNDARY}\r\nContent-Disposition: form-data"
    if name is not None:
        head += f'; name="{name}"'
    if filename is not None:
        head += f'; filename="{filename}"'
    head += "\r\n"
    if content_type is not None:
        head += f"Content-Type: {content_type}\r\n"
    return head.encode() + b"\r\n" + value + b"\r\n"


def picture(
    shape: str = "circle",
    color: str = "blue",
    size: tuple[int, int] = (64, 64),
    file_format: str = "PNG",
) -> bytes:
    """A coloured shape on a pale background, as a file."""
    width, height = size
    color = {"green": "lime"}.get(color, color)  # Pillow's green is half as bright as easy-VQA's
    image = Image.new("RGB", size, (250, 245, 240))
    box = [width // 4, height // 4, width * 3 // 4, height * 3 // 4]
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, fill=color)
    elif shape == "rectangle":
        pen.rectangle([width // 4, height // 3, width * 3 // 4, height * 3 // 5], fill=color)
    else:
        corners = [(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])]
        pen.polygon(corners, fill=color)
    return encode(image, file_format)


def encode(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


PNG = picture()
IMAGE = part("image", PNG, "a.png", "image/png")
PROMPT = part("prompt", b"what is the blue shape?")
GOOD = IMAGE + PROMPT + END


def exchange(port: int, request: bytes, timeout: float = 30) -> Answer:
    """Send bytes to 127.0.0.1 and read one answer, up to the closing of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(request)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Answer(int(first.split()[1]), headers, body)


def post(port: int, body: bytes, content_type: str | None = MULTIPART, path: str = ROUTE) -> Answer:
    return send(port, "POST", path, body, content_type)


def send(
    port: int, method: str, path: str, body: bytes = b"", content_type: str | None = None
) -> Answer:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
    if content_type is not None:
        head += f"Content-Type: {content_type}\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    return exchange(port, head.encode() + body)


def receive(connection: socket.socket, *, head_only: bool = False) -> Answer | None:
    """Read one answer and no more from a connection; None if it was closed instead."""
    stream = connection.makefile("rb", buffering=0)
    lines: list[str] = []
    while (line := stream.readline()) != b"\r\n":
        if not line:
            assert not lines, lines
            return None
        lines.append(line.decode("latin-1").strip())
    headers = {}
    for text in lines[1:]:
        name, _, value = text.partition(":")
        headers[name.lower()] = value.strip()
    body, missing = b"", 0 if head_only else int(headers.get("content-length", 0))
    while len(body) < missing:
        piece = stream.read(missing - len(body))
        assert piece, "cut off"
        body += piece
    return Answer(int(lines[0].split()[1]), headers, body)
