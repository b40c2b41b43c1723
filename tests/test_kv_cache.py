from __future__ import annotations

import pytest
import torch

from qwenvl_app.engine.kv_cache import BLOCK, SlotCache
from qwenvl_app.engine.layout import Layout

CPU = torch.device("cpu")
LAYOUT = Layout(heads=2, head_dim=3, dtype=torch.float32, devices=(CPU, CPU))


def write(cache: SlotCache, rows, starts, widths, layer=0, value=1.0):
    mask = cache.begin(rows, starts, widths)
    new = torch.full((len(rows), 2, max(widths), 3), value)
    return mask, *cache.update(new, new + 0.5, layer)


def test_a_token_takes_what_the_layout_says():
    cache = SlotCache(LAYOUT)
    assert LAYOUT.token_bytes == 2 * 2 * 2 * 3 * 4
    cache.fit(2, 5)
    assert cache.bytes == 2 * BLOCK * LAYOUT.token_bytes


def test_it_grows_in_blocks_keeps_what_it_holds_and_shrinks():
    cache = SlotCache(LAYOUT)
    cache.fit(1, BLOCK)
    write(cache, [0], [0], [BLOCK], value=7.0)
    cache.fit(3, BLOCK + 1)
    assert cache.bytes == 3 * 2 * BLOCK * LAYOUT.token_bytes
    cache.fit(2, 2 * BLOCK + 1)  # not three rows of that
    assert cache.bytes == 2 * 3 * BLOCK * LAYOUT.token_bytes
    cache.fit(3, 2 * BLOCK)
    assert cache.save(0, BLOCK)[0][0].eq(7).all()
    assert cache.save(2, 2 * BLOCK)[0][0].eq(0).all()
    cache.fit(2, BLOCK)  # not much less: it stays
    assert cache.bytes == 6 * BLOCK * LAYOUT.token_bytes
    cache.fit(1, BLOCK)
    assert cache.bytes == BLOCK * LAYOUT.token_bytes
    assert cache.save(0, BLOCK)[0][0].eq(7).all()
    cache.fit(3, 9 * BLOCK)
    cache.fit(0, 0)
    assert cache.bytes == 0
    cache.fit(4, BLOCK)
    cache.fit(0, 0)  # too little to be worth it
    assert cache.bytes == 4 * BLOCK * LAYOUT.token_bytes


def test_it_holds_no_more_than_it_may():
    """Neither what rounding adds nor what nobody needs any more, however little that is."""
    cache = SlotCache(LAYOUT)
    cache.fit(1, BLOCK + 1, most=200)
    assert cache.bytes == 200 * LAYOUT.token_bytes
    write(cache, [0], [0], [BLOCK + 1], value=7.0)
    cache.fit(3, BLOCK + 2, most=3 * BLOCK + 60)
    assert cache.bytes == 3 * (BLOCK + 20) * LAYOUT.token_bytes
    cache.fit(1, BLOCK + 1, most=3 * BLOCK + 60)  # not much less: it stays
    assert cache.bytes == 3 * (BLOCK + 20) * LAYOUT.token_bytes
    cache.fit(1, BLOCK + 1, most=2 * BLOCK)
    assert cache.bytes == 2 * BLOCK * LAYOUT.token_bytes
    assert cache.save(0, BLOCK + 1)[0][0].eq(7).all()
    cache.fit(0, 0, most=BLOCK)
    assert cache.bytes == 0


@pytest.mark.parametrize(("most", "sides"), [(15, (3, 3)), (16, (4, 4))])
def test_a_roomy_one_has_sides_of_powers_of_two_where_it_may_hold_so_much(most, sides):
    cache = SlotCache(LAYOUT, roomy=20 * BLOCK)
    cache.fit(3, 3 * BLOCK - 1, most=most * BLOCK)
    assert cache.bytes == sides[0] * sides[1] * BLOCK * LAYOUT.token_bytes


def test_a_row_that_has_no_memory_yet_has_nothing_to_be_moved():
    cache = SlotCache(LAYOUT)
    cache.fit(1, 4)
    write(cache, [0], [0], [4], value=3.0)
    cache.move(1, 0)
    assert cache.save(0, 4)[0][0].eq(3).all()


