"""Training the guide on both responses of every pair (`ldalign.evaluation.guide` says what came of
it).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldalign.data.pairs import Chosen, Pair
from ldalign.models.guide import Counts, Guide, GuideLoss, Latent, States, joined, longest_first
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.memory import naming
from ldalign.system.metrics import Bar, in_words, peak_memory_gib
from ldalign.system.seeds import normals, permutation, uniforms
from ldalign.system.transfer import to_device
from ldalign.training.batches import count_steps, deal
from ldalign.training.checkpoint import CheckpointPlan, State
from ldalign.training.latent_map import LatentMap, fit, standardise
from ldalign.training.loop import LoopSettings, Step, optimize
from ldalign.training.optim import make_optimizer

# What to lower where memory does not suffice.
LOWER_TO_TRAIN_GUIDE = "lower training.micro_tokens or guide.max_tokens, or use more ranks"
KEPT_BYTES = 2 * 2**30  # most that a frozen tower's states may take, kept from epoch to epoch


@dataclass(frozen=True)
class GuideTrainSettings:
    """The guide's own schedule: AdamW, warm-up, cosine."""

    epochs: int
    global_batch: int  # pairs an optimizer step
    learning_rate: float
    micro_tokens: int
    loss: GuideLoss = GuideLoss()
    latent_map: LatentMap = "drawn"
    weight_decay: float = 0.01
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0


def heldout_count(rows: int, fraction: float) -> int:
    """Returns how many of the rows are held out: `fraction` of them, and at least two, for each to
    be the other's "another row".
    """
    return max(2, round(rows * fraction))


