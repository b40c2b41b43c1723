"""The decode step as CUDA graphs, of the model's own code and compiled, against ``generate``."""

from __future__ import annotations

import shutil

import pytest

from qwenvl_app.errors import InternalError
from tests.engines import agrees, finish, generate, running
from tests.gpu.conftest import Tell
from tests.gpu.test_equivalence import CLOSE, requests

pytestmark = pytest.mark.timeout(600)
NO_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs g++")


@pytest.mark.slow  # on a CPU; on a GPU `make test-gpu` runs it
@pytest.mark.parametrize("mode", ["auto", pytest.param("on", marks=NO_COMPILER)])
def test_every_token_also_after_a_step_that_failed(
    exact, fused, device, mode, monkeypatch, tell: Tell
):
    """After a failing step the cache is at other addresses: no graph of before may be replayed."""
    asked = requests(11, 8)
    solos = [generate(exact, each) for each in asked]
    with running(fused, compile=mode) as engine:
        for last in (False, True):
            sequences = [engine.submit(each) for each in asked]
            for sequence in sequences:
                finish(sequence)
            verdicts = [agrees(s, solo, CLOSE) for s, solo in zip(sequences, solos, strict=True)]
            assert False not in verdicts
            assert verdicts.count(None) <= 1
            recorded = engine.stats().cuda_graphs
            assert not engine.stats().cuda_graph_failures
            tell(f"{recorded} graphs recorded, {verdicts.count(True)} of {len(verdicts)} equal")
            assert bool(recorded) == (device.type == "cuda")
            if not last:
                with monkeypatch.context() as patched:
                    patched.setattr(engine._runner, "prefill", lambda *_: 1 / 0)
                    with pytest.raises(InternalError):
                        list(engine.submit(asked[0]))
