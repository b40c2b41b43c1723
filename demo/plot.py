"""The learning curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_curve(log: Path, target: Path) -> None:
    """Draw loss and validation accuracy over minutes from a training log (JSON lines)."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for stage in sorted({row["stage"] for row in rows}):
        points = [(r["minutes"], r["loss"]) for r in rows if r["stage"] == stage and "loss" in r]
        if points:
            left.plot(*zip(*points, strict=True), label=stage, linewidth=0.8)
    left.set(xlabel="minutes", ylabel="loss", yscale="log", title="training loss")
    left.legend()
    checks = [(r["minutes"], r["validation"]) for r in rows if "validation" in r]
    for kind in sorted(checks[-1][1]) if checks else ():
        errors = [max(1 - shares[kind], 1e-4) for _, shares in checks]
        style = {"color": "black", "linewidth": 2.0} if kind == "all" else {"linewidth": 0.8}
        right.plot([minutes for minutes, _ in checks], errors, label=kind, **style)
    right.set(
        xlabel="minutes", ylabel="share of wrong answers", yscale="log", title="fresh pictures"
    )
    right.legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
