"""One small answer before the first: it pays for what is made at the first use, and is a test."""

from __future__ import annotations

from PIL import Image

from qwenvl_app.engine.engine import Engine
from qwenvl_app.errors import ModelLoadError, ServiceError, Unavailable
from qwenvl_app.generation import GenerationRequest, SamplingParams, question


def warm_up(engine: Engine) -> None:
    """Let ``engine`` write four tokens about a small picture. Blocks.

    Raises ModelLoadError if it can't, above all because its numbers are not finite: the weights of
    a damaged checkpoint look like any others.
    """
    picture = Image.new("RGB", (64, 64), "white")
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True)
    try:
        for _ in engine.submit(GenerationRequest(question(picture, "?"), "warm-up", sampling)):
            pass
    except Unavailable:
        raise ModelLoadError(
            "there is no memory left for even a small picture once the model is loaded; use a "
            "smaller or a quantised checkpoint, or lower QWENVL_KV_CACHE_MB"
        ) from None
    except ServiceError:
        raise ModelLoadError(
            "the model fails on a test picture: if the log says that logits are not finite, its "
            "weights are damaged; copy or download them again"
        ) from None
    finally:
        engine.prefixes.clear()
