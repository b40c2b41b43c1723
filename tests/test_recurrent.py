"""The states of recurrent layers; that answers are right, ``test_families.py`` shows."""

from __future__ import annotations

import torch

from qwenvl_app.engine.kv_cache import BLOCK
from qwenvl_app.engine.layout import Layout, StateShape
from qwenvl_app.engine.recurrent import RecurrentCache

CPU = torch.device("cpu")
# Layers 0 and 2 are recurrent; layer 1 has keys and values.
STATES = tuple(StateShape(layer, (5, 4), (2, 3, 6), torch.float32, CPU) for layer in (0, 2))
LAYOUT = Layout(heads=2, head_dim=3, dtype=torch.float32, devices=(CPU,), states=STATES)
A_ROW = 2 * 4 * (5 * 4 + 2 * 3 * 6)


def read(cache: RecurrentCache, rows: list[int], start: int, value: float, width: int = 3) -> None:
    """What a call of the model does to the cache."""
    cache.begin(rows, [start] * len(rows), [width] * len(rows))
    for layer in (0, 2):
        cache.update_conv_state(torch.full((len(rows), 5, width), value), layer)
        matrices = cache.get_recurrent_state(layer)
        cache.update_recurrent_state(matrices + value, layer)
    new = torch.full((len(rows), 2, width, 3), value)
    cache.update(new, new, 1)


def states(cache: RecurrentCache, row: int) -> list[float]:
    """The latest input, and one number of the matrices."""
    cache.begin([row], [1], [1])
    inputs, matrices = cache.get_conv_state(2)[0], cache.get_recurrent_state(2)[0]
    return [inputs[0, -1].item(), matrices[0, 0, 0].item()]


def test_memory_is_that_of_tokens_and_rows():
    cache = RecurrentCache(LAYOUT)
    assert cache.bytes == 0
    cache.fit(3, 5)
    assert cache.bytes == LAYOUT.bytes(3 * BLOCK, 3) == 3 * (BLOCK * 48 + A_ROW)
    assert LAYOUT.tokens_in(2 * A_ROW + 480, 2) == 10
    assert LAYOUT.tokens_in(A_ROW, 2) == 0
    cache.fit(0, 0)  # the tokens are too few to be worth it, but states are large
    assert cache.bytes == 3 * BLOCK * 48


def test_old_inputs_come_before_new_ones():
    cache = RecurrentCache(LAYOUT)
    cache.fit(1, 10)
    read(cache, [0], 0, 7.0, width=2)
    cache.begin([0], [2], [3])
    inputs = cache.update_conv_state(torch.full((1, 5, 3), 8.0), 0)
    assert inputs[0, 0].tolist() == [0, 0, 7, 7, 8, 8, 8]
    assert cache.get_conv_state(0)[0, 0].tolist() == [7, 8, 8, 8]


def test_rows_are_kept_moved_saved_and_restored():
    cache = RecurrentCache(LAYOUT)
    cache.fit(2, 10)
    read(cache, [0], 0, 1.0)
    read(cache, [1], 0, 2.0)
    cache.fit(4, 10)  # they stay when others come
    with cache.kept([1]):
        read(cache, [0, 1], 3, 5.0, width=1)
    assert states(cache, 0) == [5, 6]
    assert states(cache, 1) == [2, 2]
    saved = cache.save(0, 3)
    cache.move(1, 0)
    assert states(cache, 0) == [2, 2]
    cache.restore(3, saved)
    assert states(cache, 3) == [5, 6]
    assert torch.equal(cache.save(3, 3)[0][0], saved[0][0])


def test_a_row_that_has_no_memory_yet_has_nothing_to_be_moved():
    cache = RecurrentCache(LAYOUT)
    cache.fit(3, 10)
    cache.fit(0, 0)  # of states nothing is left, and of keys and values something
    cache.move(2, 0)
    cache.fit(1, 10)
    read(cache, [0], 0, 1.0)
    assert states(cache, 0) == [1, 1]


def test_matrices_that_stay_are_not_copied_for_it(monkeypatch):
    """They were, for each row that was being prefilled, and beside the budget."""
    cache = RecurrentCache(LAYOUT)
    cache.fit(3, 10)
    read(cache, [0, 1, 2], 0, 1.0)
    copied: list[int] = []
    real = torch.Tensor.clone

    def clone(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.numel())
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", clone)
    with cache.kept([0, 2]):
        read(cache, [0, 1, 2], 3, 5.0, width=1)
    assert copied == [5 * 4] * 4
    assert [states(cache, row) for row in range(3)] == [[1, 1], [5, 6], [1, 1]]


def test_who_takes_a_row_over_begins_anew():
    """Also where the numbers of the one before were not finite."""
    cache = RecurrentCache(LAYOUT)
    cache.fit(1, 10)
    read(cache, [0], 0, float("nan"))
    read(cache, [0], 0, 3.0)
    assert states(cache, 0) == [3, 3]
