"""The devices that a model goes to, and the plan for their memory."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import logging
from collections.abc import Callable

import psutil
import torch

from qwenvl_app.engine.memory import free_memory
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading import footprint, measuring, plan
from qwenvl_app.loading.checkpoint import Checkpoint
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


def estimate(checkpoint: Checkpoint, settings: Settings) -> footprint.Footprint:
    """The footprint of ``checkpoint`` on the devices that it goes to. Raises ModelLoadError."""
    try:
        return footprint.estimate(
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


def memory(settings: Settings) -> plan.Memory:
    """What is free now on the devices that the model goes to."""
    host, found = free_memory(torch.device("cpu")), gpus(settings.device)
    free = [free_memory(gpu) for gpu in found] or [host]
    spare = host if found and settings.device == "auto" else 0
    return plan.Memory(free, cpu=not found, host=spare)


def before_loading(checkpoint: Checkpoint, settings: Settings) -> plan.MemoryPlan:
    """The plan for what is free now; it is logged. Raises ModelLoadError if it can't work."""
    return _told(plan.make(estimate(checkpoint, settings), settings, memory(settings)))


def after_loading(
    loaded: LoadedModel, made: plan.MemoryPlan, say: Callable[[str], None]
) -> plan.MemoryPlan:
    """The same with what is measured and what is left on GPUs. Raises ModelLoadError."""
    if not gpus(made.settings.device):
        return made
    say("measuring what the largest request takes")
    need, shares = measuring.measure(loaded, made.need, made.settings.prefill_chunk)
    gc.collect()
    torch.cuda.empty_cache()
    free = [free_memory(gpu) for gpu in shares]
    there = plan.Memory(free, cpu=False, shares=[*shares.values()])
    left = _told(plan.make(need, made.settings, there))
    return dataclasses.replace(left, offloaded=made.offloaded)


def spare(made: plan.MemoryPlan) -> int:
    """Bytes of the machine's memory, now that the weights are there, that no request will want."""
    wanted = 0 if gpus(made.settings.device) else max(made.work, made.room + made.prefix_cache)
    return max(0, free_memory(torch.device("cpu")) - wanted)


def _told(made: plan.MemoryPlan) -> plan.MemoryPlan:
    if made.problem:
        raise ModelLoadError(f"not enough memory: {made}")
    log.log(logging.WARNING if made.tight or made.offloaded else logging.INFO, "memory: %s", made)
    return made


def tell_process(made: plan.MemoryPlan) -> None:
    """Log what this process takes on a CPU, idle as it is now, and at once."""
    if not gpus(made.settings.device):
        idle = psutil.Process().memory_info().rss
        log.info(
            "memory of this process: about %d MiB when idle, up to %d MiB at once",
            idle // plan.MIB,
            (idle + made.work) // plan.MIB,
        )
