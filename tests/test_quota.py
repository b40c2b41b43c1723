"""Requests of one key's owner, in one process and in several that share a directory."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from qwenvl_app.errors import KeyLimit
from qwenvl_app.service.quota import Quota


@pytest.mark.parametrize("shared", [False, True])
def test_an_owner_has_so_many_and_no_more(tmp_path: Path, shared: bool):
    quota = Quota(2, tmp_path if shared else None)
    for _ in range(2):
        with ExitStack() as held:
            for _ in range(2):
                held.enter_context(quota.hold("a"))
            with pytest.raises(KeyLimit), quota.hold("a"):
                pass
            with quota.hold("b"), quota.hold(None):
                pass


def test_it_holds_for_all_workers_together(tmp_path: Path):
    one, other = Quota(2, tmp_path), Quota(2, tmp_path)
    with one.hold("a"):
        with other.hold("a"), pytest.raises(KeyLimit), one.hold("a"):
            pass
        with other.hold("a"):
            pass
