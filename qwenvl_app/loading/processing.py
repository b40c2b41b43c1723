"""What turns requests into a model's inputs, loaded and checked against the model."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qwenvl_app.engine.pixels import Patcher, pixel_limits
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading.checkpoint import Checkpoint
from qwenvl_app.loading.files import image_settings
from qwenvl_app.prompts.builder import IMAGE_PAD, PromptBuilder

log = logging.getLogger(__name__)

_IMAGE_PROCESSORS = re.compile(r"Qwen\w*VLImageProcessor(Fast|Pil)?")


def load(
    checkpoint: Checkpoint, config: Any
) -> tuple[Patcher, PreTrainedTokenizerBase, PromptBuilder]:
    """The image processor, the tokenizer and the prompts of ``checkpoint``.

    ``config`` is the model's. Raises ModelLoadError, also if they are not of one checkpoint.
    """
    directory = checkpoint.directory
    patcher = Patcher(image_processor(directory))
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception:  # whatever its parsers have for what they do not understand
        log.exception("the tokenizer's files can't be used")
        raise ModelLoadError(
            "the tokenizer's files can't be used, the log has why; copy or download all that is "
            "not weights again"
        ) from None
    _check_tokenizer(tokenizer, config)
    _check_processor(patcher, config.vision_config)
    try:
        prompts = PromptBuilder(tokenizer, checkpoint.chat_template, patcher.merge)
    except (ValueError, TemplateError):
        raise ModelLoadError(
            "the chat template does not place one image and then the user's text; take the "
            "checkpoint's own"
        ) from None
    return patcher, tokenizer, prompts


def image_processor(directory: Path) -> Any:
    """The one of all families, whatever it was called when the checkpoint was saved.

    ``AutoImageProcessor`` knows today's names alone. Raises ModelLoadError.
    """
    kind = image_settings(directory).get("image_processor_type")
    if kind is not None and not _IMAGE_PROCESSORS.fullmatch(str(kind)):
        raise ModelLoadError(
            f"preprocessor_config.json has image_processor_type {kind!r}, which is no Qwen-VL's; "
            "take the checkpoint's own preprocessor_config.json"
        )
    try:
        processor: Any = Qwen2VLImageProcessorPil.from_pretrained(directory, local_files_only=True)
    except Exception:  # as above
        log.exception("the image processor's settings can't be used")
        raise ModelLoadError(
            "preprocessor_config.json can't be used, the log has why; take the checkpoint's own"
        ) from None
    size = dict(processor.size)
    if "max_pixels" in size:  # as transformers 4.49 saved it
        processor.size = {"shortest_edge": size["min_pixels"], "longest_edge": size["max_pixels"]}
    pixel_limits(processor)
    return processor


def _check_tokenizer(tokenizer: Any, config: Any) -> None:
    vocabulary = tokenizer.get_vocab()
    image_id, known = vocabulary.get(IMAGE_PAD), config.text_config.vocab_size
    if image_id is None:
        raise ModelLoadError(
            f"the tokenizer has no {IMAGE_PAD}; copy or download the checkpoint's own tokenizer"
        )
    if image_id != config.image_token_id:
        raise ModelLoadError(
            f"the tokenizer's {IMAGE_PAD} is {image_id}, config.json says "
            f"{config.image_token_id}: the files are not of one checkpoint"
        )
    if (last := max(vocabulary.values())) >= known:
        raise ModelLoadError(
            f"the tokenizer has ids up to {last}, but config.json's vocab_size is {known}: the "
            "files are not of one checkpoint"
        )


def _check_processor(patcher: Patcher, vision: Any) -> None:
    for ours, theirs, name in (
        (patcher.side, vision.patch_size, "patch_size"),
        (patcher.merge, vision.spatial_merge_size, "merge_size"),
    ):
        if ours != theirs:
            raise ModelLoadError(
                f"preprocessor_config.json has {name} {ours}, config.json has {theirs}: the files "
                "are not of one checkpoint"
            )
