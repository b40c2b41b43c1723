"""Train the embedded demo model: ``python -m demo.train``; two hours on two CPU cores.

First the vision tower learns colour, shape and place through a throw-away classifier on its
merged patches; trained end to end at once, yes/no answers stay near chance for long. Then the
language model learns to answer on top of it, the classifier's loss kept beside. The last stages
ask more about what is hard: small shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

from demo.checkpoint import make_config, make_generation_config, write_processor, write_tokenizer
from demo.data import Batch, Batches, Mix
from demo.scenes import COLORS, SHAPES

SEED = 20261124
VALIDATION_BATCHES = 6


class Stage(NamedTuple):
    """One stretch of training; the rate falls from ``rate`` by a cosine over ``horizon`` steps."""

    name: str
    steps: int
    horizon: int
    mix: Mix
    rate: float = 1e-3
    probe_weight: float = 1.0  # of the classifier's loss beside the language model's
    keeps_probe: bool = False  # goes on with the classifier of the stage before


STAGES = (
    Stage("vision", 1200, 1200, Mix(64, 0)),
    # Left half way down, where small shapes were what was still wrong.
    Stage("language", 1500, 3000, Mix(32, 8), probe_weight=0.1, keeps_probe=True),
    Stage("polish", 2000, 2000, Mix(48, 5, square=0.75, small=0.45), probe_weight=0.3),
    # Small shapes in small square pictures, the last thing that was sometimes wrong.
    Stage("settle", 500, 500, Mix(48, 5, square=0.9, small=0.6), rate=3e-4, probe_weight=0.3),
)


class Probe(nn.Module):
    """A throw-away classifier on merged patches: pooled by attention, then linear."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Linear(hidden, 4)
        self.shape = nn.Linear(4 * hidden, len(SHAPES) + 1)
        self.color = nn.Linear(4 * hidden, len(COLORS))
        self.box = nn.Linear(4 * hidden, 4)

    def forward(self, tokens: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
        """Loss, and the share of pictures whose shape and colour are both right.

        tokens: (pictures, merged patches, hidden).
        """
        pooled = torch.einsum("nth,ntk->nkh", tokens, self.weight(tokens).softmax(1)).flatten(1)
        shape, color, box = self.shape(pooled), self.color(pooled), self.box(pooled)
        known = ~batch.box.isnan().any(1)
        loss = F.cross_entropy(shape, batch.shape) + 0.5 * F.cross_entropy(color, batch.color)
        loss = loss + F.smooth_l1_loss(box[known], batch.box[known])
        right = (shape.argmax(1) == batch.shape) & (color.argmax(1) == batch.color)
        return loss, right[known].float().mean().item()


def look(model: Qwen3VLForConditionalGeneration, batch: Batch):
    """Vision tower: merged patches (pictures, tokens, hidden) and the deepstack features."""
    output = model.model.visual(batch.pixels, grid_thw=batch.grid)
    tokens = output.pooler_output
    return tokens.view(len(batch.grid), -1, tokens.shape[-1]), output.deepstack_features


def answer(model: Qwen3VLForConditionalGeneration, batch: Batch, tokens, deepstack):
    """Logits (labelled places, vocabulary) of every answer token, teacher-forced."""
    is_image = batch.input_ids == model.config.image_token_id
    embeds = model.model.language_model.embed_tokens(batch.input_ids)
    embeds = embeds.masked_scatter(is_image[..., None], tokens.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=batch.position_ids,
        attention_mask=batch.mask,
        visual_pos_masks=is_image,
        deepstack_visual_embeds=deepstack,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[batch.labels != -100])


def schedule(optimizer: torch.optim.Optimizer, steps: int, warmup: int = 100):
    """Linear warm-up, then a cosine down to nothing."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_optimizer(parameters: list[nn.Parameter], rate: float) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))


@torch.no_grad()
def validate(model, batches: list[Batch]) -> dict[str, float]:
    """Share of answers, by kind, in which every token is right, on pictures never trained on."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for batch in batches:
        predicted = torch.full_like(batch.labels, -100)
        predicted[batch.labels != -100] = answer(model, batch, *look(model, batch)).argmax(-1)
        wrong = predicted != batch.labels
        for row, spans in enumerate(batch.kinds):
            for kind, first, last in spans:
                total.update([kind, "all"])
                if not wrong[row, first : last + 1].any():
                    right.update([kind, "all"])
    return {kind: right[kind] / total[kind] for kind in sorted(total)}


def train(arguments: argparse.Namespace) -> None:
    """All stages, with their log and curve; the checkpoint is saved after each."""
    torch.manual_seed(SEED)
    torch.set_num_threads(arguments.threads)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    if arguments.skip:  # its tokenizer too: other questions would give other tokens
        tokenizer = Qwen2Tokenizer.from_pretrained(out)
        model = Qwen3VLForConditionalGeneration.from_pretrained(out)
        began -= 60 * json.loads(arguments.log.read_text().splitlines()[-1])["minutes"]
    else:
        tokenizer = write_tokenizer(out, SEED)
        write_processor(out)
        model = Qwen3VLForConditionalGeneration(make_config(tokenizer))
    model.generation_config = make_generation_config(tokenizer)
    probe = Probe(model.config.text_config.hidden_size)
    log = arguments.log.open("a" if arguments.skip else "w", encoding="utf-8")

    def record(**fields) -> None:
        log.write(
            json.dumps({"minutes": round((time.monotonic() - began) / 60, 2), **fields}) + "\n"
        )
        log.flush()

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()

    for number, stage in enumerate(STAGES):
        if stage.name in arguments.skip:
            continue
        is_vision = stage.mix.questions == 0
        probe = probe if stage.keeps_probe else Probe(model.config.text_config.hidden_size)
        trained = [*(model.model.visual if is_vision else model).parameters(), *probe.parameters()]
        optimizer = make_optimizer(trained, stage.rate)
        rates = schedule(optimizer, stage.horizon)
        batches = Batches(out, SEED + 10 + number, stage.steps, stage.mix)
        validation = [] if is_vision else list(Batches(out, SEED, VALIDATION_BATCHES, Mix(64, 8)))
        loader = DataLoader(batches, batch_size=None, num_workers=1, prefetch_factor=8)
        bar = tqdm(loader, desc=stage.name, mininterval=5)
        for step, batch in enumerate(bar):
            with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
                tokens, deepstack = look(model, batch)
                logits = None if is_vision else answer(model, batch, tokens, deepstack)
            loss, right = probe(tokens.float(), batch)
            if logits is not None:
                told = F.cross_entropy(logits.float(), batch.labels[batch.labels != -100])
                loss = told + stage.probe_weight * loss
            update(loss)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", right=f"{right:.2f}")
                record(stage=stage.name, step=step, loss=loss.item(), right=right)
            if not is_vision and (step % 250 == 249 or step + 1 == stage.steps):
                shares = validate(model, validation)
                bar.write(" ".join(f"{k}={v:.4f}" for k, v in shares.items()))
                record(stage=stage.name, step=step, validation=shares)
                from demo.plot import draw_curve  # brings matplotlib, which nothing else needs

                draw_curve(arguments.log, arguments.plot)
                model.save_pretrained(out)
        model.save_pretrained(out)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo/out"))
    parser.add_argument("--log", type=Path, default=Path("demo/train.jsonl"))
    parser.add_argument("--plot", type=Path, default=Path("demo/curve.png"))
    parser.add_argument(
        "--skip", nargs="*", default=[], help="stages not to train; the model in --out goes on"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-bf16", dest="bf16", action="store_false", help="train in float32")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
