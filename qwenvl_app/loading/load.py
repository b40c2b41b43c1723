"""The weights into memory, and what makes a model's inputs beside them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl_app import process
from qwenvl_app.engine import fused, native
from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.errors import ModelLoadError, is_out_of_memory
from qwenvl_app.loading import generation_defaults, processing, progress, weights
from qwenvl_app.loading.checkpoint import Checkpoint, find
from qwenvl_app.loading.devices import keeps_fp8

log = logging.getLogger(__name__)


def load(
    source: str | Checkpoint,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    max_memory: dict[int | str, int] | None = None,
    say: Callable[[str], None] = lambda _message: None,
) -> LoadedModel:
    """Load what ``checkpoint.find`` has found or is to find. Takes seconds to minutes.

    By default as the service being replaced: ``dtype="auto"``, ``device_map="auto"`` through
    accelerate, and the checkpoint's own ``generation_config``. ``max_memory``: bytes of weights on
    each device, of which there may be several. ``say`` is told, often, how far it is, and may raise
    LoadStopped. Raises ModelLoadError.
    """
    say("looking for the checkpoint")
    checkpoint = find(source, say=say) if isinstance(source, str) else source
    log.info("loading the model from %s", checkpoint.directory)
    config = _config(checkpoint, device)
    defaults = generation_defaults.load(checkpoint.directory, config)
    auto: Any = AutoModelForImageTextToText  # transformers' annotations don't know the report
    with progress.told(say), _quantisation_told(checkpoint.quantised):
        model, report = auto.from_pretrained(
            checkpoint.directory,
            config=config,
            dtype=dtype,
            device_map=device,
            max_memory=max_memory,
            attn_implementation=None if attention == "auto" else attention,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told by _check_weights
        )
    _check_weights(report)
    _tell_offload(getattr(model, "hf_device_map", {}))
    model.generation_config = defaults
    return LoadedModel(model.eval(), *processing.load(checkpoint, model.config))


def optimise(
    loaded: LoadedModel, *, cpp: bool, room: int = 2**62, cpu_threads: int = 0
) -> LoadedModel:
    """``loaded`` with layers in C++ where there is code for them, and other products packed.

    Its model can't be used by itself then. ``cpp``: False packs all. ``room``: bytes that weights
    may take a second time, until the first are dropped. ``cpu_threads``: the setting.
    """
    if cpp:
        made = native.create(loaded.model, room, process.threads(cpu_threads))
        made.take_over(loaded.model)
        process.return_free_memory()
        loaded = replace(loaded, native=made)
    fused.fuse(loaded.model)
    return loaded


@contextmanager
def _quantisation_told(method: str | None) -> Iterator[None]:
    """What a quantised checkpoint's own libraries raise is of many classes, and for the log."""
    try:
        yield
    except (ImportError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        if method is None or is_out_of_memory(error):
            raise
        log.exception("the quantised weights can't be loaded")
        raise ModelLoadError(
            f"weights that are quantised with {method} can't be loaded here, the log has why: take "
            "the checkpoint that is not quantised"
        ) from None


def _config(checkpoint: Checkpoint, device: str) -> Any:
    """config.json, and in it which weights to load: the same that were checked.

    Quantised ones that no product is there for are turned back. compressed-tensors would do so in
    the first call of the whole model, which never comes here: its parts are called.
    """
    config = AutoConfig.from_pretrained(checkpoint.directory, local_files_only=True)
    config.transformers_weights = weights.first(checkpoint.directory)
    method = checkpoint.quantised
    if method == "compressed-tensors" or (method == "fp8" and not keeps_fp8(device)):
        log.warning("%s weights are loaded as they were before they were quantised", method)
        config.quantization_config["dequantize"] = True
    return config


def _check_weights(report: dict[str, Any]) -> None:
    """Raise ModelLoadError unless all weights were there; others are filled with random numbers."""
    for tensor, stored, wanted in sorted(report["mismatched_keys"]):
        raise ModelLoadError(
            f"the weights do not fit config.json: {tensor} is {tuple(stored)} and should be "
            f"{tuple(wanted)}; the files are not of one checkpoint"
        )
    if missing := sorted(report["missing_keys"]):
        raise ModelLoadError(f"the weights lack {len(missing)} tensors, the first is {missing[0]}")


def _tell_offload(places: dict[str, Any]) -> None:
    """Warn of what accelerate found no room for; ``places``: of each part, its device."""
    parts = list(places.values())
    on_gpus = [part for part in parts if part not in ("cpu", "disk")]
    outside = len(parts) - len(on_gpus) if on_gpus else parts.count("disk")
    if outside:
        log.warning(
            "%d parts of the model are outside the device, and are fetched in every step",
            outside,
        )
