from __future__ import annotations

import torch
from PIL import Image

from qwenvl_app.engine.prefix_cache import Prefix, PrefixCache, image_key


def prefix(kilobytes: int) -> Prefix:
    return Prefix(1, [(torch.zeros(128 * kilobytes), torch.zeros(128 * kilobytes))])


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(3 * 1024)
    for name in (b"a", b"b", b"c"):
        cache.put(name, prefix(1))
    assert cache.get(b"a")
    cache.put(b"d", prefix(1))
    assert cache.get(b"b") is None
    assert cache.peek(b"a")
    assert cache.peek(b"c")
    assert cache.bytes == 3 * 1024
    assert (cache.hits, cache.misses) == (1, 1)


def test_the_budget_holds_whatever_is_put():
    cache = PrefixCache(3 * 1024)
    cache.put(b"a", prefix(2))
    cache.put(b"a", prefix(1))
    assert cache.bytes == 1024
    cache.put(b"too large", prefix(4))
    assert len(cache) == 1
    cache.put(b"b", prefix(3))
    assert cache.peek(b"a") is None
    assert cache.bytes == 3 * 1024
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_what_a_waiting_request_holds_stays_and_counts():
    """It was dropped, held all the same, and counted no longer: as much again came beside it."""
    cache = PrefixCache(3 * 1024)
    for name in (b"a", b"b", b"c"):
        cache.put(name, prefix(1))
    held = cache.get(b"a"), cache.peek(b"b")
    cache.put(b"d", prefix(2))  # for which only one could go
    assert cache.peek(b"d") is None
    assert (len(cache), cache.bytes) == (2, 2 * 1024)
    cache.put(b"a", prefix(1))
    assert cache.peek(b"a") is held[0]
    assert cache.clear() == 0
    assert cache.bytes == 2 * 1024
    del held
    cache.put(b"d", prefix(2))
    assert cache.peek(b"d")
    assert cache.bytes == 3 * 1024
    assert cache.clear() == 3 * 1024
    assert (len(cache), cache.bytes) == (0, 0)


def test_room_is_made_before_a_copy_is():
    cache = PrefixCache(3 * 1024)
    for name in (b"a", b"b"):
        cache.put(name, prefix(1))
    assert not cache.make_room(4 * 1024)
    assert len(cache) == 2
    assert cache.make_room(2 * 1024)
    assert cache.bytes == 1024
    assert cache.peek(b"a") is None


def test_a_budget_of_0_keeps_nothing():
    cache = PrefixCache(0)
    cache.put(b"a", prefix(1))
    assert len(cache) == 0


def test_the_key_is_of_pixels_shape_mode_and_settings():
    """A key of the bytes alone took a picture of 2 x 8 for one of 4 x 4 (CVE-2025-46722)."""
    pictures = [
        Image.new("RGB", (4, 4)),
        Image.new("RGB", (2, 8)),
        Image.new("RGB", (8, 2)),
        Image.new("L", (12, 4)),
        Image.new("RGB", (4, 4), "red"),
    ]
    assert len({image_key(picture, "salt") for picture in pictures}) == 5
    assert image_key(pictures[0], "a") != image_key(pictures[0], "b")
    assert image_key(pictures[0], "a") == image_key(Image.new("RGB", (4, 4)), "a")


def test_the_key_is_of_the_whole_picture():
    """It is read in strips."""
    for row in (0, 255, 256, 599):
        picture = Image.new("RGB", (3, 600))
        before = image_key(picture, "")
        picture.putpixel((2, row), (0, 0, 1))
        assert image_key(picture, "") != before
