"""Over a thousand pictures nobody here made: an answer for each, soon, and nothing left behind."""

from __future__ import annotations

import time
from collections import Counter
from itertools import islice

import psutil
import pytest

from qwenvl_app.errors import BadRequest, TooLarge
from qwenvl_app.images.decode import decode_image
from tests.corpus import pillow_images
from tests.wire import END, GOOD, MULTIPART, PROMPT, ROUTE, part

SLOW = 20  # seconds for one file, of which the largest has a few megapixels


@pytest.mark.timeout(900)
@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_every_file_of_pillows_own_tests(pytestconfig, client, backend, every: int):
    statuses: Counter[int] = Counter()
    process = psutil.Process()
    before = process.memory_info().rss
    for name, data in islice(pillow_images(pytestconfig), 0, None, every):
        started = time.monotonic()
        body = part("image", data, "a", "image/png") + PROMPT + END
        response = client.post(ROUTE, data=body, content_type=MULTIPART)
        assert response.status_code in (200, 400, 413), name
        if response.status_code == 413 and len(body) < 20 * 2**20:
            assert "百万像素的限制" in response.json["detail"], name
        statuses[response.status_code] += 1
        try:
            image = decode_image(data, max_megapixels=50)
            assert image.mode == "RGB", name
            assert image.size == backend.requests[0].images[0].size, name
        except (BadRequest, TooLarge) as error:
            assert response.json == {"detail": error.detail} or response.status_code == 413, name
        backend.requests.clear()
        assert time.monotonic() - started < SLOW, name
    assert statuses.total() > 1000 // every
    assert statuses[200] > 300 // every
    assert statuses[400] > 300 // every
    assert process.memory_info().rss - before < 300 * 2**20
    assert client.post(ROUTE, data=GOOD, content_type=MULTIPART).status_code == 200
