"""What trainers.py compares ours with: a user's own script around transformers.Trainer, and nothing of ours
in the loop.

    files (Pillow) -> augmentation of naive.py (OpenCV) -> SegformerForSemanticSegmentation -> Trainer

The recipe is that of the other side: random scale, crop, flips, quarter turns, photometric distortion, AdamW
with the official groups, poly decay with warm-up, the official initialization, no clipping, fp32. The loss is
transformers' own: cross entropy over the labelled pixels at the size of the labels.

    python -m bench.huggingface '{"root": ..., ...}'      the fields of Request

It leaves the model in `out`, and trainer.json with the seconds of the training loop and the losses.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from bench.naive import augment
from segformer.data.loading.crop import AugmentConfig
from segformer.models.variants import VARIANTS

RESULT = "trainer.json"


@dataclass(frozen=True, slots=True)
class Request:
    """A training run of this script."""

    root: str
    "Folder with images/train/*.jpg and masks/train/*.png."
    out: str
    classes: int
    variant: str
    steps: int
    batch: int
    "Images of a step, over all processes."
    seed: int
    lr: float
    head_lr_factor: float
    weight_decay: float
    warmup_steps: int
    drop_path_rate: float
    dropout: float
    augment: dict[str, Any]
    "The fields of AugmentConfig."
    log_every: int
    workers: int
    "Processes that read images, for each process that trains."


class Folder(Dataset[dict[str, Tensor]]):
    """Training images and masks, read and augmented one by one."""

    def __init__(self, root: Path, cfg: AugmentConfig) -> None:
        self.images = sorted((root / "images/train").iterdir())
        self.masks = [root / "masks/train" / f"{path.stem}.png" for path in self.images]
        self.cfg = cfg

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        cv2.setNumThreads(1)
        rng = np.random.default_rng(int(torch.randint(2**62, ())))  # torch seeds every worker
        with Image.open(self.images[index]) as picture:
            image = np.asarray(picture.convert("RGB"))
        with Image.open(self.masks[index]) as picture:
            mask = np.asarray(picture)
        if rng.random() < self.cfg.rot90:
            turns = int(rng.integers(1, 4))
            image, mask = np.rot90(image, turns), np.rot90(mask, turns)
        if rng.random() < self.cfg.vflip:
            image, mask = image[::-1], mask[::-1]
        image, mask = np.ascontiguousarray(image), np.ascontiguousarray(mask)
        pixels, labels = augment(image, mask, self.cfg, rng, bgr=False)
        return {"pixel_values": pixels, "labels": labels}


def build_model(request: Request) -> SegformerForSemanticSegmentation:
    """The network with random weights, initialized as the original does it."""
    sizes = VARIANTS[request.variant]
    config = SegformerConfig(
        num_labels=request.classes,
        hidden_sizes=list(sizes.embed_dims),
        depths=list(sizes.depths),
        num_attention_heads=list(sizes.num_heads),
        sr_ratios=list(sizes.sr_ratios),
        mlp_ratios=list(sizes.mlp_ratios),
        decoder_hidden_size=sizes.decoder_dim,
        drop_path_rate=request.drop_path_rate,
        classifier_dropout_prob=request.dropout,
        semantic_loss_ignore_index=255,
    )
    model = SegformerForSemanticSegmentation(config)
    for name, module in model.named_modules():
        initialize(name, module)
    return model


def initialize(name: str, module: nn.Module) -> None:
    """New weights as the original draws them; transformers' own rule is normal with 0.02 for everything."""
    if name.startswith("decode_head") and "fuse" not in name:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_optimizer(model: nn.Module, request: Request) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW with the official groups, and the schedule: poly decay times a linear warm-up."""
    spared = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
        for parameter in module.parameters()
    }
    norms: list[nn.Parameter] = []
    encoder: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = head if name.startswith("decode_head") else norms if id(parameter) in spared else encoder
        group.append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": encoder},
        {"params": norms, "weight_decay": 0.0},
        {"params": head, "lr": request.lr * request.head_lr_factor},
    ]
    optimizer = torch.optim.AdamW(groups, lr=request.lr, weight_decay=request.weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(request, step))


def factor(request: Request, step: int) -> float:
    """Share of the learning rate at a step, from 0."""
    warm = min(1.0, 1e-6 + (1 - 1e-6) * step / request.warmup_steps) if request.warmup_steps else 1.0
    return (1 - step / request.steps) * warm


class Clock(TrainerCallback):
    """Seconds from the first step's begin to the last step's end."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.start = time.monotonic()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Stop."""
        self.seconds = time.monotonic() - self.start


def train(request: Request) -> None:
    """Train, save the model and write what it took."""
    set_seed(request.seed)
    model = build_model(request)
    clock, ranks = Clock(), int(os.environ.get("WORLD_SIZE", "1"))
    settings = TrainingArguments(
        output_dir=request.out,
        max_steps=request.steps,
        per_device_train_batch_size=request.batch // ranks,
        max_grad_norm=0.0,
        dataloader_num_workers=request.workers,
        dataloader_drop_last=True,  # every step has the whole batch
        dataloader_persistent_workers=request.workers > 0,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        average_tokens_across_devices=False,  # otherwise the loss is multiplied by the number of processes
        logging_steps=request.log_every,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        seed=request.seed,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=Folder(Path(request.root), AugmentConfig(**request.augment)),
        optimizers=build_optimizer(model, request),
        callbacks=[clock],
    )
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(request.out)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found = {"train_s": clock.seconds, "losses": losses, "request": asdict(request)}
        (Path(request.out) / RESULT).write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()  # a group that is left to the interpreter's end may abort the process


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m bench.huggingface '{...}' (started by launch/bench.py bench=trainers)")
    train(Request(**json.loads(sys.argv[1])))
