"""Training the policy: what it hands to the optimizer loop, and its losses, SFT and weighted DPO.

SFT, SPIN and LD-Align differ in their pairs alone (a missing loser, weights of 1, weights from
latent distances). One model is held: the reference's log-probs are on the pairs. The loss is a sum
divided once, by a count fixed for the global batch: pairs, or response tokens for SFT.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldalign import ops
from ldalign.data.pairs import Pair
from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.models.weights import LanguageModel
from ldalign.objective import winner_nll
from ldalign.system import distributed
from ldalign.system.distributed import Sharding
from ldalign.system.errors import NumericsError
from ldalign.system.metrics import Mean, in_words, peak_memory_gib
from ldalign.training.batches import Batch, count_steps, deal, pair_costs
from ldalign.training.checkpoint import CheckpointPlan, State
from ldalign.training.loop import LoopSettings, Step, optimize
from ldalign.training.optim import Schedule, make_optimizer
from ldalign.training.validation import ValidationPlan, Validator

# How far a response's log-prob may be from the reference's cached one at step 0, where policy
# equals reference: this times the square root of its tokens (and a few more), in nats. Each token's
# was rounded in a batch of another shape, on which a product's rounding depends, and such errors
# add up as a random walk does. bench/company.py measures them: far tails on few tokens, so
# one response may be that far off, many together by no more than STEP0_MANY of it. A wrong
# reference misses by far more.
STEP0_TOLERANCE = {
    torch.float64: 2e-4,  # the cached ones are float32
    torch.float32: 2e-4,
    torch.bfloat16: 0.5,
    torch.float16: 6e-2,
}
STEP0_SPARE_TOKENS = 15  # allowed beside: of one token's rounding errors some are far larger
STEP0_MANY = 0.3  # the share of the tolerance for the root mean square over many responses
NOT_THE_START = (
    "the cached reference log-probs are not those of the start policy; delete the reference stage "
    "of this iteration and run again"
)
LOWER_TO_TRAIN = (  # what to lower where memory does not suffice
    "lower training.micro_tokens or max_length, set training.checkpointing=full, "
    "training.whole=nothing or training.state_dtype=bfloat16, or use more ranks"
)
# entropy and token accuracy need logits: they are measured on this many tokens a micro-batch
PROBED_TOKENS = 64


@dataclass(frozen=True)
class TrainSettings:
    """What a training stage needs to know. Lengths of schedules follow from epochs
    and the number of pairs.
    """

    epochs: int
    global_batch: int  # pairs (rows, for SFT) an optimizer step, over all ranks and micro-batches
    micro_tokens: int  # token budget of one micro-batch on one rank
    learning_rate: float  # peak
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    schedule: Schedule = "linear"
    warmup_ratio: float = 0.1
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    beta: float = 0.1
    loss: LossOptions = DPO
    checkpointing: Literal["none", "selective", "full"] = "none"
    state_dtype: torch.dtype = torch.float32  # of the optimizer's averages
    sharding: Sharding = Sharding()
    # optimizer steps, in place of epochs: pairs are passed over as often as that takes
    steps: int | None = None
    max_steps: int | None = None  # stop early; the schedule still spans the whole


def train(
    model: LanguageModel,
    pairs: Sequence[Pair],
    settings: TrainSettings,
    *,
    compute_dtype: torch.dtype,
    device: torch.device,
    seed: int,
    stage: str,
    metrics_path: Path | None = None,
    step0_is_reference: bool = True,
    checkpoints: CheckpointPlan | None = None,
    validation: ValidationPlan | None = None,
) -> dict[str, float]:
    """Trains `model` (float32 master weights) in place on pairs; returns the metrics of the last
    epoch, averaged.

    All pairs have a loser, or none has (SFT). The model is sharded over all ranks on
    return (`distributed.full_state` gathers it). With `checkpoints` it goes on from the
    newest one that is there. With `validation` it is measured on the way, and may end early; the
    model returned is the last one, and `best_weights` are the best.

    Raises NumericsError, naming rows, on a non-finite loss or gradient before the weights are
    touched, and where a log-prob of step 0 is not the reference's although policy and reference are
    the same; EnvironmentProblem where memory does not suffice; Stopped where a signal asked to
    stop, between two steps.
    """
    if not pairs:
        raise ValueError("train: no pairs")
    preference = pairs[0].generated is not None
    for block in model.blocks:
        block.checkpointing = settings.checkpointing
    distributed.shard(model, model.blocks, compute_dtype, device, settings.sharding)
    model.train()  # no dropout in either architecture: this only marks the state
    optimizer = make_optimizer(
        model,
        settings.optimizer,
        settings.learning_rate,
        settings.weight_decay,
        state_dtype=settings.state_dtype,
        seed=seed,
    )
    in_epoch = count_steps(len(pairs), settings.global_batch, 1)
    steps = settings.steps or settings.epochs * in_epoch
    loop = LoopSettings(
        rows=len(pairs),
        global_batch=settings.global_batch,
        epochs=-(-steps // in_epoch),
        steps=steps,
        stop=min(steps, settings.max_steps or steps),
        learning_rate=settings.learning_rate,
        warmup_ratio=settings.warmup_ratio,
        schedule=settings.schedule,
        max_grad_norm=settings.max_grad_norm,
    )
    check = Step0(compute_dtype) if preference and step0_is_reference else None
    task = _PolicyTask(model, pairs, settings, loop, device, stage, check)
    validator = (
        None
        if validation is None
        else Validator(validation, model, loop.stop, settings.micro_tokens, device, stage)
    )
    state = optimize(
        model,
        optimizer,
        task,
        loop,
        seed=seed,
        stage=stage,
        lower=LOWER_TO_TRAIN,
        begin={"tokens": 0, "counted": 0, "sums": {}},
        metrics_path=metrics_path,
        checkpoints=checkpoints,
        validator=validator,
    )
    model.eval()
    means = {name: value / state["counted"] for name, value in state["sums"].items()}
    found = {} if validator is None else validator.summary(state)
    return means | {"tokens": state["tokens"], "steps": state["step"]} | found


class GlobalBatch(NamedTuple):
    """What one optimizer step reads on this rank."""

    divisor: int  # of the loss, over all ranks: pairs, or response tokens for SFT
    micros: int
    # Packed when asked for, the first one at once. False: its rows count for nothing.
    batches: Iterator[tuple[Batch, bool]]


def global_batch(
    model: LanguageModel, pairs: Sequence[Pair], settings: TrainSettings, device: torch.device
) -> GlobalBatch:
    """Splits the pairs of one optimizer step over ranks and micro-batches."""
    preference = pairs[0].generated is not None
    divisor = len(pairs) if preference else sum(len(pair.real) for pair in pairs)
    sizes = [pair.tokens for pair in pairs]
    costs = pair_costs(model, pairs)
    micros = deal(sizes, distributed.world_size(), settings.micro_tokens, costs)[distributed.rank()]
    batches = (
        # An empty micro-batch takes part in the collectives with a row that counts for nothing.
        (Batch.pack([pairs[j] for j in micro] or [pairs[0]], device), bool(micro))
        for micro in micros
    )
    return GlobalBatch(divisor, len(micros), itertools.chain([next(batches)], batches))


@dataclass
class Step0:
    """What the first step finds of policy and reference, where they are the same model."""

    dtype: torch.dtype  # what they compute in
    # Of this rank's micro-batches: the pairs, and (2 pairs,) log-probs minus the reference's.
    differences: list[tuple[Sequence[Pair], Tensor]] = field(default_factory=list)

    def check(self, stage: str) -> None:
        """Raises NumericsError where a response, or all of them together, are further from the
        reference than rounding explains. All ranks.
        """
        found = distributed.on_all(self._found)
        times, nats, allowed, name = max(worst for worst, *_ in found)
        if times > 1:
            raise NumericsError(
                f"{stage}: step 0: the log-prob of {name} is {nats:+.4f} nats from the cached "
                f"reference's, and rounding explains {allowed:.4f}: {NOT_THE_START}"
            )
        responses = sum(count for _, count, _, _ in found)
        squares = sum(of_rank for _, _, of_rank, _ in found)
        tokens = sum(of_rank for _, _, _, of_rank in found)
        off = (squares / responses) ** 0.5
        most = STEP0_MANY + (1 - STEP0_MANY) / responses**0.5
        allowed = most * STEP0_TOLERANCE[self.dtype] * (tokens / responses) ** 0.5
        if off > allowed:
            raise NumericsError(
                f"{stage}: step 0: the log-probs of {responses} responses are {off:.4f} nats from "
                f"the cached reference's (root mean square; most of all {name}), and rounding "
                f"explains {allowed:.4f}: {NOT_THE_START}"
            )

    def _found(self) -> tuple[tuple[float, float, float, str], int, float, int]:
        """This rank's response that is furthest off: (how many times what is allowed, nats, nats
        allowed, its name); its number of responses, the sum of the squares of their nats, and of
        their tokens, each with the spare ones.
        """
        each = [(0.0, 0.0, 0.0, "")]  # a rank may have no rows
        squares, tokens = 0.0, 0
        for pairs, differences in self.differences:
            nats = iter(differences.tolist())
            for pair in pairs:
                for side, response in zip(("real", "generated"), pair.responses, strict=True):
                    spared = len(response) + STEP0_SPARE_TOKENS
                    off, allowed = next(nats), STEP0_TOLERANCE[self.dtype] * spared**0.5
                    name = f"row {pair.id}'s {side} response ({len(response)} tokens)"
                    each.append((abs(off) / allowed, off, allowed, name))
                    squares, tokens = squares + off**2, tokens + spared
        return max(each), len(each) - 1, squares, tokens


@dataclass
class _PolicyTask:
    """The policy's part of the loop (`loop.Task`): its gradient, and the metrics of its steps."""

    model: LanguageModel
    pairs: Sequence[Pair]
    settings: TrainSettings
    loop: LoopSettings
    device: torch.device
    stage: str
    step0: Step0 | None  # where the reference is the policy before step 0, until that is done
    # Of the step under way: what micro-batches add up on this rank, and their means over all ranks.
    mean: Mean = field(default_factory=Mean)
    means: dict[str, float] = field(default_factory=dict)

    def batch(self, indices: np.ndarray) -> list[Pair]:
        return [self.pairs[i] for i in indices]

    def prepare(self, epoch: int, indices: np.ndarray) -> GlobalBatch:
        return global_batch(self.model, self.batch(indices), self.settings, self.device)

    def accumulate(
        self, batch: GlobalBatch, indices: np.ndarray, after_micro: Callable[[], object]
    ) -> Tensor:
        self.mean = Mean()
        loss = accumulate_gradients(
            self.model, batch, self.settings, self.mean, self.device, self.step0, after_micro
        )
        return torch.cat([loss[None], self.mean.totals(self.device)])

    def check(self, step: int, found: Sequence[float]) -> None:
        self.means = self.mean.means(found)
        if step == 0 and self.step0 is not None:
            self.step0.check(self.stage)
        self.step0 = None

    def record(self, step: Step, state: State) -> tuple[dict[str, float], str]:
        """Every step has a record. state: tokens read so far, and sums of this epoch's metrics,
        which the summary averages: the last one's, that is, or the one's in which training ended.
        """
        if state.setdefault("epoch", step.epoch) != step.epoch and not self.settings.max_steps:
            state |= {"epoch": step.epoch, "counted": 0, "sums": {}}
        in_epoch = count_steps(len(self.pairs), self.settings.global_batch, 1)
        tokens = sum(pair.tokens for pair in self.batch(step.indices))
        state["tokens"] += tokens
        record = {
            "global_step": step.number,
            "epoch": step.epoch + ((step.number - 1) % in_epoch + 1) / in_epoch,
            "learning_rate": step.learning_rate,
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            **self.means,
            "num_tokens": state["tokens"],
            "tokens_per_second": tokens / step.seconds,
            "time/step": step.seconds,
            "memory/peak_gib": peak_memory_gib(self.device),
        }
        state["counted"] += 1
        for name, value in {"loss": step.loss, **self.means}.items():
            state["sums"][name] = state["sums"].get(name, 0.0) + value
        return record, _line(record, self.loop.stop, step.left)

    def ids(self, indices: np.ndarray) -> list[str]:
        return [pair.id for pair in self.batch(indices)]

    def largest(self, indices: np.ndarray) -> str:
        longest = max(self.batch(indices), key=lambda pair: pair.tokens)
        return (
            f"a micro-batch of at most {self.settings.micro_tokens} tokens (the longest row of the "
            f"step, {longest.id}, has {longest.tokens})"
        )


