"""Rows of figures: which ones, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

Row = dict[str, Any]


def names(rows: list[Row]) -> list[str]:
    """The contenders, in the order in which they were measured."""
    return list(dict.fromkeys(row["name"] for row in rows))


def pick(rows: list[Row], part: str, **where: Any) -> list[Row]:
    """The rows of ``part`` that have those values."""
    return [
        row
        for row in rows
        if row["part"] == part and all(row.get(key) == value for key, value in where.items())
    ]


def values(rows: list[Row], key: str) -> list[Any]:
    """All different values, in order."""
    return list(dict.fromkeys(row[key] for row in rows))


def rate(rows: list[Row], unit: str) -> float:
    """``unit`` ("answered" or "tokens") a second: the median of the blocks."""
    return float(statistics.median(row[unit] / row["seconds"] for row in rows))


def ratio(ours: list[Row], theirs: list[Row], of: Callable[[Row], float]) -> float:
    """Ours over theirs, the median of the blocks that both have."""
    blocks = {row.get("block"): of(row) for row in theirs}
    pairs = [of(row) / blocks[row.get("block")] for row in ours if row.get("block") in blocks]
    return statistics.median(pairs)


def centiles(values: list[float]) -> tuple[float, float, float]:
    """p50, p95 and p99. Raises IndexError for none."""
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return float(p50), float(p95), float(p99)
