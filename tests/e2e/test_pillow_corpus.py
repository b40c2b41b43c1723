"""A share of Pillow's own pictures through the real server and the real model."""

from __future__ import annotations

import pytest

from tests.corpus import pillow_images
from tests.e2e.server import Server
from tests.wire import END, GOOD, PROMPT, part, post


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_tenth_file_of_pillows_own_tests(pytestconfig, server: Server):
    worker = server.worker
    statuses = set()
    for index, (name, data) in enumerate(pillow_images(pytestconfig)):
        if index % 10 == 0 and len(data) < 19 * 2**20:
            status = post(server.port, part("image", data, "a", "image/png") + PROMPT + END).status
            assert status in (200, 400, 413), name
            statuses.add(status)
    assert statuses >= {200, 400}
    assert post(server.port, GOOD).body == b'{"status":"success","result":"circle"}'
    assert server.worker == worker
