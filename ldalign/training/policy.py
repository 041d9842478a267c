"""Training the policy: what it hands to the optimizer loop, and its losses, SFT and weighted DPO.

SFT, SPIN and LD-Align differ in their pairs alone (a missing loser, weights of 1, weights from
latent distances). One model is held: the reference's log-probs are on the pairs. The loss is a sum
divided once, by a count fixed for the global batch: pairs, or response tokens for SFT.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ldalign import ops
from ldalign.data.pairs import Pair
from ldalign.kernels.loss_options import DPO, LossOptions
from ldalign.models.weights import LanguageModel
from ldalign.objective import preference_loss, winner_nll
from ldalign.system import distributed
from ldalign.system.distributed import Sharding
from ldalign.system.errors import NumericsError
from ldalign.system.metrics import Mean, in_words, peak_memory_gib
from ldalign.training.batches import Batch, count_steps, deal, pair_costs
from ldalign.training.checkpoint import CheckpointPlan, State
from ldalign.training.loop import LoopSettings, Step, optimize
from ldalign.training.optim import Schedule, make_optimizer
from ldalign.training.validation import ValidationPlan, Validator

# How far DPO's loss of step 0 may be from ln 2, where policy equals reference: the reference's
# log-probs were summed in batches of another shape, and a bf16 product depends on it. A wrong
# reference misses by far more.
STEP0_TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-6,
    torch.bfloat16: 2e-2,
    torch.float16: 2e-2,
}
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
    touched, and where step 0 does not start at ln 2 (IPO: 1/(4 beta^2)) although policy and
    reference are the same; EnvironmentProblem where memory does not suffice; Stopped where a
    signal asked to stop, between two steps.
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
    same = compute_dtype if preference and step0_is_reference else None
    task = _PolicyTask(model, pairs, settings, loop, device, stage, preference, same)
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


@dataclass
class _PolicyTask:
    """The policy's part of the loop (`loop.Task`): its gradient, and the metrics of its steps."""

    model: LanguageModel
    pairs: Sequence[Pair]
    settings: TrainSettings
    loop: LoopSettings
    device: torch.device
    stage: str
    preference: bool  # pairs have losers
    same: torch.dtype | None  # the compute dtype where the reference is the policy before step 0
    # Of the step under way: what micro-batches add up on this rank, and their means over all ranks.
    mean: Mean = field(default_factory=Mean)
    means: dict[str, float] = field(default_factory=dict)

    def batch(self, indices: np.ndarray) -> list[Pair]:
        return [self.pairs[i] for i in indices]

    def accumulate(self, epoch: int, indices: np.ndarray) -> float:
        self.mean = Mean()
        return accumulate_gradients(
            self.model,
            self.batch(indices),
            self.settings,
            self.mean,
            self.device,
            self.preference,
        )

    def check(self, step: int) -> None:
        self.means = self.mean.reduce(self.device)
        if step == 0 and self.same is not None:
            _check_step0(self.means, self.settings, self.same, self.stage)

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
    pairs: Sequence[Pair],
    settings: TrainSettings,
    mean: Mean,
    device: torch.device,
    preference: bool,
) -> float:
    """Adds the gradient of one global batch, split over ranks and micro-batches; returns its loss,
    over all ranks.
    """
    divisor = len(pairs) if preference else sum(len(pair.real) for pair in pairs)
    sizes = [pair.tokens for pair in pairs]
    costs = pair_costs(model, pairs)
    micros = deal(sizes, distributed.world_size(), settings.micro_tokens, costs)[distributed.rank()]
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    for i, micro in enumerate(micros):
        distributed.last_micro(model, i == len(micros) - 1, settings.sharding)
        # An empty micro-batch takes part in the collectives with a row that counts for nothing.
        batch = Batch.pack([pairs[j] for j in micro] or [pairs[0]], device)
        mean.muted = not micro
        loss = batch_loss(model, batch, settings, 1.0 / divisor if micro else 0.0, mean)
        loss.backward()
        total_loss += loss.detach().double()
    return float(distributed.total(total_loss))


