"""A checkpoint laid out like Qwen3-VL-8B-Instruct, whose own weights can't be had here.

Every file that is published is there, with the published architecture's numbers, ids and settings;
only the layers are few, the layers narrow, and the weights random. As a program, it makes one:

    python -m tests.real_shape DIRECTORY [--width 4096]
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests import templates

# The vocabulary, as the model's makers publish it on PyPI too (Apache 2.0). The wheel is fetched
# and not installed: it requires 20 packages that nobody needs here.
_WHEEL = "dashscope==2.0.2"
_VOCABULARY = "dashscope/resources/qwen.tiktoken"
_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"

_SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
# Added tokens that are not special: they are left in an answer, and read in a prompt.
ADDED = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
    *("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>"),
    *("<think>", "</think>"),
)

TEMPLATE = templates.published("qwen3_vl")

_PIXELS = {
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
}
FILES: dict[str, dict[str, Any]] = {
    "generation_config.json": {
        "bos_token_id": 151643,
        "pad_token_id": 151643,
        "do_sample": True,
        "eos_token_id": [151645, 151643],
        "top_k": 20,
        "top_p": 0.8,
        "repetition_penalty": 1.0,
        "temperature": 0.7,
        "transformers_version": "4.56.0",
    },
    "preprocessor_config.json": {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        **_PIXELS,
        "image_processor_type": "Qwen2VLImageProcessorFast",
    },
    "video_preprocessor_config.json": {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},
        **_PIXELS,
        "video_processor_type": "Qwen3VLVideoProcessor",
    },
}


def config(
    width: int = 4096, layers: int = 36, depth: int = 27, tower: int | None = None
) -> dict[str, Any]:
    """config.json; of another ``width``, with heads in proportion and each as large as it was.

    The vision tower is as wide as that of a model of width ``tower``, by default of this one.
    """
    heads = max(2, width // 512)
    vision_heads = max(2, 16 * (tower or width) // 4096)
    deepstack = [8, 16, 24] if depth > 24 else list(range(min(3, depth)))
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "image_token_id": 151655,
        "model_type": "qwen3_vl",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "dtype": "bfloat16",
            "eos_token_id": 151645,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": width,
            "initializer_range": 0.02,
            "intermediate_size": 3 * width,
            "max_position_embeddings": 262144,
            "model_type": "qwen3_vl_text",
            "num_attention_heads": 4 * heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": heads,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
                "rope_type": "default",
            },
            "rope_theta": 5000000,
            "use_cache": True,
            "vocab_size": 151936,
        },
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {
            "deepstack_visual_indexes": deepstack,
            "depth": depth,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 72 * vision_heads,
            "in_channels": 3,
            "initializer_range": 0.02,
            "intermediate_size": 4304 * vision_heads // 16,
            "model_type": "qwen3_vl",
            "num_heads": vision_heads,
            "num_position_embeddings": 2304,
            "out_hidden_size": width,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }


def vocabulary(downloads: Path) -> dict[bytes, int]:
    """The 151,643 entries of the tokenizer, each with its rank. OSError if it can't be had."""
    wheels = list(downloads.glob("dashscope-*.whl"))
    if not wheels:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", _WHEEL]
        done = subprocess.run([*fetch, "-d", downloads], check=False, timeout=100)
        if done.returncode:
            raise OSError(f"pip could not fetch {_WHEEL}, which has the tokenizer's vocabulary")
        wheels = list(downloads.glob("dashscope-*.whl"))
    with zipfile.ZipFile(wheels[0]) as wheel:
        data = wheel.read(_VOCABULARY)
    if hashlib.sha256(data).hexdigest() != _SHA256:
        raise OSError(f"{_VOCABULARY} is not the file that it was")
    pairs = (line.split() for line in data.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each longer entry was merged from, in the order of their ranks.

    It is what is left when the entry's bytes are merged by all lower ranks.
    """
    pairs = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            found = [
                (ranks.get(left + right, rank), at)
                for at, (left, right) in enumerate(pairwise(parts))
            ]
            least, at = min(found)
            assert least < rank
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def _make_tokenizer(directory: Path) -> None:
    ranks = vocabulary(directory.parent)
    letters = bytes_to_unicode()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    spelled = {spell(token): rank for token, rank in ranks.items()}
    lines = [f"{spell(left)} {spell(right)}" for left, right in merges(ranks)]
    _write(directory / "vocab.json", spelled)
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), "utf-8")
    added = {
        str(number): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in _SPECIAL,
        }
        for number, token in enumerate([*_SPECIAL, *ADDED], start=len(ranks))
    }
    _write(
        directory / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": added,
            "additional_special_tokens": list(_SPECIAL[1:]),
            "bos_token": None,
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": 262144,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    fast: Any = Qwen2Tokenizer.from_pretrained(directory, local_files_only=True)
    fast.backend_tokenizer.save(str(directory / "tokenizer.json"))


def write_tokenizer(directory: Path) -> None:
    """vocab.json, merges.txt, tokenizer.json and tokenizer_config.json, as published.

    Made once for all processes and runs: that takes seconds. OSError if the vocabulary can't be
    had.
    """
    downloads = Path(sys.prefix) / "downloads"
    downloads.mkdir(exist_ok=True)
    recipe = hashlib.sha256(Path(__file__).read_bytes() + TEMPLATE.encode())
    made = downloads / f"tokenizer-{transformers.__version__}-{recipe.hexdigest()[:16]}"
    with (downloads / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            unfinished = Path(tempfile.mkdtemp(dir=downloads))
            _make_tokenizer(unfinished)
            unfinished.rename(made)
    shutil.copytree(made, directory, dirs_exist_ok=True)


def write_weights(
    directory: Path, *, width: int, layers: int, depth: int, tower: int | None, shard: str
) -> None:
    """config.json, generation_config.json, the shards in bfloat16 and their index.

    Weights this large make every position count, and every answer different.
    """
    torch.manual_seed(0)
    settings = config(width, layers, depth, tower)
    # A CPU takes minutes to draw the real width.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(settings))
    model.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.12 * (128 / width) ** 0.5)
    model.save_pretrained(directory, max_shard_size=shard)
    _write(directory / "config.json", settings)  # as it was published, not as it is written today


def make(
    directory: Path,
    *,
    width: int = 128,
    layers: int = 4,
    depth: int = 4,
    tower: int | None = None,
    shard: str = "30MB",
) -> Path:
    """The whole checkpoint in ``directory``. OSError if the vocabulary can't be had."""
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory)
    write_weights(directory, width=width, layers=layers, depth=depth, tower=tower, shard=shard)
    for file, content in FILES.items():
        _write(directory / file, content)
    _write(directory / "chat_template.json", {"chat_template": TEMPLATE})
    return directory


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--width", type=int, default=4096, help="of the text model's hidden state")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--depth", type=int, default=4, help="layers of the vision tower")
    chosen = parser.parse_args()
    make(
        chosen.directory, width=chosen.width, layers=chosen.layers, depth=chosen.depth, shard="5GB"
    )
