"""Ask a running service and count right answers: ``python -m demo.evaluate --url http://...``.

Two parts. The easy-VQA package's test split, 9,673 questions about 1,000 pictures that no training
step has seen, each answer compared as a whole. And Chinese questions about fresh pictures of 64 to
1,024 pixels, saved as PNG, JPEG, WebP and BMP; the whole sentence must be right.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import easy_vqa
import requests
from tqdm import tqdm

from demo.questions import chinese_question
from demo.scenes import draw, encode

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
FRESH_SEED = 7_000_001  # of none of the pictures in training or validation
_COLORS_AND_SHAPES = {"what color": "color", "what shape": "shape", "what is the color": "color"}
_local = threading.local()


class Case(NamedTuple):
    """One question over HTTP and the answer that counts as right."""

    kind: str
    image: bytes
    image_type: str
    prompt: str
    expected: str


def package_cases() -> Iterator[Case]:
    """The package's test split, by kind of question."""
    paths = easy_vqa.get_test_image_paths()
    images = {number: Path(path).read_bytes() for number, path in paths.items()}
    for text, answer, number in zip(*easy_vqa.get_test_questions(), strict=True):
        yield Case(package_kind(text), images[number], "image/png", text, answer)


def package_kind(text: str) -> str:
    """Colour, shape, or which sort of yes/no."""
    for start, kind in _COLORS_AND_SHAPES.items():
        if text.startswith(start):
            return kind
    if text.startswith("what is the"):
        return "shape"
    about = "color" if " shape" in text else "shape"
    negated = " not " in text or "is no " in text
    return f"yes/no {about}{' negated' if negated else ''}"


def chinese_cases(pictures: int = 200, questions: int = 8) -> Iterator[Case]:
    """Fresh square pictures, sizes from 64 to 1,024 pixels, formats in turn."""
    rng = random.Random(FRESH_SEED)
    for number in range(pictures):
        side = round(64 * 16 ** rng.random())
        file_format = FORMATS[number % len(FORMATS)]
        image, scene = draw(rng, side, side)
        data = encode(image, file_format, rng)
        for _ in range(questions):
            question = chinese_question(rng, scene)
            yield Case(
                f"zh {question.kind}",
                data,
                f"image/{file_format.lower()}",
                question.text,
                question.answer,
            )


def ask(url: str, case: Case) -> str:
    """The service's answer, or its status and body if that is not 200."""
    if not hasattr(_local, "session"):
        _local.session = requests.Session()
    response = _local.session.post(
        f"{url}/v1/image/recognize",
        files={"image": ("picture", case.image, case.image_type)},
        data={"prompt": case.prompt},
        timeout=60,
    )
    if response.status_code != 200:
        return f"{response.status_code} {response.text}"
    return str(response.json()["result"])


def evaluate(url: str, cases: list[Case], clients: int, title: str, answered: list[str]) -> float:
    """Ask everything, print a table by kind and the first wrong answers; the share of right.

    All answers are appended to ``answered``, in the order of ``cases``.
    """
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    wrong: dict[str, list[str]] = defaultdict(list)
    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        answers = pool.map(lambda case: ask(url, case), cases)
        for case, answer in zip(cases, tqdm(answers, total=len(cases), desc=title), strict=True):
            total[case.kind] += 1
            answered.append(answer)
            if answer == case.expected:
                right[case.kind] += 1
            else:
                wrong[case.kind].append(f"{case.prompt} -> {answer}  (right: {case.expected})")
    seconds = time.monotonic() - began
    for kind in sorted(total):
        share = right[kind] / total[kind]
        print(f"{kind:24} {right[kind]:6} of {total[kind]:6}  {share:8.2%}")
        for line in wrong[kind][:3]:
            print(f"    {line}")
    share = right.total() / total.total()
    print(f"{title:24} {right.total():6} of {total.total():6}  {share:8.2%}")
    print(f"{len(cases) / seconds:.1f} questions/s with {clients} client(s)")
    return share


def main() -> None:
    """Parse the command line; exit 1 if a share is below its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--limit", type=int, help="ask only this many, taken evenly, of each part")
    parser.add_argument("--save", type=Path, help="write all answers to this file, a line each")
    arguments = parser.parse_args()
    failed, answered = False, []
    for title, cases, bar in (
        ("easy-VQA test split", list(package_cases()), 0.998),
        ("Chinese, fresh pictures", list(chinese_cases()), 0.99),
    ):
        if arguments.limit:
            step = max(1, len(cases) // arguments.limit)
            cases[:] = cases[::step][: arguments.limit]
        failed |= evaluate(arguments.url, cases, arguments.clients, title, answered) < bar
    if arguments.save:
        arguments.save.write_text("".join(f"{text!r}\n" for text in answered), encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main()
