"""The same tests on each device that is there: always the CPU, and a GPU where torch sees one.

What needs a GPU is marked ``gpu``, and where there is none it is not collected. Models have the
real architecture's layout and random weights; on a GPU its real width too.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl_app.engine.fused import fuse
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.loading.load import load
from tests import real_shape
from tests.engines import spread
from tests.gpu.pretend import Gpus, pretend

DEVICES: list[Any] = ["cpu"]
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))

Tell = Callable[[str], None]
_told = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if torch.cuda.is_available():
        gpu = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    else:
        why = "torch sees none" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"
        gpu = f"none ({why}); what wants one was not run, on the CPU one is pretended"
    terminalreporter.section("tests/gpu: measured, to compare and to report")
    for line in (f"GPU: {gpu}", *terminalreporter.config.stash.get(_told, [])):
        terminalreporter.write_line(line)


@pytest.fixture(scope="module")
def wild() -> LoadedModel:
    """Small, and without a taste for any token."""
    return spread(load("demo"), layers=2)


@pytest.fixture
def gpus() -> Iterator[Gpus]:
    """Two that are pretended."""
    with pretend() as gpus:
        yield gpus


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Adds a line to the end of the report."""
    lines = request.config.stash.setdefault(_told, [])
    return lambda line: lines.append(f"{request.node.name}: {line}")


@pytest.fixture(params=DEVICES, scope="session")
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Convolutions of ``generate`` are computed in full precision, as the engine's product is."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    assert not torch.backends.cuda.matmul.allow_tf32  # torch's default, and the service's
    yield torch.device(request.param)
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="session")
def directory(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint; on a GPU 4 GB of it."""
    width = 4096 if device.type == "cuda" else 128
    try:
        return real_shape.make(tmp_path_factory.mktemp("gpu") / "shape", width=width, depth=6)
    except OSError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def half(directory: Path, device: torch.device) -> LoadedModel:
    """In bfloat16, as it is stored; greedy, so that tokens can be compared."""
    return greedy(load(str(directory), device=device.type))


@pytest.fixture(scope="session")
def exact(directory: Path, device: torch.device) -> LoadedModel:
    """The same weights in float32."""
    return greedy(load(str(directory), device=device.type, dtype="float32"))


@pytest.fixture(scope="session")
def fused(exact: LoadedModel) -> LoadedModel:
    """``exact`` as the service has it."""
    model = copy.deepcopy(exact.model)
    fuse(model)
    return dataclasses.replace(exact, model=model)


def greedy(loaded: LoadedModel) -> LoadedModel:
    loaded.model.generation_config.do_sample = False
    return loaded