def split(
    pairs: Sequence[Pair], fraction: float, seed: int, stage: str = "guide"
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Returns the pairs that are trained on and those that are held out (`heldout_count`).

    Raises InputError where none is left to train on.
    """
    heldout = heldout_count(len(pairs), fraction)
    if heldout >= len(pairs):
        raise InputError(
            f"guide: {len(pairs)} rows are too few to hold any out; use at least 3 (max_rows)"
        )
    order = permutation(seed, f"{stage}/heldout", len(pairs))
    return Chosen(pairs, order[heldout:]), Chosen(pairs, order[:heldout])


def train_guide(
    guide: Guide,
    pairs: Sequence[Pair],
    settings: GuideTrainSettings,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    seed: int,
    stage: str = "guide",
    metrics_path: Path | None = None,
    checkpoints: CheckpointPlan | None = None,
    states: list[States] | None = None,
) -> int:
    """Minimises `Guide.loss` over both responses of every pair; returns how many tokens that were,
    over all epochs.

    pairs: in the guide's token ids. states: of each, where the caller has them (`keep_states`). All
    ranks take part; the guide is sharded on return. With `checkpoints` it goes on from the newest
    one that is there. Raises NumericsError on a non-finite step, before the weights are touched;
    EnvironmentProblem where memory does not suffice; Stopped where a signal asked to stop.
    """
    if states is None and keeps_states(guide, pairs, settings, compute_dtype):
        states = keep_states(guide, pairs, settings.micro_tokens)
    _begin_map(guide, pairs, settings, states)
    distributed.shard(
        guide,
        guide.blocks,
        compute_dtype,
        device,
        methods=("loss",),
        exact={guide.latent: Latent.METHODS},
    )
    guide.train()
    optimizer = make_optimizer(
        guide, "adamw", settings.learning_rate, settings.weight_decay, (0.9, 0.98)
    )
    steps = count_steps(len(pairs), settings.global_batch, settings.epochs)
    loop = LoopSettings(
        rows=len(pairs),
        global_batch=settings.global_batch,
        epochs=settings.epochs,
        steps=steps,
        stop=steps,
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        schedule="cosine",
        max_grad_norm=settings.max_grad_norm,
    )
    with Bar(f"{stage}: training", steps, "steps") as progress:
        optimize(
            guide,
            optimizer,
            _GuideTask(guide, pairs, settings, steps, device, seed, stage, states, progress),
            loop,
            seed=seed,
            stage=stage,
            lower=LOWER_TO_TRAIN_GUIDE,
            begin={},
            metrics_path=metrics_path,
            checkpoints=checkpoints,
        )
    guide.eval()
    return settings.epochs * sum(pair.tokens for pair in pairs)


def _begin_map(
    guide: Guide,
    pairs: Sequence[Pair],
    settings: GuideTrainSettings,
    states: Sequence[States] | None,
) -> None:
    """Sets the map to the latent, the same on all ranks, before any is sharded."""
    linear, budget = guide.latent.to_latent, settings.micro_tokens

    def begin() -> list[Tensor]:
        with naming(lambda: f"the guide's states of {len(pairs)} rows", LOWER_TO_TRAIN_GUIDE):
            if settings.latent_map == "drawn":
                standardise(guide, pairs, budget)
            else:
                fit(guide, pairs, states, budget)
        return [p.detach().cpu() for p in linear.parameters()]

    with torch.no_grad():
        for p, value in zip(linear.parameters(), distributed.on_rank0(begin), strict=True):
            p.copy_(value)
    guide.latent.fixed = settings.latent_map == "fitted"


@dataclass
class _GuideTask:
    """The guide's part of the loop (`loop.Task`)."""

    guide: Guide
    pairs: Sequence[Pair]  # that are trained on
    settings: GuideTrainSettings
    steps: int
    device: torch.device
    seed: int
    stage: str
    states: list[States] | None  # of each pair, where they are kept (`keep_states`)
    progress: Callable[[int, int], None]  # gets steps, and new tokens
    done: int = 0  # steps that `progress` knows of
    tokens: int = 0  # since the last record, and the seconds that they took
    seconds: float = 0.0

    def prepare(self, epoch: int, indices: np.ndarray) -> "GlobalBatch":
        chosen = [self.pairs[i] for i in indices]
        # The key of a pair's draws: the same whatever the ranks and micro-batches.
        keys = [f"{self.stage}/{epoch}/{pair.id}" for pair in chosen]
        return global_batch(self.guide, chosen, keys, self.settings, self.seed)

    def accumulate(
        self, batch: "GlobalBatch", indices: np.ndarray, after_micro: Callable[[], object]
    ) -> Tensor:
        known = None if self.states is None else [self.states[i] for i in indices]
        return accumulate_gradients(
            self.guide, batch, self.settings, self.device, known, after_micro
        )[None]

    def check(self, step: int, found: Sequence[float]) -> None:
        """Nothing is known of a guide's first step."""

    def record(self, step: Step, state: State) -> tuple[dict[str, float], str] | None:
        """Twenty records over the whole training."""
        self.progress(step.number - self.done, 0)  # at once with what an earlier start did
        self.done = step.number
        self.tokens += sum(self.pairs[i].tokens for i in step.indices)
        self.seconds += step.seconds
        if step.number % max(1, self.steps // 20) and step.number != self.steps:
            return None
        record = {
            "global_step": step.number,
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            "learning_rate": step.learning_rate,
        }
        shown = [
            f"step {step.number}/{self.steps}",
            f"loss {step.loss:.4f}",
            f"grad {step.grad_norm:.2f}",
            f"lr {step.learning_rate:.1e}",
            f"{self.tokens / self.seconds:.0f} tokens/s",
            f"{peak_memory_gib(self.device):.1f} GiB",
        ]
        if step.number < self.steps:
            shown.append(f"{in_words(step.left)} left")
        self.tokens, self.seconds = 0, 0.0
        return record, "  ".join(shown)

    def ids(self, indices: np.ndarray) -> list[str]:
        return [self.pairs[i].id for i in indices]

    def largest(self, indices: np.ndarray) -> str:
        longest = max(self.pairs[i].tokens for i in indices)
        return (
            f"a micro-batch of at most {self.settings.micro_tokens} tokens (the longest row of the "
            f"step takes {longest})"
        )


class GlobalBatch(NamedTuple):
    """What one optimizer step reads, as far as it is known before a micro-batch is packed."""

    pairs: Sequence[Pair]
    draws: "list[_Draw]"  # of each pair
    counts: Counts
    micros: list[list[int]]  # of this rank: which of the pairs


def global_batch(
    guide: Guide,
    pairs: Sequence[Pair],
    keys: Sequence[str],
    settings: GuideTrainSettings,
    seed: int,
) -> GlobalBatch:
    """Draws for the pairs of one optimizer step, and splits them over ranks and micro-batches.

    keys: what the draws of each pair depend on, beside the seed.
    """
    what = settings.loss
    draws = [_draw(guide, pair, key, what, seed) for pair, key in zip(pairs, keys, strict=True)]
    contrasted = [
        sum(len(places) for places, kept in zip(draw.tokens, draw.kept, strict=True) if kept)
        for pair, draw in zip(pairs, draws, strict=True)
        if what.contrast and pair.differs
    ]
    counts = Counts(
        sum(len(draw.tokens[0]) for draw in draws),
        sum(len(draw.tokens[1]) for draw in draws),
        max(1, sum(contrasted)),
    )
    sizes = [pair.tokens for pair in pairs]
    micros = deal(sizes, distributed.world_size(), settings.micro_tokens)[distributed.rank()]
    return GlobalBatch(pairs, draws, counts, micros)


def accumulate_gradients(
    guide: Guide,
    batch: GlobalBatch,
    settings: GuideTrainSettings,
    device: torch.device,
    known: Sequence[States] | None = None,
    after_micro: Callable[[], object] = lambda: None,
) -> Tensor:
    """Adds the gradient of this rank's share of a global batch; returns what it adds to the loss:
    () float64 on the device.

    known: the states of each pair, where they are kept. after_micro: called after each micro-batch.
    """
    what, (pairs, draws, counts, plan) = settings.loss, batch
    total = torch.zeros((), dtype=torch.float64, device=device)
    for i, micro in enumerate(plan):
        distributed.last_micro(guide, i == len(plan) - 1)
        # An empty micro-batch takes part in the collectives with a pair that counts for nothing.
        chosen = list(micro) or [0]
        hidden = noise = None
        if what.token_dropout:
            hidden = torch.cat([draws[j].hidden for j in chosen])
        if what.latent_noise:
            (drawn,) = to_device(device, torch.cat([draws[j].noise for j in chosen]))
            noise = what.latent_noise * drawn
        kept = [keep for j in chosen for keep in draws[j].kept]
        tokens = [places for j in chosen for places in draws[j].tokens]
        states = None
        if known is not None:
            states = joined([known[j] for j in chosen])
        loss = guide.loss(
            [pairs[j] for j in chosen], kept, tokens, hidden, noise, what, counts, states
        )
        loss = loss * (1.0 if micro else 0.0)
        loss.backward()
        total += loss.detach().double()
        after_micro()
    return total


def keeps_states(
    guide: Guide,
    pairs: Sequence[Pair],
    settings: GuideTrainSettings,
    compute_dtype: torch.dtype,
) -> bool:
    """Says whether the states of all pairs are made once, and not in every epoch: they are the same
    in each where the tower is frozen, in the dtype that it computes in, and no token hidden. Not
    where they would take more than KEPT_BYTES, and not on several ranks, each of which would have
    to make them all.
    """
    weight = guide.encoder.output_weight
    size = sum(len(y) for p in pairs for y in p.responses) * weight.shape[1] * weight.element_size()
    same = guide.one_pass and weight.dtype == compute_dtype and not settings.loss.token_dropout
    return same and settings.epochs > 1 and size <= KEPT_BYTES and distributed.world_size() == 1


@torch.no_grad()
def keep_states(guide: Guide, pairs: Sequence[Pair], budget: int) -> list[States]:
    """Returns the states of every pair, made by a tower that is not trained; budget: the most
    tokens at a time.
    """
    kept: dict[int, States] = {}
    with Bar("guide: states", len(pairs), "rows") as progress:
        for run in longest_first([pair.tokens for pair in pairs], budget):
            with naming(lambda: f"the guide's states of {len(pairs)} rows", LOWER_TO_TRAIN_GUIDE):
                read, before = guide.states([pairs[i] for i in run])
            lengths = [sum(map(len, pairs[i].responses)) for i in run]
            for i, two, own in zip(run, read.split(2), before.split(lengths), strict=True):
                kept[i] = States(two.clone(), own.clone())
            progress(len(run), 0)
    return [kept[i] for i in range(len(pairs))]


@dataclass(frozen=True)
class _Draw:
    """What chance says of one pair in one epoch."""

    kept: list[bool]  # of each response: read with its latent
    tokens: list[Sequence[int]]  # of each response: the places of the tokens that count
    hidden: Tensor  # (tokens of both responses,) bool: those the decoder may not read
    noise: Tensor  # (2, Z), or empty


def _draw(guide: Guide, pair: Pair, key: str, what: GuideLoss, seed: int) -> _Draw:
    """Draws depend on pair and side alone, so neither ranks nor micro-batches change them."""
    kept, hidden, noise = [], [], []
    tokens: list[Sequence[int]] = []
    for side, response in enumerate(pair.responses):
        draw = uniforms(seed, f"{key}/{side}", 2 + len(response))
        kept.append(bool(draw[0] >= what.latent_dropout))
        hidden.append(torch.from_numpy(draw[2:] < what.token_dropout * draw[1]))
        tokens.append(range(len(response)))
        if what.tokens is not None and what.tokens < len(response):
            order = permutation(seed, f"{key}/{side}/tokens", len(response))
            tokens[-1] = sorted(order[: what.tokens].tolist())
        if what.latent_noise:
            width = guide.config.latent_tokens * guide.config.latent_width
            noise.append(normals(seed, f"{key}/{side}/noise", width))
    return _Draw(kept, tokens, torch.cat(hidden), torch.stack(noise) if noise else torch.zeros(0))
