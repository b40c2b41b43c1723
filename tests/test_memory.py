from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qwenvl_app.engine.memory import _limits, free_memory, gpu_memory


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("/system.slice/qwenvl.service", [700, 5000]),
        ("/", []),  # in a container: the root has no limit of its own here
        ("/system.slice", [5000]),
        ("", []),
        ("/gone/meanwhile", []),
    ],
)
def test_limits_of_every_group_on_the_way(tmp_path: Path, own: str, expected: list[int]):
    """A unit's MemoryMax was not seen, since only the root of the tree was looked at."""
    for path, most, used in (
        ("system.slice", "9000", "4000"),
        ("system.slice/qwenvl.service", "1000", "300"),
        ("system.slice/other.service", "10", "10"),
        ("user.slice", "max", "1"),
    ):
        (tmp_path / path).mkdir(exist_ok=True)
        (tmp_path / path / "memory.max").write_text(most + "\n")
        (tmp_path / path / "memory.current").write_text(used + "\n")
    assert _limits(tmp_path, own) == expected


def test_files_that_were_read_do_not_count_as_used(tmp_path: Path):
    """17 GB of weights, just read, left no room for a KV cache under a unit's MemoryMax."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("990\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 600\nactive_file 90\n")
    assert _limits(tmp_path, "/") == [610]


def test_this_machine_has_some():
    assert free_memory(torch.device("cpu")) > 2**20
    assert gpu_memory([torch.device("cpu")]) == {}
