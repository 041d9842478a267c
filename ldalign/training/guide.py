"""Training the guide on both responses of every pair, and the held-out losses that say what its
latent is worth.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldalign.models.guide import NO_LATENT, Example, Guide
from ldalign.system import distributed, interrupt
from ldalign.system.errors import InputError
from ldalign.system.memory import naming
from ldalign.system.metrics import MetricsLog, say
from ldalign.system.seeds import permutation, uniforms
from ldalign.training.batches import count_steps, deal, global_batches
from ldalign.training.checkpoint import Checkpoints, Plan, State
from ldalign.training.loop import forget_refused_step, refuse_step
from ldalign.training.optim import learning_rate_factor, make_optimizer

# What helps where memory does not suffice.
LOWER = "lower training.micro_tokens, guide.max_tokens or guide.width, or use more ranks"


@dataclass(frozen=True)
class GuideTrainSettings:
    """The guide's own schedule: AdamW, warm-up, cosine."""

    epochs: int
    global_batch: int  # rows an optimizer step; each row gives two examples
    learning_rate: float
    micro_tokens: int
    heldout_fraction: float = 0.1
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0


def train_guide(
    guide: Guide,
    rows: Sequence[tuple[Example, Example]],
    settings: GuideTrainSettings,
    *,
    device: torch.device,
    seed: int,
    metrics_path: Path | None = None,
    ids: Sequence[str] | None = None,
    checkpoints: Plan | None = None,
) -> dict[str, float]:
    """Minimises -mean log D(y | x, E(x, y)) - mean log D(y' | x, E(x, y')), per response token
    (paper, section 4.1).

    rows: each row's real and generated response, tokenised by `guide.example`. Returns the held-out
    losses (see `heldout_losses`), and tokens: prompt and response of every example trained on, over
    all epochs. All ranks take part; the guide is sharded on return. With `checkpoints` it goes on
    from the newest one that is there. ids: of the rows, for errors. Raises NumericsError on a
    non-finite step, before the weights are touched; EnvironmentProblem where memory does not
    suffice; Stopped where a signal asked to stop.
    """
    # two, for each to be the other's "another row"
    heldout = max(2, round(len(rows) * settings.heldout_fraction))
    if heldout >= len(rows):
        raise InputError(
            f"guide: {len(rows)} rows are too few to hold any out; use at least 3 (max_rows)"
        )
    order = permutation(seed, "guide/heldout", len(rows))
    unseen, seen = [rows[i] for i in order[:heldout]], [int(i) for i in order[heldout:]]
    distributed.shard(guide, guide.blocks, torch.float32, device)
    guide.train()
    optimizer = make_optimizer(
        guide, "adamw", settings.learning_rate, settings.weight_decay, (0.9, 0.98)
    )
    steps = count_steps(len(seen), settings.global_batch, settings.epochs)
    metrics_log = MetricsLog(metrics_path, "guide")
    keeper = Checkpoints(checkpoints, guide, optimizer, metrics_path)
    state: State = keeper.resume() or {"step": 0}
    forget_refused_step(metrics_path)
    began = time.perf_counter()
    tokens = 0
    with interrupt.held():
        for step, (epoch, batch) in enumerate(
            global_batches(len(seen), settings.global_batch, settings.epochs, seed)
        ):
            tokens += sum(len(e.prompt) + len(e.response) for i in batch for e in rows[seen[i]])
            if step < state["step"]:
                continue
            keyed = [(rows[seen[i]], f"guide/{epoch}/{seen[i]}") for i in batch]
            with naming(lambda: _too_large(keyed, settings, step), LOWER):  # noqa: B023 (called at once)
                loss = accumulate_gradients(guide, keyed, settings.micro_tokens, seed, device)
                norm = float(distributed.clip_grad_norm(guide, settings.max_grad_norm))
            if not np.isfinite(loss) or not np.isfinite(norm):
                keeper.write(step, state)
                names = [ids[seen[i]] if ids else f"row {seen[i]}" for i in batch]
                refuse_step(names, "guide", step, loss, norm, metrics_path)
            factor = learning_rate_factor(step, steps, settings.warmup_ratio, "cosine")
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            with naming(lambda: _too_large(keyed, settings, step), LOWER):  # noqa: B023
                optimizer.step()
            optimizer.zero_grad()
            state["step"] = step + 1
            record = {
                "global_step": step + 1,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": settings.learning_rate * factor,
            }
            if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
                text = (
                    f"step {step + 1}/{steps}  loss {loss:.4f}  {time.perf_counter() - began:.0f} s"
                )
                metrics_log.write(record, text)
            keeper.after_step(step + 1, step + 1 == steps, state)
    guide.eval()
    losses = heldout_losses(guide, unseen, settings.micro_tokens, device)
    text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
    metrics_log.write(losses, f"held-out nats/token: {text}")
    if losses["latent_gain"] <= 0:
        say(
            f"guide: WARNING: latent_gain is {losses['latent_gain']:.4f}, not positive: the "
            "decoder ignores the latent and distances say nothing; raise guide.epochs, "
            "guide.latent_tokens or guide.token_dropout, or add data"
        )
    return losses | {"tokens": tokens}


