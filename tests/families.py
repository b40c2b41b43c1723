"""A checkpoint of each family, laid out as published, with few narrow layers and random weights.

The tokenizer is the embedded checkpoint's; ``real_shape.py`` has the real one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from qwenvl_app.engine.model import LoadedModel
from qwenvl_app.loading.checkpoint import DEMO, FAMILIES
from qwenvl_app.loading.load import load
from tests import templates

_DEMO_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    "generation_config.json",
)
_TEXT = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 224,
    "max_position_embeddings": 4096,
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
    "vocab_size": 1088,
}
_QWEN3_TEXT = {
    **_TEXT,
    "attention_bias": False,
    "head_dim": 24,
    "rope_scaling": {
        "mrope_interleaved": True,
        "mrope_section": [4, 4, 4],
        "rope_type": "default",
    },
    "rope_theta": 5000000,
}
_QWEN3_5_TEXT = {
    **_TEXT,
    "attention_bias": False,
    "attn_output_gate": True,
    "full_attention_interval": 2,
    "head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 24,
    "mtp_num_hidden_layers": 1,
    "num_attention_heads": 4,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}
_QWEN3_VISION = {
    "deepstack_visual_indexes": [1, 2],
    "depth": 4,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 64,
    "in_channels": 3,
    "initializer_range": 0.02,
    "intermediate_size": 160,
    "num_heads": 4,
    "num_position_embeddings": 64,
    "out_hidden_size": 96,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_QWEN3_5_VISION = {**_QWEN3_VISION, "deepstack_visual_indexes": []}
_EXPERTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
# What config.json has beside the token ids, which are the tokenizer's.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_vl": {
        "text_config": {**_QWEN3_TEXT, "model_type": "qwen3_vl_text"},
        "vision_config": {**_QWEN3_VISION, "model_type": "qwen3_vl"},
        "tie_word_embeddings": True,
    },
    "qwen3_vl_moe": {
        "text_config": {**_QWEN3_TEXT, **_EXPERTS, "model_type": "qwen3_vl_moe_text"},
        "vision_config": {**_QWEN3_VISION, "model_type": "qwen3_vl_moe"},
        "tie_word_embeddings": False,
    },
    "qwen3_5": {
        "text_config": {**_QWEN3_5_TEXT, "model_type": "qwen3_5_text"},
        "vision_config": {**_QWEN3_5_VISION, "model_type": "qwen3_5"},
        "tie_word_embeddings": False,
    },
    "qwen3_5_moe": {
        "text_config": {
            **_QWEN3_5_TEXT,
            **_EXPERTS,
            "shared_expert_intermediate_size": 56,
            "model_type": "qwen3_5_moe_text",
        },
        "vision_config": {**_QWEN3_5_VISION, "model_type": "qwen3_5_moe"},
        "tie_word_embeddings": False,
    },
    # The language model's settings beside the others, not in a text_config.
    "qwen2_5_vl": {
        **_TEXT,
        "max_window_layers": 4,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_sliding_window": False,
        "vision_config": {
            "depth": 4,
            "fullatt_block_indexes": [1, 3],
            "hidden_act": "silu",
            "hidden_size": 64,
            "in_chans": 3,
            "intermediate_size": 100,
            "num_heads": 4,
            "out_hidden_size": 96,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
    },
}

# Where a test is not about the family, those with experts say again what their dense ones say.
USUAL = [
    pytest.param(name, marks=pytest.mark.slow) if name.endswith("_moe") else name
    for name in FAMILIES
]

# What published ones have instead, and how many parameters that makes: by their files' sizes.
_QWEN2_5_VISION = {
    **CONFIGS["qwen2_5_vl"]["vision_config"],
    "depth": 32,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
}
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Qwen2.5-VL-3B-Instruct": (
        "qwen2_5_vl",
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "max_window_layers": 70,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 2048},
            "vocab_size": 151936,
        },
        3_754_622_976,
    ),
    "Qwen2.5-VL-7B-Instruct": (
        "qwen2_5_vl",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "max_window_layers": 28,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": False,
            "vision_config": {**_QWEN2_5_VISION, "out_hidden_size": 3584},
            "vocab_size": 152064,
        },
        8_292_166_656,
    ),
    "Qwen3-VL-30B-A3B-Instruct": (
        "qwen3_vl_moe",
        {
            "text_config": {
                **CONFIGS["qwen3_vl_moe"]["text_config"],
                "head_dim": 128,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_attention_heads": 32,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 48,
                "num_key_value_heads": 4,
                "rope_scaling": {
                    "mrope_interleaved": True,
                    "mrope_section": [24, 20, 20],
                    "rope_type": "default",
                },
                "vocab_size": 151936,
            },
            "vision_config": {
                **_QWEN3_VISION,
                "deepstack_visual_indexes": [8, 16, 24],
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "model_type": "qwen3_vl_moe",
                "num_heads": 16,
                "num_position_embeddings": 2304,
                "out_hidden_size": 2048,
            },
        },
        31_070_754_032,
    ),
}

_QWEN3_PICTURES = {
    "size": {"shortest_edge": 64 * 64, "longest_edge": 512 * 512},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
_PICTURES = {
    "qwen3_vl": _QWEN3_PICTURES,
    "qwen3_vl_moe": _QWEN3_PICTURES,
    "qwen3_5": _QWEN3_PICTURES,
    "qwen3_5_moe": _QWEN3_PICTURES,
    "qwen2_5_vl": {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 480 * 480,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    },
}


def config(family: str) -> dict[str, Any]:
    """config.json, as published but for the sizes and the ids."""
    demo = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    ids = {name: number for name, number in demo.items() if name.endswith("_token_id")}
    return {"model_type": family, **ids, **CONFIGS[family]}


def make(directory: Path, family: str) -> Path:
    """The whole checkpoint in ``directory``.

    Weights this large make every position count, and every answer different.
    """
    torch.manual_seed(2)
    directory.mkdir(parents=True)
    _write(directory / "config.json", config(family))
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(directory))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.12)
            elif name.endswith("A_log"):
                parameter.fill_(-3)  # how fast a recurrent layer forgets: in some 20 tokens
    model.save_pretrained(directory)
    if family == "qwen3_vl_moe":
        _turn_experts(directory / "model.safetensors")
    _write(directory / "config.json", config(family))  # not as it is written today
    for file in _DEMO_FILES:
        shutil.copyfile(DEMO / file, directory / file)
    _write(directory / "chat_template.json", {"chat_template": templates.published(family)})
    _write(directory / "preprocessor_config.json", _PICTURES[family])
    return directory


def _turn_experts(path: Path) -> None:
    """As published, (experts, in, out): transformers has and saves them the other way round."""
    tensors = load_file(path)
    for name in tensors:
        if ".experts." in name:
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, path, {"format": "pt"})


def wild(directory: Path, family: str) -> LoadedModel:
    """The checkpoint, made in ``directory`` and loaded as the service does it."""
    return load(str(make(directory, family)), device="cpu", dtype="float32")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
