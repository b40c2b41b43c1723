"""How far the loading of weights is: transformers' progress bar, told in sentences.

A bar drawn with carriage returns is noise in a log, and a probe can't read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as bars


@contextmanager
def told(say: Callable[[str], None]) -> Iterator[None]:
    """Within the block, call ``say`` for every tensor that transformers loads, and draw no bar.

    The hook is transformers' own and global: one load at a time.
    """

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return factory(*(_count(items, say) for items in args[:1]), **kwargs)

    drawn = bars.is_progress_bar_enabled()
    # The factory is now one that draws nothing.
    bars.disable_progress_bar()  # type: ignore[no-untyped-call]
    before = bars.set_tqdm_hook(hook)
    try:
        yield
    finally:
        bars.set_tqdm_hook(before)
        if drawn:
            bars.enable_progress_bar()  # type: ignore[no-untyped-call]


def _count(items: Iterable[Any], say: Callable[[str], None]) -> Iterator[Any]:
    everything = list(items)
    for number, item in enumerate(everything):
        say(f"loading the weights: {number} of {len(everything)} tensors")
        yield item