def _too_large(
    keyed: Sequence[tuple[tuple[Example, Example], str]], settings: GuideTrainSettings, step: int
) -> str:
    return (
        f"step {step + 1}: a micro-batch of at most {settings.micro_tokens} tokens (the longest "
        f"row of the step takes {max(sum(_costs(row)) for row, _ in keyed)})"
    )


def accumulate_gradients(
    guide: Guide,
    keyed: Sequence[tuple[tuple[Example, Example], str]],
    budget: int,
    seed: int,
    device: torch.device,
) -> float:
    """The gradient of one global batch, split over ranks and micro-batches; returns its loss in
    nats per token.

    Both examples of a row stay together: the encoder reads their prompt once.
    """
    divisor = sum(len(example.response) for row, _ in keyed for example in row)
    plan = deal([sum(_costs(row)) for row, _ in keyed], distributed.world_size(), budget)[
        distributed.rank()
    ]
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, micro in enumerate(plan):
        distributed.last_micro(guide, i == len(plan) - 1)
        chosen = [keyed[j] for j in micro] or [keyed[0]]
        kept, hidden = [], []
        for row, key in chosen:
            for side, example in enumerate(row):
                # Dropout depends on row and side alone, so neither ranks nor micro-batches change
                # it.
                draw = uniforms(seed, f"{key}/{side}", 1 + len(example.response))
                kept.append(draw[0] >= guide.config.latent_dropout)
                hidden.append(draw[1:] < guide.config.token_dropout)
        dropout = (
            torch.tensor(kept, device=device),
            torch.from_numpy(np.concatenate(hidden)).to(device),
        )
        scale = 1.0 / divisor if micro else 0.0
        loss: Tensor = guide([e for row, _ in chosen for e in row], dropout=dropout, scale=scale)
        loss.backward()
        total += loss.detach().double()
    return float(distributed.total(total))


@torch.no_grad()
def heldout_losses(
    guide: Guide, rows: Sequence[tuple[Example, Example]], budget: int, device: torch.device
) -> dict[str, float]:
    """Reconstruction losses, nats per response token, of rows the guide has not seen, the decoder
    reading all tokens.

    true: with the row's own latent; other: with another row's (of the same side, real or
    generated); none: with zeros. latent_gain = other - true. sibling_gain: the same difference with
    the latent of the row's own other response, over the rows whose two responses differ (0 where
    none does): what z says beyond the prompt. Needs at least two rows. Every rank computes them
    all.
    """
    n = len(rows)
    wanted = -(-sum(_costs([e for row in rows for e in row])) // budget)
    sums = dict.fromkeys(("true", "other", "none", "sibling", "true_of_differing"), 0.0)
    tokens = differing = 0
    # Runs of nearly the same size, of two rows at least.
    for indices in np.array_split(np.arange(n), max(1, min(wanted, n // 2))):
        run, m = [rows[i] for i in indices], len(indices)
        examples = [row[side] for side in (0, 1) for row in run]
        whose: dict[str, list[int] | None] = {
            "true": None,
            "other": [*range(1, m), 0, *range(m + 1, 2 * m), m],
            "none": [NO_LATENT] * (2 * m),
            "sibling": [*range(m, 2 * m), *range(m)],
        }
        counts = [len(e.response) for e in examples]
        differ = torch.tensor([a.response != b.response for a, b in run] * 2, device=device)
        differ = differ.repeat_interleave(torch.tensor(counts, device=device))
        for name, latents_of in whose.items():
            logps: Tensor = guide(examples, latents_of=latents_of)
            sums[name] -= float((logps * differ if name == "sibling" else logps).double().sum())
            if name == "true":
                sums["true_of_differing"] -= float((logps * differ).double().sum())
        tokens += sum(counts)
        differing += int(differ.sum())
    losses = {name: sums[name] / tokens for name in ("true", "other", "none")}
    sibling_gain = (sums["sibling"] - sums["true_of_differing"]) / max(1, differing)
    return losses | {"latent_gain": losses["other"] - losses["true"], "sibling_gain": sibling_gain}


def _costs(examples: Sequence[Example]) -> list[int]:
    return [2 * (len(e.prompt) + len(e.response)) for e in examples]