def accumulate_gradients(
    model: LanguageModel,
    batch: GlobalBatch,
    settings: TrainSettings,
    mean: Mean,
    device: torch.device,
    step0: Step0 | None = None,
    after_micro: Callable[[], object] = lambda: None,
) -> Tensor:
    """Adds the gradient of this rank's share of a global batch; returns what it adds to the loss:
    () float64 on the device.

    step0: takes the differences from the reference. after_micro: called after each micro-batch.
    """
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    # On a GPU the host only queues work here, so that it packs a micro-batch while the device
    # computes the one before.
    for i, (micro, counts) in enumerate(batch.batches):
        distributed.last_micro(model, i == batch.micros - 1, settings.sharding)
        mean.muted = not counts
        scale = 1.0 / batch.divisor if counts else 0.0
        loss = batch_loss(model, micro, settings, scale, mean, step0 if counts else None)
        loss.backward()
        total_loss += loss.detach().double()
        after_micro()
    return total_loss


def batch_loss(
    model: LanguageModel,
    batch: Batch,
    settings: TrainSettings,
    scale: float,
    mean: Mean,
    step0: Step0 | None = None,
) -> Tensor:
    """scale times the summed loss of a micro-batch (), its metrics added to `mean`, and its pairs'
    differences from the reference to `step0`.

    The head runs inside the model's forward, where FSDP has gathered the output weight, and only
    where a response token is predicted. logits/chosen and logits/rejected are exact means over
    response tokens and vocabulary (the mean logit is the hidden state times the mean row of W);
    entropy and mean_token_accuracy are those of PROBED_TOKENS tokens spread evenly.
    """

    def head(hidden: Tensor, output_weight: Tensor) -> Tensor:
        hidden = hidden.index_select(0, batch.rows)  # (M, D) of the N tokens
        with torch.no_grad():
            _probe(hidden, output_weight, batch, mean)
        if batch.pairs[0].generated is None:
            return _sft(hidden, output_weight, batch, scale, mean)
        return _dpo(hidden, output_weight, batch, settings, scale, mean, step0)

    out = model(batch.ids, batch.layout, head)
    assert isinstance(out, Tensor)
    return out