def batch_loss(
    model: LanguageModel, batch: Batch, settings: TrainSettings, scale: float, mean: Mean
) -> Tensor:
    """scale times the summed loss of a micro-batch (), its metrics added to `mean`.

    The head runs inside the model's forward, where FSDP has gathered the output weight, and only
    where a response token is predicted. logits/chosen and logits/rejected are exact means over
    response tokens and vocabulary (the mean logit is the hidden state times the mean row of W);
    entropy and mean_token_accuracy are those of PROBED_TOKENS tokens spread evenly.
    """

    def head(hidden: Tensor, output_weight: Tensor) -> Tensor:
        hidden = hidden.index_select(0, batch.rows)  # (M, D) of the N tokens
        with torch.no_grad():
            _probe(hidden, output_weight, batch, mean)
        loss = _sft if batch.pairs[0].generated is None else _dpo
        return loss(hidden, output_weight, batch, settings, scale, mean)

    out = model(batch.ids, batch.layout, head)
    assert isinstance(out, Tensor)
    return out


def _sft(
    hidden: Tensor, output_weight: Tensor, batch: Batch, _: TrainSettings, scale: float, mean: Mean
) -> Tensor:
    """The loss () of SFT: scale times the summed -log-prob of the response tokens (M,).

    hidden (M, D), output_weight (V, D); the settings are read by `_dpo` alone.
    """
    loss, logps = ops.sft_loss(hidden, output_weight, batch.targets, scale)
    mean.add("nll", -logps)
    mean.add("len/chosen", torch.tensor(batch.lengths, dtype=torch.float64))
    return loss


def _dpo(
    hidden: Tensor,
    output_weight: Tensor,
    batch: Batch,
    settings: TrainSettings,
    scale: float,
    mean: Mean,
) -> Tensor:
    """The loss () of LD-Align: scale times the sum of `objective.dpo_loss` over the pairs, or of
    `objective.optional_loss` where the settings have other options.

    Here a pair's weight becomes a gradient: `ops.pair_loss` makes log-probs, loss and both
    gradients in one pass, each pair's with its `objective.dpo_coefficient`. hidden (M, D),
    output_weight (V, D).
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=hidden.device)

    pairs = batch.pairs
    reference = column([logp for p in pairs for logp in (p.ref_real, p.ref_generated)])  # (2P,)
    weights = column([p.weight for p in pairs])  # (P,), s
    loss, sums, metrics = ops.pair_loss(
        hidden,
        output_weight,
        batch.targets,
        batch.lengths,
        reference,
        weights,
        settings.beta,
        scale,
        settings.loss,
    )
    mean.add("loss/unweighted", metrics.pop("loss"))
    for name, values in metrics.items():
        mean.add(name, values)
    for name, values in (("logps/", sums), ("logps/ref_", reference)):
        real, generated = batch.split(values)
        mean.add(f"{name}chosen", real)
        mean.add(f"{name}rejected", generated)
    mean.add("weight/mean", weights)
    tokens, generated_tokens = batch.split(column(batch.lengths))
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


def _check_step0(
    means: Mapping[str, float], settings: TrainSettings, dtype: torch.dtype, stage: str
) -> None:
    """Raises NumericsError unless the loss without weights and NLL is what margins of 0 have: ln 2,
    or 1/(4 beta^2) of IPO. means: the step's metrics.
    """
    options, beta, loss = settings.loss, settings.beta, means["loss/unweighted"]
    none = torch.zeros((), dtype=torch.float64)
    expected = float(preference_loss(none, none + 1, beta, options))
    tolerance = STEP0_TOLERANCE[dtype]
    # The same margins of whole responses are allowed, whatever the options make of them. Near 0
    # DPO's loss changes by beta/2 a nat of margin, IPO's by 1/beta.
    if options.kind == "ipo":
        tolerance *= 2 / beta**2
    if options.length_normalised:
        tolerance /= (means["len/chosen"] + means["len/rejected"]) / 2
    if abs(loss - expected) > tolerance:
        named = "1/(4 beta^2)" if options.kind == "ipo" else "ln 2"
        raise NumericsError(
            f"{stage}: the unweighted loss of step 0 is {loss:.5f}, not {named} = {expected:.5f}: "
            "the cached reference log-probs are not those of the start policy; delete the "
            "reference stage of this iteration and run again"
        )


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
