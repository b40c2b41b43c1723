"""``benchmarks.gpu``, which is for a machine that nobody can look at while it runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts
from benchmarks.gpu_bench import Bench, Report, pretended
from benchmarks.shapes import Shape
from qwenvl_app.loading.checkpoint import find
from qwenvl_app.loading.footprint import estimate
from tests.e2e.server import ROOT


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    shape = Shape(128, 2, 2, 512 * 512)
    report, late = Report(tmp_path / "found.json"), time.monotonic() + 100
    return Bench("cpu", shape, shape, tmp_path, report, None, late, (1,), 4, (0.01, 0.02))


def test_the_published_shape_takes_no_room_on_the_disk(tmp_path):
    directory = Shape().write(tmp_path / "8b")
    assert sum(file.stat().st_blocks * 512 for file in directory.iterdir()) < 2**21
    need = estimate(find(str(directory)), "auto", 12e6, cpu=False)
    assert 17e9 < need.weights < 18e9
    assert need.kv_token == 36 * 2 * 8 * 128 * 2


def test_a_part_that_fails_is_told_and_the_next_one_comes(bench, monkeypatch, capsys):
    monkeypatch.setattr(gpu_parts, "steps", lambda *_: 1 / 0, raising=True)
    monkeypatch.setattr(gpu_parts.steps, "__name__", "steps")
    gpu.group("eager", bench)
    found = json.loads((bench.folder / "found.json").read_text())
    assert found["failed"] == {"eager: steps": "ZeroDivisionError('division by zero')"}
    assert found["time to first token, s"]["0.02 MP"] > 0
    assert found["transformers' generate"]["ms a token, 1 row"]
    assert "skipped" in found["memory"]
    assert "[time to first token, s] 0.02 MP" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_on_a_pretended_gpu(bench):
    with pretended() as gpus:
        there = dataclasses.replace(bench, device="pretended", meter=gpus)
        loaded = there.moved(there.model(there.shape))
        gpu_parts.memory(there, loaded)
        gpu_parts.running_out(there, loaded)
    found = there.report.found
    assert found["memory"]["4 of the largest at once took, MiB"] > 1
    same = [text for name, text in found["running out of memory"].items() if name[:4] == "with"]
    assert same == ["memory; then the same answer: True"] * 3


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("device", ["cpu", "pretended"])
def test_all_of_it(device, tmp_path):
    """But for inductor, which test_compiled.py has."""
    file = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--device", device]
    command += ["--json", str(file), "--groups", "equivalence", "eager", "graphs", "http"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    found = json.loads(file.read_text())
    assert "failed" not in found
    assert found["equivalence in float32"] == {
        f"compile={mode}": "16 equal, 0 tie, 0 differ" for mode in ("off", "auto")
    }
    assert found["steps, compile=auto"]["1 rows, ms a step"] > 0
    graphs = "6 in use, 0 failed" if device == "pretended" else "0 in use, 0 failed"
    assert found["steps, compile=auto"]["CUDA graphs"] == graphs
    assert found["http"]["requests/s"] > 0