def _sft(hidden: Tensor, output_weight: Tensor, batch: Batch, scale: float, mean: Mean) -> Tensor:
    """The loss () of SFT: scale times the summed -log-prob of the response tokens (M,).

    hidden (M, D), output_weight (V, D).
    """
    loss, logps = ops.sft_loss(hidden, output_weight, batch.targets, scale)
    mean.add("nll", -logps)
    mean.add("len/chosen", batch.tokens)
    return loss


def _dpo(
    hidden: Tensor,
    output_weight: Tensor,
    batch: Batch,
    settings: TrainSettings,
    scale: float,
    mean: Mean,
    step0: Step0 | None,
) -> Tensor:
    """The loss () of LD-Align: scale times the sum of `objective.dpo_loss` over the pairs, or of
    `objective.optional_loss` where the settings have other options.

    Here a pair's weight becomes a gradient: `ops.pair_loss` makes log-probs, loss and both
    gradients in one pass, each pair's with its `objective.dpo_coefficient`. hidden (M, D),
    output_weight (V, D).
    """
    loss, sums, metrics = ops.pair_loss(
        hidden,
        output_weight,
        batch.targets,
        batch.lengths,
        batch.reference,
        batch.weights,
        settings.beta,
        scale,
        settings.loss,
    )
    if step0 is not None:
        step0.differences.append((batch.pairs, sums.detach() - batch.reference))
    mean.add("loss/unweighted", metrics.pop("loss"))
    for name, values in metrics.items():
        mean.add(name, values)
    for name, values in (("logps/", sums), ("logps/ref_", batch.reference)):
        real, generated = batch.split(values)
        mean.add(f"{name}chosen", real)
        mean.add(f"{name}rejected", generated)
    mean.add("weight/mean", batch.weights)
    tokens, generated_tokens = batch.split(batch.tokens)
    mean.add("len/chosen", tokens)
    mean.add("len/rejected", generated_tokens)
    if settings.loss.nll:
        mean.add("nll/chosen", winner_nll(sums[0::2], tokens))
    return loss


