"""Training the guide on both responses of every pair, and the held-out losses that say what its
latent is worth.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldalign.models.guide import NO_LATENT, Example, Guide
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.metrics import MetricsLog, say
from ldalign.system.seeds import permutation, uniforms
from ldalign.training.batches import count_steps, deal
from ldalign.training.checkpoint import CheckpointPlan, State
from ldalign.training.loop import LoopSettings, Step, optimize
from ldalign.training.optim import make_optimizer

# What to lower where memory does not suffice.
LOWER_TO_TRAIN_GUIDE = (
    "lower training.micro_tokens, guide.max_tokens or guide.width, or use more ranks"
)


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
    checkpoints: CheckpointPlan | None = None,
) -> dict[str, float]:
    """Minimises `objective.reconstruction_loss` over both responses of every row.

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
    distributed.shard(guide, guide.blocks, torch.float32, device, methods=("loss",))
    guide.train()
    optimizer = make_optimizer(
        guide, "adamw", settings.learning_rate, settings.weight_decay, (0.9, 0.98)
    )
    steps = count_steps(len(seen), settings.global_batch, settings.epochs)
    loop = LoopSettings(
        rows=len(seen),
        global_batch=settings.global_batch,
        epochs=settings.epochs,
        steps=steps,
        stop=steps,
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        schedule="cosine",
        max_grad_norm=settings.max_grad_norm,
    )
    optimize(
        guide,
        optimizer,
        _GuideTask(guide, rows, seen, settings, steps, device, seed, ids),
        loop,
        seed=seed,
        stage="guide",
        lower=LOWER_TO_TRAIN_GUIDE,
        begin={},
        metrics_path=metrics_path,
        checkpoints=checkpoints,
    )
    guide.eval()
    losses = heldout_losses(guide, unseen, settings.micro_tokens, device)
    text = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
    MetricsLog(metrics_path, "guide").write(losses, f"held-out nats/token: {text}")
    if losses["latent_gain"] <= 0:
        say(
            f"guide: WARNING: latent_gain is {losses['latent_gain']:.4f}, not positive: the "
            "decoder ignores the latent and distances say nothing; raise guide.epochs, "
            "guide.latent_tokens or guide.token_dropout, or add data"
        )
    tokens = sum(len(e.prompt) + len(e.response) for i in seen for e in rows[i])
    return losses | {"tokens": settings.epochs * tokens}


@dataclass
class _GuideTask:
    """The guide's part of the loop (`loop.Task`)."""

    guide: Guide
    rows: Sequence[tuple[Example, Example]]
    seen: Sequence[int]  # the rows that are trained on, by their numbers in `rows`
    settings: GuideTrainSettings
    steps: int
    device: torch.device
    seed: int
    names: Sequence[str] | None  # of all rows, for errors
    began: float = field(default_factory=time.perf_counter)

    def accumulate(self, epoch: int, indices: np.ndarray) -> float:
        # The key of a row's dropout: the same whatever the ranks and micro-batches.
        keyed = [(self.rows[self.seen[i]], f"guide/{epoch}/{self.seen[i]}") for i in indices]
        budget = self.settings.micro_tokens
        return accumulate_gradients(self.guide, keyed, budget, self.seed, self.device)

    def check(self, step: int) -> None:
        """Nothing is known of a guide's first step."""

    def record(self, step: Step, state: State) -> tuple[dict[str, float], str] | None:
        """Twenty records over the whole training."""
        if step.number % max(1, self.steps // 20) and step.number != self.steps:
            return None
        record = {
            "global_step": step.number,
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
        }
        seconds = time.perf_counter() - self.began
        return record, f"step {step.number}/{self.steps}  loss {step.loss:.4f}  {seconds:.0f} s"

    def ids(self, indices: np.ndarray) -> list[str]:
        rows = [self.seen[i] for i in indices]
        return [self.names[i] if self.names else f"row {i}" for i in rows]

    def largest(self, indices: np.ndarray) -> str:
        longest = max(sum(_costs(self.rows[self.seen[i]])) for i in indices)
        return (
            f"a micro-batch of at most {self.settings.micro_tokens} tokens (the longest row of the "
            f"step takes {longest})"
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
        loss = guide.loss([e for row, _ in chosen for e in row], *dropout, scale)
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
    generated); none: with zeros. latent_gain = other - true. sibling_gain: the same
    difference with the latent of the row's own other response, over the rows whose two
    responses differ (0 where none does): what z says beyond the prompt. Needs at least two
    rows. Every rank computes them all.
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
