"""Optimizers and learning-rate schedules."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldalign import ops
from ldalign.system import distributed

Schedule = Literal["constant", "linear", "cosine"]
# what an optimizer may keep of a parameter; RMSprop keeps the square alone
AVERAGES = ("mean", "square")
ALPHA = 0.99  # RMSprop's share of the old average, torch's default: SPIN and DPO use it


class Optimizer(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), or RMSprop as SPIN and DPO use it (no momentum): one pass over
    memory a step.

    Weights and gradients are float32 or bfloat16, the averages of `state_dtype`. bfloat16 values
    are rounded at random (`ldalign.kernels.eager.adamw_`), with bits that depend on the seed, the
    step, the parameter's number and the place in the part of it that this rank holds: in bfloat16,
    and there alone, another number of ranks rounds otherwise. Sharded parameters (DTensor) are
    updated where they lie.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        name: Literal["adamw", "rmsprop"],
        learning_rate: float,
        betas: tuple[float, float],
        state_dtype: torch.dtype,
        seed: int,
    ) -> None:
        super().__init__(
            groups, {"lr": learning_rate, "betas": betas, "eps": 1e-8, "weight_decay": 0.0}
        )
        self.name, self.state_dtype, self.seed, self.steps = name, state_dtype, seed, 0

    @torch.no_grad()
    def step(self, factor: Tensor | None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient, by the gradient times `factor`.

        factor: () float32 on the parameters' device (`distributed.clip_grad_norm`), None for 1; it
        may be left in the gradients or not.
        """
        self.steps += 1
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is not None:
                    seed = (
                        self.seed * 0x9E3779B1 + self.steps * 0x85EBCA77 + number * 0xC2B2AE3D
                    ) % 2**32
                    self._update(
                        p, distributed.local(p), distributed.local(p.grad), factor, group, seed
                    )

    def _update(
        self,
        p: Tensor,
        weights: Tensor,
        grad: Tensor,
        factor: Tensor | None,
        group: dict[str, Any],
        seed: int,
    ) -> None:
        state = self.state[p]
        for name in AVERAGES if self.name == "adamw" else AVERAGES[1:]:
            if name not in state:
                state[name] = torch.zeros_like(weights, dtype=self.state_dtype)
        rate, decay, eps = group["lr"], group["weight_decay"], group["eps"]
        if self.name == "adamw":
            beta1, beta2 = group["betas"]
            ops.adamw_(
                weights,
                grad,
                state["mean"],
                state["square"],
                factor,
                rate,
                decay,
                beta1,
                beta2,
                eps,
                self.steps,
                seed,
            )
        else:
            ops.rmsprop_(weights, grad, state["square"], factor, rate, decay, ALPHA, eps, seed)


def make_optimizer(
    model: nn.Module,
    name: Literal["adamw", "rmsprop"],
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    state_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Optimizer:
    """The optimizer of a model's parameters that have requires_grad; vectors (norms, biases) are
    never decayed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return Optimizer(
        [g for g in groups if g["params"]], name, learning_rate, betas, state_dtype, seed
    )


def learning_rate_factor(step: int, steps: int, warmup_ratio: float, schedule: Schedule) -> float:
    """The factor on the peak learning rate at `step` (from 0) of `steps`.

    It climbs linearly over the first warmup_ratio of the steps, reaching 1 at their end and never
    starting at 0, then stays (constant) or falls to 0 at the end (linear, cosine).
    """
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[schedule]
