"""Optimizers and learning-rate schedules."""

import math
from typing import Literal

import torch
from torch import nn

Schedule = Literal["constant", "linear", "cosine"]


def make_optimizer(
    model: nn.Module,
    name: Literal["adamw", "rmsprop"],
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) or RMSprop as SPIN and DPO use it (torch's defaults: alpha 0.99, no momentum).

    Vectors (norms, biases) are never decayed. The states live beside the float32 master weights, sharded like them.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "rmsprop":
        return torch.optim.RMSprop(groups, lr=learning_rate, foreach=True)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, foreach=True)


def learning_rate_factor(step: int, steps: int, warmup_ratio: float, schedule: Schedule) -> float:
    """The factor on the peak learning rate at `step` (from 0) of `steps`.

    It climbs linearly over the first warmup_ratio of the steps, reaching 1 at their end and never starting at 0, then
    stays (constant) or falls to 0 at the end (linear, cosine).
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[schedule]