def _probe(hidden: Tensor, output_weight: Tensor, batch: Batch, mean: Mean) -> None:
    """Adds what needs logits, which training does not make: mean logits, which a product with the
    mean row of the output weight gives, and entropy and accuracy on a few tokens.
    """
    targets = batch.targets  # (M,)
    mean_logit = (hidden @ output_weight.mean(0)).float()  # (M,)
    sums = ops.segment_sum(mean_logit, batch.lengths)  # (S,), a response each
    sides = 1 if batch.pairs[0].generated is None else 2
    for side, name in enumerate(("logits/chosen", "logits/rejected")[:sides]):
        mean.add(name, sums[side::sides].sum(), sum(batch.lengths[side::sides]))
    most = min(PROBED_TOKENS, len(targets))
    picked = torch.linspace(0, len(targets) - 1, most, device=targets.device).long()
    logp = (hidden[picked] @ output_weight.T).float().log_softmax(-1)  # (most, V)
    mean.add("entropy", -(logp.exp() * logp).sum(-1))
    mean.add("mean_token_accuracy", (logp.argmax(-1) == targets[picked]).double())


def _line(record: Mapping[str, float], steps: int, left: float) -> str:
    """The line of a step that a person reads: with a stage's name before it, at most 160
    characters. left: seconds.
    """
    shown: list[tuple[str, Callable[[float], str]]] = [
        ("loss", "loss {:.4f}".format),
        ("loss/unweighted", "unweighted {:.4f}".format),
        ("rewards/margins", "margin {:+.4f}".format),
        ("rewards/accuracies", "accuracy {:.2f}".format),
        ("grad_norm", "grad {:.2f}".format),
        ("learning_rate", "lr {:.1e}".format),
        ("tokens_per_second", "{:.0f} tokens/s".format),
        ("memory/peak_gib", "{:.1f} GiB".format),
    ]
    parts = [form(record[name]) for name, form in shown if name in record]
    if record["global_step"] < steps:
        parts.append(f"{in_words(left)} left")
    return f"step {record['global_step']}/{steps}  " + "  ".join(parts)
