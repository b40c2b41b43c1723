"""Everything of the checkpoint but its weights: tokenizer, chat template, configuration.

The layout is that of the published ``Qwen/Qwen3-VL-8B-Instruct`` directory, so that the service
loads both with the same code; only the sizes are small.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen2Tokenizer, Qwen2VLImageProcessorPil, Qwen3VLConfig

from demo.questions import chinese_question, english_question, package_question
from demo.scenes import draw

VOCABULARY = 1024  # ordinary tokens; the special ones come after them, as in Qwen's vocabulary
IMAGE_PIXELS = 128 * 128  # every picture is brought to about this many pixels: 64 patches
PATCH, MERGE = 16, 2
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Qwen's own splitting rule, see transformers/models/qwen2/tokenization_qwen2.py.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen3-VL's own, so that whatever is tried with the demo works with the real model too.
CHAT_TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")


def write_tokenizer(directory: Path, seed: int) -> Qwen2Tokenizer:
    """Train a byte-level BPE on generated questions and answers and save it in Qwen's files."""
    rng = random.Random(seed)

    def corpus():
        for _ in range(20_000):
            _, scene = draw(rng, 8, 8)
            ask = rng.choice(
                (package_question, english_question, chinese_question, chinese_question)
            )
            question = ask(rng, scene)
            yield f"{question.text}\n{question.answer}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=12,  # bytes: four Chinese characters, so that parts stay parts
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    qwen = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        model_max_length=4096,
    )
    qwen.chat_template = CHAT_TEMPLATE
    qwen.save_pretrained(directory)
    (directory / "vocab.json").write_text(
        json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8"
    )
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return qwen


def write_processor(directory: Path) -> Qwen2VLImageProcessorPil:
    """Save the image processor: Qwen3-VL's, with the pixel budget of the demo model."""
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": IMAGE_PIXELS, "longest_edge": IMAGE_PIXELS},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    processor.save_pretrained(directory)
    path = directory / "preprocessor_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    # The names in the published file; the auto class falls back to the one without torchvision.
    saved |= {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    }
    path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    return processor


def make_config(tokenizer: Qwen2Tokenizer) -> Qwen3VLConfig:
    """The architecture of Qwen3-VL at about 3.6 million parameters."""
    hidden = 192
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="float32",
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 2],
        },
        text_config={
            "vocab_size": (len(tokenizer) + 63) // 64 * 64,
            "hidden_size": hidden,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
        },
    )


def make_generation_config(tokenizer: Qwen2Tokenizer) -> GenerationConfig:
    """Greedy, and ended by either of two tokens, as the published one is."""
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    return GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[1])
