from __future__ import annotations

import random

import pytest
import torch
from PIL import Image

from qwenvl_app.engine.prefix_cache import Prefix, PrefixCache, Segment, Text, image_key

KIB = 1024


def text(words: str, *pictures: tuple[int, bytes]) -> Text:
    """A token a character."""
    return Text.of([ord(each) for each in words], pictures)


def named(name: str) -> Text:
    """Long enough to be worth keeping."""
    return text(name * 20)


def segment(of: Text, kilobytes: int = 1, parent: Segment | None = None) -> Segment:
    half = torch.zeros(128 * kilobytes)
    return Segment(of, [(half, half.clone())], parent)


def found(cache: PrefixCache, name: str) -> Prefix | None:
    return cache.peek(named(name + name))


def test_the_least_recently_used_goes_first():
    cache = PrefixCache(3 * KIB)
    for name in "abc":
        cache.put(segment(named(name)))
    assert cache.get(named("aa"))
    cache.put(segment(named("d")))
    assert cache.get(named("bb")) is None
    assert found(cache, "a")
    assert found(cache, "c")
    assert cache.bytes == 3 * KIB
    assert (cache.hits, cache.misses) == (1, 1)


def test_the_budget_holds_whatever_is_put():
    cache = PrefixCache(3 * KIB)
    cache.put(segment(named("a")))
    assert cache.bytes == KIB
    cache.put(segment(named("b"), 4))  # too large
    assert len(cache) == 1
    cache.put(segment(named("b"), 3))
    assert found(cache, "a") is None
    assert cache.bytes == 3 * KIB
    cache.clear()
    assert (len(cache), cache.bytes) == (0, 0)


def test_what_a_waiting_request_holds_stays_and_counts():
    """It was dropped, held all the same, and counted no longer: as much again came beside it."""
    cache = PrefixCache(3 * KIB)
    for name in "abc":
        cache.put(segment(named(name)))
    held = cache.get(named("aa")), found(cache, "b")
    cache.put(segment(named("d"), 2))  # for which only one could go
    assert found(cache, "d") is None
    assert (len(cache), cache.bytes) == (2, 2 * KIB)
    assert cache.clear() == 0
    assert cache.bytes == 2 * KIB
    del held
    cache.put(segment(named("d"), 2))
    assert found(cache, "d")
    assert cache.bytes == 3 * KIB
    assert cache.clear() == 3 * KIB
    assert (len(cache), cache.bytes) == (0, 0)


def test_room_is_made_before_a_copy_is():
    cache = PrefixCache(3 * KIB)
    for name in "ab":
        cache.put(segment(named(name)))
    assert not cache.make_room(4 * KIB)
    assert len(cache) == 2
    assert cache.make_room(2 * KIB)
    assert cache.bytes == KIB
    assert found(cache, "a") is None


def test_a_budget_of_0_keeps_nothing():
    cache = PrefixCache(0)
    cache.put(segment(named("a")))
    assert len(cache) == 0


def test_what_others_go_on_from_is_dropped_after_them():
    cache = PrefixCache(3 * KIB)
    root = segment(named("a"))
    cache.put(root)
    for name in "xy":
        cache.put(segment(text("a" * 20 + name * 20), 1, root))
    del root
    cache.put(segment(named("b")))
    assert cache.bytes == 3 * KIB
    kept = cache.peek(text("a" * 20 + "y" * 21))
    assert kept.length == 40
    assert [each.start for each in kept.last.chain()] == [0, 20]
    assert cache.peek(text("a" * 20 + "x" * 21)).length == 20
    del kept
    assert cache.clear() == 3 * KIB


def test_a_prefix_is_the_longest_and_leaves_a_token_to_be_computed():
    cache = PrefixCache(10 * KIB)
    root = segment(named("a"))
    cache.put(root)
    cache.put(segment(text("a" * 20 + "b" * 20), 1, root))
    assert cache.get(text("a" * 20 + "b" * 10 + "c" * 20)).length == 30
    assert cache.get(text("a" * 20)).length == 19
    assert cache.get(text("a" * 15 + "b")) is None  # not worth it
    assert cache.get(text("b" * 50)) is None


def test_what_can_not_be_cut_is_taken_as_a_whole():
    cache = PrefixCache(10 * KIB, whole=True)
    root = segment(named("a"))
    cache.put(root)
    cache.put(segment(text("a" * 20 + "b" * 20), 1, root))
    assert cache.get(text("a" * 20 + "b" * 10 + "c" * 20)).length == 20
    assert cache.get(text("a" * 20 + "b" * 20 + "c")).length == 40
    assert cache.get(text("a" * 20 + "b" * 20)).length == 20
    assert cache.get(text("a" * 20)) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "length"),
    [
        (text("abc"), text("abd"), 2),
        (text("abc"), text("abcd"), 3),
        (text(".__.", (1, b"x")), text(".__.", (1, b"x")), 4),
        (text(".__.", (1, b"x")), text(".__.", (1, b"y")), 1),
        (text(".____", (1, b"x"), (3, b"y")), text(".____", (1, b"x"), (3, b"z")), 3),
        (text(".____", (1, b"x"), (3, b"y")), text(".____", (1, b"x")), 3),
        (text(".___", (1, b"x")), text(".___", (2, b"x")), 1),
        (text("a__", (1, b"x")), text("b__", (1, b"x")), 0),  # the same picture after another text
    ],
)
def test_a_picture_counts_by_its_key_and_by_all_before_it(ours, theirs, length):
    assert ours.common(theirs) == theirs.common(ours) == length


def test_a_key_is_never_found_behind_another_history():
    """Random trees: what is found is the longest common prefix of all that was put."""
    rng = random.Random(4)
    for _ in range(50):
        cache, put = PrefixCache(2**20), []
        for _ in range(12):
            words = "".join(rng.choice("ab") * rng.choice((9, 17)) for _ in range(4))
            of = text(words, (rng.randrange(20, 30), rng.choice((b"x", b"y"))))
            best = max((min(each.common(of), len(words) - 1) for each in put), default=0)
            prefix = cache.get(of)
            picture = best > of.pictures[0][0]
            assert (prefix.length if prefix else 0) == (best if best >= 16 or picture else 0)
            base = cache.base(of)
            cache.put(segment(of, 1, base))
            put.append(of)


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


def test_only_what_begins_alike_is_compared(monkeypatch):
    """A small model keeps thousands, and the engine's thread looked through all of them."""
    cache = PrefixCache(2000 * KIB)
    for number in range(1000):
        cache.put(segment(text("head" + "p" * 30, (4, b"%d" % number))))
    compared = []
    whole = Text.common

    def common(self: Text, other: Text) -> int:
        compared.append(other)
        return whole(self, other)

    monkeypatch.setattr(Text, "common", common)
    prefix = cache.get(text("head" + "p" * 30 + "and more", (4, b"500")))
    assert prefix is not None
    assert prefix.length == 34
    assert len(compared) == 1


def test_nothing_is_left_of_what_was_dropped():
    cache = PrefixCache(3 * KIB)
    for number in range(100):
        cache.put(segment(text("head" + "p" * 30, (4, b"%d" % number))))
    assert len(cache) == 3
    assert sum(map(len, cache._alike.values())) == len(cache._alike) == 3
