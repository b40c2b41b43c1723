"""python ask.py PICTURE QUESTION: with requests; asks again while the service is busy."""

import os
import sys
import time
from pathlib import Path

import requests

URL = os.environ.get("QWENVL_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("QWENVL_API_KEY", "none")


def ask(picture: Path, question: str) -> str:
    for _ in range(6):
        with picture.open("rb") as file:
            response = requests.post(
                f"{URL}/v1/image/recognize",
                headers={"Authorization": f"Bearer {KEY}"},
                files={"image": (picture.name, file, "image/*")},
                data={"prompt": question},
                timeout=150,  # a little longer than the service's own request_timeout_s
            )
        if response.status_code not in (429, 503):
            break
        time.sleep(int(response.headers.get("Retry-After", 1)))
    if not response.ok:
        raise SystemExit(f"{response.status_code}: {response.json()['detail']}")
    return response.json()["result"]


if __name__ == "__main__":
    print(ask(Path(sys.argv[1]), sys.argv[2]))