def test_rows_of_different_lengths_in_one_decode_step():
    cache = SlotCache(LAYOUT)
    cache.fit(3, 10)
    for row, length in enumerate((4, 2, 6)):
        write(cache, [row], [0], [length], value=float(row + 1))
    mask, keys, values = write(cache, [0, 1, 2], [4, 2, 6], [1, 1, 1], value=9.0)
    assert keys.shape == (3, 2, 7, 3)
    assert mask[:, 0, 0].int().tolist() == [
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    assert keys[:, 0, :, 0].tolist()[1][:3] == [2, 2, 9]
    assert values[2, 1, :, 2].tolist() == [3.5] * 6 + [9.5]


def test_a_chunk_behind_what_is_there_sees_all_of_its_own_row():
    cache = SlotCache(LAYOUT)
    cache.fit(3, 10)
    write(cache, [2], [0], [3], value=1.0)
    write(cache, [0], [0], [1], value=5.0)
    mask, keys, _ = write(cache, [2, 0], [3, 1], [2, 1], value=2.0)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 2, 2]
    assert keys[1, 0, :2, 0].tolist() == [5, 2]
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # What pads the shorter row was not written.
    assert cache.save(0, 3)[0][0][0, :, 0].tolist() == [5, 2, 0]


def test_rows_side_by_side_and_equally_long_are_written_in_one_go():
    """And what pads the shorter one lies behind its end, where the next token goes."""
    cache = SlotCache(LAYOUT)
    cache.fit(4, 10)
    write(cache, [1, 2], [0, 0], [3, 2], value=1.0)
    mask, keys, _ = write(cache, [1, 2], [3, 2], [1, 1], value=2.0)  # in two goes: other places
    assert keys[:, 0, :, 0].tolist() == [[1, 1, 1, 2], [1, 1, 2, 0]]
    assert mask[:, 0, 0].int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    _, keys, _ = write(cache, [1, 2, 3], [3, 3, 3], [2, 1, 2], value=3.0)
    assert keys[:, 1, :, 2].tolist() == [[1, 1, 1, 3, 3], [1, 1, 2, 3, 3], [0, 0, 0, 3, 3]]
    assert cache.save(0, 10)[0][0].eq(0).all()


def test_a_first_chunk_need_not_be_read_back():
    cache = SlotCache(LAYOUT)
    cache.fit(2, 4)
    cache.begin([1, 0], [0, 0], [3, 2])
    new = torch.rand(2, 2, 3, 3)
    keys, values = cache.update(new, new, 1)
    assert keys is new
    assert values is new
    assert torch.equal(cache.save(0, 2)[1][0], new[1, :, :2])


def test_move_clear_save_and_restore():
    cache = SlotCache(LAYOUT)
    cache.fit(3, 4)
    write(cache, [2], [0], [4], value=3.0)
    cache.move(2, 0)
    assert cache.save(0, 4)[0][0].eq(3).all()
    kept = cache.save(0, 2)
    cache.clear(0)
    assert cache.save(0, 4)[0][0].eq(0).all()
    assert kept[0][0].eq(3).all()
    cache.restore(1, kept)
    assert cache.save(1, 4)[0][1][0, :, 0].tolist() == [3.5, 3.5, 0, 0]


@pytest.mark.parametrize("sides", [(3, 3 * BLOCK), (1, BLOCK)])
@pytest.mark.parametrize("place", range(4))
def test_where_memory_ran_out_the_same_call_goes_on(monkeypatch, sides, place):
    cache = SlotCache(LAYOUT)
    cache.fit(2, 2 * BLOCK)
    for layer in (0, 1):
        write(cache, [0, 1], [0, 0], [BLOCK, BLOCK], layer, value=7.0)
    real, calls = torch.Tensor.new_zeros, []

    def new_zeros(*arguments):
        calls.append(arguments)
        if len(calls) == place + 1:
            raise torch.OutOfMemoryError
        return real(*arguments)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    with pytest.raises(torch.OutOfMemoryError):
        cache.fit(*sides, most=3 * BLOCK if sides[0] == 1 else 9 * BLOCK)
    cache.fit(*sides, most=3 * BLOCK if sides[0] == 1 else 9 * BLOCK)
    assert len(calls) == 5
    assert cache.bytes == sides[0] * sides[1] * LAYOUT.token_bytes
    for keys, values in cache.save(0, BLOCK):
        assert keys.eq(7).all()
        assert values.eq(7.5).all()


@pytest.mark.parametrize("rows", [0, 2])
def test_shrinking_to_what_it_is_changes_nothing(rows):
    cache = SlotCache(LAYOUT)
    cache.fit(rows, 4)
    before = cache.bytes
    cache.fit(rows, 4)
    assert cache.bytes == before
