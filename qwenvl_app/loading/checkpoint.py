"""Finding a checkpoint's directory, and checking it before anything is loaded.

So that what is wrong with it is said in a sentence and not in a traceback. The layout is that of
``Qwen/Qwen3-VL-8B-Instruct``; ``tests/test_model_loading.py`` has a table of all that can be wrong.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenvl_app import hub
from qwenvl_app.errors import ModelLoadError
from qwenvl_app.loading import weights
from qwenvl_app.loading.files import (
    BOM,
    PROCESSOR,
    image_settings,
    read_json,
    read_text,
    readable,
    refuse_pointer,
)

DEMO = Path(__file__).resolve().parent.parent / "demo_model"
# The families whose parts the engine knows, see ``engine/vision.py`` and ``engine/model.py``.
FAMILIES = ("qwen3_vl", "qwen3_vl_moe", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe")
_DTYPES = ("float32", "bfloat16", "float16")
# What transformers can't do without for quantised weights, and how pip calls it: docs/models.md.
_PACKAGES = {
    "awq": {"gptqmodel": "gptqmodel"},
    "gptq": {"gptqmodel": "gptqmodel", "optimum": "optimum"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "fp8": {},
}
# In the order in which ``ProcessorMixin.get_processor_dict`` takes them; then the tokenizer's own.
_TEMPLATES = (PROCESSOR, "chat_template.json", "chat_template.jinja", "tokenizer_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole, as far as its files' headers say."""

    directory: Path
    config: dict[str, Any]  # config.json
    chat_template: str = ""

    @property
    def quantised(self) -> str | None:
        """The method, if the weights are quantised."""
        config = self.config.get("quantization_config")
        return config.get("quant_method") if isinstance(config, dict) else None


def find(
    name: str, *, download: bool = True, say: Callable[[str], None] = lambda _message: None
) -> Checkpoint:
    """The checkpoint of ``demo``, a directory, or a hub's id, ``@`` a revision perhaps.

    Raises ModelLoadError for one that is not whole; see ``hub.locate`` too.
    """
    directory = _locate(name, download, say)
    with readable("the model directory"):
        names = sorted(path.name for path in directory.iterdir())
    if not names:
        raise ModelLoadError(
            "the model directory is empty; copy or download the checkpoint into it"
        )
    for file in names:
        refuse_pointer(directory, file)
    if "config.json" not in names:
        weights.refuse_gguf(names)
    checkpoint = Checkpoint(directory, read_json(directory, "config.json"))
    _check_config(checkpoint)
    image_settings(directory)
    read_json(directory, "tokenizer_config.json")
    if "generation_config.json" in names:
        read_json(directory, "generation_config.json")
    if "tokenizer.json" in names:
        read_json(directory, "tokenizer.json")
    else:
        for file in ("vocab.json", "merges.txt"):
            if file not in names:
                raise ModelLoadError(f"the model directory lacks tokenizer.json and {file}")
    weights.check(directory, names)
    return replace(checkpoint, chat_template=_chat_template(directory))


def _locate(name: str, download: bool, say: Callable[[str], None]) -> Path:
    if name == "demo":
        return DEMO
    path = Path(name).expanduser()
    with readable("the directory that QWENVL_MODEL names"):
        if path.is_dir():
            return path
        if path.exists():
            raise ModelLoadError("QWENVL_MODEL is a file; it must be a checkpoint's directory")
    if found := hub.locate(name, download=download, say=say):
        return found
    if name.startswith("hf:"):
        raise ModelLoadError(
            "what QWENVL_MODEL has after hf: is no name on Hugging Face; such are "
            "hf:Qwen/Qwen3-VL-8B-Instruct, and after an @ a revision perhaps"
        )
    raise ModelLoadError("the directory that QWENVL_MODEL names does not exist")


def _check_config(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelLoadError(
            f"config.json has model_type {model_type!r}; supported are {', '.join(FAMILIES)}"
        )
    parts = {name: config.get(name) for name in ("text_config", "vision_config")}
    if model_type == "qwen2_5_vl" and "text_config" not in config:
        parts["text_config"] = config  # it was published with all in one
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise ModelLoadError(
                f"config.json has no {name}; take the checkpoint's own config.json"
            )
        if part.get("use_sliding_window"):
            raise ModelLoadError("config.json has use_sliding_window on, which is not supported")
    for part in (config, *parts.values()):
        for key in ("dtype", "torch_dtype"):
            if part and (dtype := part.get(key)) is not None and dtype not in _DTYPES:
                raise ModelLoadError(
                    f"config.json has {key} {dtype!r}; it must be one of {', '.join(_DTYPES)}"
                )
    if config.get("quantization_config") is not None:
        _check_method(checkpoint.quantised)


def _check_method(method: str | None) -> None:
    if method not in _PACKAGES:
        raise ModelLoadError(
            f"config.json has quant_method {method!r}; supported are {', '.join(_PACKAGES)}"
        )
    packages = _PACKAGES[method]
    if missing := [packages[name] for name in packages if importlib.util.find_spec(name) is None]:
        raise ModelLoadError(
            f"the weights are quantised with {method}, which needs another package: "
            f"pip install {' '.join(missing)}; or take the checkpoint that is not quantised"
        )


def _chat_template(directory: Path) -> str:
    template: str | None
    for file in _TEMPLATES:
        if not (directory / file).is_file():
            continue
        if file.endswith(".jinja"):
            template = read_text(directory, file)
        else:
            template = _default(file, read_json(directory, file).get("chat_template"))
        if template is not None:
            return template.removeprefix(BOM)  # an editor's, which the model would be shown
    raise ModelLoadError(f"no chat template: looked in {', '.join(_TEMPLATES)}")


def _default(file: str, template: Any) -> str | None:
    """Of several named templates, which transformers has saved as a list and as an object."""
    if isinstance(template, list):
        template = {
            each.get("name"): each.get("template") for each in template if isinstance(each, dict)
        }
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelLoadError(f"{file} has several chat templates, and none is named default")
        template = template["default"]
    return template if isinstance(template, str) else None
