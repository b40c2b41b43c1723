"""The devices that a model goes to, and the plan for them."""

from __future__ import annotations

import importlib.util
import logging

import psutil
import torch

from qwenvl_app.engine.memory import free_memory
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading import plan
from qwenvl_app.loading.checkpoint import Checkpoint
from qwenvl_app.loading.footprint import Footprint
from qwenvl_app.loading.footprint import measure as measure_files
from qwenvl_app.settings import Settings

log = logging.getLogger(__name__)

_FP8 = (8, 9)  # the first compute capability that multiplies it


def gpus(device: str) -> list[torch.device]:
    """The GPUs that the setting ``device`` names; none for the CPU."""
    if device == "auto":
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device(device)] if device.startswith("cuda") else []


def keeps_fp8(device: str) -> bool:
    """Whether weights in fp8 stay so; else they become bfloat16 as they are loaded.

    transformers has the products from a package of its own; without that it fails at the first.
    """
    found = gpus(device)
    able = all(torch.cuda.get_device_capability(gpu) >= _FP8 for gpu in found)
    return bool(found) and able and importlib.util.find_spec("kernels") is not None


def measure(checkpoint: Checkpoint, settings: Settings) -> Footprint:
    """The footprint of ``checkpoint`` on the devices that it goes to.

    Raises ModelLoadError.
    """
    try:
        return measure_files(
            checkpoint,
            settings.dtype,
            settings.max_image_megapixels * 1e6,
            cpu=not gpus(settings.device),
            eager=settings.attention == "eager",
            expands_fp8=not keeps_fp8(settings.device),
        )
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelLoadError(
            f"config.json or preprocessor_config.json lacks what is needed ({error}); copy or "
            "download them again"
        ) from None


def make_plan(checkpoint: Checkpoint, settings: Settings) -> plan.MemoryPlan:
    """The plan for what is free now; it is logged. Raises ModelLoadError if it can't work."""
    need = measure(checkpoint, settings)
    host = free_memory(torch.device("cpu"))
    if found := gpus(settings.device):
        free = [free_memory(gpu) for gpu in found]
        made = plan.make(
            need, settings, free, cpu=False, host=host if settings.device == "auto" else 0
        )
    else:
        made = plan.make(need, settings, [host], cpu=True)
    if made.problem:
        raise ModelLoadError(f"not enough memory: {made}")
    log.log(logging.WARNING if made.tight or made.offloaded else logging.INFO, "memory: %s", made)
    if not found:
        idle, most = made.process(psutil.Process().memory_info().rss)
        log.info(
            "memory of this process: about %d MiB when idle, up to %d MiB at once",
            idle // plan.MIB,
            most // plan.MIB,
        )
    return made
