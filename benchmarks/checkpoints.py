"""A checkpoint to measure with: random weights, answers that never end by themselves.

``python -m benchmarks.checkpoints FOLDER`` writes it, for a peer to serve; always the same one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import GenerationConfig, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from demo.checkpoint import make_config, write_processor, write_tokenizer


def write_checkpoint(directory: Path, max_pixels: int = 1024 * 1024) -> None:
    """About 15 million parameters: the demo model's, but 8 layers of 256 and large pictures."""
    torch.manual_seed(0)
    tokenizer = write_tokenizer(directory, 0)
    processor = write_processor(directory)
    processor.size = {"shortest_edge": 64 * 64, "longest_edge": max_pixels}
    processor.save_pretrained(directory)
    values = make_config(tokenizer).to_dict()
    values["vision_config"]["out_hidden_size"] = 256
    values["text_config"].pop("layer_types", None)  # one a layer; made anew
    values["text_config"] |= {
        "hidden_size": 256,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    }
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**values))
    # A token whose logit is 0 always, which is never the largest of a thousand random ones.
    never = values["text_config"]["vocab_size"] - 1
    with torch.no_grad():
        model.lm_head.weight[never] = 0
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=never)
    model.save_pretrained(directory)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write_checkpoint(target)
