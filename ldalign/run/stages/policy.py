"""The stage policy: a policy that is trained, by SFT (sft/policy, continual_sft/policy) or on an
iteration's pairs (iteration_t/policy). Its folder is a model folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ldalign.data.pairs import Pair, Pairs
from ldalign.data.store import data_hash
from ldalign.data.tokenizer_export import COPIED_FILES
from ldalign.evaluation.held_out import EvaluationSettings, greedy_accuracy
from ldalign.generation.sampling import Sampling
from ldalign.models.mistral import Mistral
from ldalign.models.weights import LanguageModel, load_model, save_model
from ldalign.run.context import Context, checkpoint_plan, file_hash, named_keys
from ldalign.run.keys import SftKeys
from ldalign.run.manifest import CHECKPOINTS, Parents, hash_model_folder, hash_settings
from ldalign.run.settings import RunConfig
from ldalign.run.stage import Cost, Stage
from ldalign.run.stages.reference import LOGPS, REFERENCE_STAGE
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.metrics import Metrics
from ldalign.training.batches import count_steps
from ldalign.training.policy import TrainSettings, train
from ldalign.training.validation import ValidationPlan, best_weights, evaluations

SFT = ("sft", "continual_sft")  # the policies that are trained by SFT, and their groups of keys
SCHEDULE_KEYS = (
    "training.schedule",
    "training.warmup_ratio",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.master_dtype",
    "training.state_dtype",
)


def _cost(ctx: Context, name: str) -> Cost:
    config, training = ctx.config, ctx.config.training
    group = name.partition("/")[0]
    if group in SFT:
        sft: SftKeys = getattr(config, group)
        rows = ctx.train.pairs[: sft.rows]
        trained = sft.epochs * int(rows.tokens.sum())
        steps = count_steps(len(rows), sft.global_batch, sft.epochs)
    else:
        pairs = ctx.used[1]
        both = ctx.used_tokens
        steps = training.steps or count_steps(len(pairs), config.global_batch, training.epochs)
        trained = both * steps * config.global_batch // max(1, len(pairs))
    averages = 2 if group in SFT or training.optimizer == "adamw" else 1
    copied = [ctx.start / file for file in COPIED_FILES if (ctx.start / file).is_file()]
    written = ctx.parameters * _bytes(config.policy_dtype)
    weight_and_averages = _bytes(training.master_dtype) + averages * _bytes(training.state_dtype)
    measured = evaluations(config.validation.every, steps) if ctx.validation.rows else 0
    answered = checkable(ctx) if config.validation.metric == "accuracy" else []
    keeps = ctx.select == "best" and measured > 0
    return Cost(
        trained=trained,
        scored=measured * int(ctx.validation.pairs.tokens.sum()),
        generated=measured * sum(len(ctx.validation.pairs[i].real) for i in answered),
        steps=steps,
        kept=written + sum(path.stat().st_size for path in copied),
        checkpoint=ctx.parameters * weight_and_averages,
        # Of the first evaluation nothing is kept, and the last one's weights are the result.
        best=written if keeps else 0,
        bests=max(0, measured - 2) if keeps else 0,
    )


def _bytes(dtype: Literal["float32", "bfloat16"]) -> int:
    return 4 if dtype == "float32" else 2


POLICY_STAGE = Stage("policy", _cost)


# ---------------------------------------------------------------------------------------------- SFT


def start_stage(ctx: Context) -> Path:
    """Returns the folder of the policy that self-play starts from: the given one, after SFT where
    the config asks for it.
    """
    return sft_stage(ctx, "sft", ctx.start) if ctx.config.sft.epochs else ctx.start


def start_name(config: RunConfig) -> str:
    """The name of the start policy in the run folder and the table."""
    return "sft" if config.sft.epochs else "start"


def planned_start(config: RunConfig) -> list[str]:
    """The name of the stage that `start_stage` makes; none where it makes none."""
    return [POLICY_STAGE.folder("sft")] if config.sft.epochs else []


def sft_stage(ctx: Context, group: Literal["sft", "continual_sft"], start: Path) -> Path:
    """Fine-tunes `start` on real responses by one group of config keys;
    returns the policy's folder.
    """
    sft: SftKeys = getattr(ctx.config, group)
    rows, pairs = ctx.train.rows[: sft.rows], ctx.train.pairs[: sft.rows]
    settings = replace(
        _train_settings(ctx),
        epochs=sft.epochs,
        learning_rate=sft.learning_rate,
        global_batch=sft.global_batch,
        optimizer="adamw",
    )
    keys = ctx.keys(
        f"{group}.epochs", f"{group}.learning_rate", f"{group}.global_batch", "max_length"
    )
    return _train_stage(
        ctx, POLICY_STAGE.folder(group), start, pairs, settings, {"data": data_hash(rows), **keys}
    )


def _train_settings(ctx: Context) -> TrainSettings:
    c, t = ctx.config, ctx.config.training
    return TrainSettings(
        epochs=t.epochs,
        global_batch=c.global_batch,
        micro_tokens=t.micro_tokens,
        learning_rate=c.at("learning_rate", 0),
        optimizer=t.optimizer,
        schedule=t.schedule,
        warmup_ratio=t.warmup_ratio,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        checkpointing=t.checkpointing,
        state_dtype=getattr(torch, t.state_dtype),
        sharding=distributed.Sharding(t.shard_ranks, t.whole),
    )


def _train_stage(
    ctx: Context,
    name: str,
    start: Path,
    pairs: Sequence[Pair],
    settings: TrainSettings,
    parents: Parents,
    *,
    step0_is_reference: bool = True,
    extra: Metrics | None = None,
) -> Path:
    """Trains `start` on pairs; the stage folder is a model folder that also holds
    metrics.jsonl and summary.json.
    """

    def make(folder: Path) -> Metrics:
        dtype = torch.bfloat16 if ctx.config.policy_dtype == "bfloat16" else torch.float32
        plan = _validation_plan(ctx, folder, dtype)
        model = load_model(
            start,
            getattr(torch, ctx.config.training.master_dtype),
            ctx.device,
            lambda m: distributed.shard(m, m.blocks, ctx.dtype, ctx.device, settings.sharding),
        )
        summary = train(
            model,
            pairs,
            settings,
            compute_dtype=ctx.dtype,
            device=ctx.device,
            seed=ctx.config.seed,
            stage=name,
            metrics_path=folder / "metrics.jsonl",
            step0_is_reference=step0_is_reference,
            checkpoints=checkpoint_plan(ctx, folder),
            validation=plan,
        )
        best = None if plan is None else best_weights(plan, summary)
        # All ranks gather the last weights, or none does.
        state = distributed.full_state(model, dtype) if best is None else best
        if distributed.rank() == 0:
            save_model(model, folder, start, dtype, state, ctx.template)
        return summary | (extra or {})

    parents = {
        **parents,
        "policy": hash_model_folder(start),
        **ctx.tokenizer.template_parents,
        **ctx.keys("seed", "policy_dtype", *SCHEDULE_KEYS),
        "dtype": str(ctx.dtype),
        **_validation_parents(ctx),
    }
    ctx.run.stage(name, parents, make, resume=True)
    return ctx.run.path / name


# --------------------------------------------------------------------------------------- validation


def checkable(ctx: Context) -> list[int]:
    """The numbers of the validation rows whose answers a program can check."""
    return [i for i, row in enumerate(ctx.validation.rows) if row.kind is not None]


def _validation_plan(ctx: Context, folder: Path, dtype: torch.dtype) -> ValidationPlan | None:
    """What is measured while a policy is trained in `folder`; None where nothing is. dtype: of the
    policy that is written.
    """
    v = ctx.config.validation
    if not ctx.validation.rows:
        return None
    return ValidationPlan(
        ctx.validation.pairs,
        v.every,
        v.early_stop,
        # beside the checkpoints, which refer to them, and gone with them
        folder / CHECKPOINTS if ctx.select == "best" else None,
        dtype,
        _accuracy(ctx, folder) if v.metric == "accuracy" else None,
    )


def _accuracy(ctx: Context, folder: Path) -> Callable[[LanguageModel], float]:
    """What measures the greedy accuracy of a model in training: every rank gets a whole copy of it,
    in the dtype of computing, for as long as that takes.
    """
    config, chosen = ctx.config, checkable(ctx)
    rows, pairs = (
        [ctx.validation.rows[i] for i in chosen],
        ctx.validation.pairs.take(np.array(chosen)),
    )
    settings = EvaluationSettings(
        0,
        Sampling(config.max_new_tokens),
        config.sampling.batch_rows,
        config.training.micro_tokens,
        config.seed,
    )

    def measure(model: LanguageModel) -> float:
        assert isinstance(model, Mistral)  # `open_policy` refuses anything else
        with torch.device("meta"):
            copy = Mistral(model.config).to(ctx.dtype)
        copy.load_state_dict(distributed.whole_state(model, ctx.dtype), strict=True, assign=True)
        scratch = folder / CHECKPOINTS / "answers"
        return greedy_accuracy(
            copy.eval(), ctx.tokenizer, rows, pairs, settings, ctx.device, scratch
        )

    return measure


def _validation_parents(ctx: Context) -> Parents:
    """What a policy depends on beside its pairs; {} where nothing is measured on the way."""
    if not ctx.validation.rows:
        return {}
    answers = ctx.config.validation.metric == "accuracy"
    return {
        "data (validation rows)": data_hash(ctx.validation.rows),
        **ctx.keys("validation.every", "validation.metric", "validation.early_stop"),
        "select": ctx.select,
        **(ctx.keys("max_new_tokens") if answers else {}),
    }


# ---------------------------------------------------------------------------------------- iteration


def _loss_parents(ctx: Context) -> Parents:
    """The options of the loss that are on: policies made before there were any stay valid."""
    off = named_keys(RunConfig(), "loss")
    return {key: value for key, value in ctx.keys("loss").items() if value != off[key]}


def policy_stage(ctx: Context, t: int, start: Path, pairs: Pairs, made_from: Parents) -> Path:
    """Trains `start` on the iteration's pairs; returns the next policy's folder.

    made_from: what the pairs' tokens depend on, beside the data and max_length. Raises InputError
    where no pair is left to learn from.
    """
    kept = pairs.take(pairs.usable)
    if not len(kept):
        raise InputError(
            f"iteration {t}: there is no pair left to learn from: every loser equals its winner, "
            "or the judge saw none better; this is the end of what the method can do, or raise "
            "sampling.temperature"
        )
    skipped = len(pairs) - len(kept)
    learning_rate, beta = ctx.config.at("learning_rate", t), ctx.config.at("beta", t)
    parents = {
        "data": ctx.used_hash,
        **made_from,
        "weights": hash_settings(kept.weights.tolist()),
        "learning_rate": learning_rate,
        **ctx.keys("method", "global_batch", "max_length"),
        **ctx.keys("training.epochs", "training.steps", "training.optimizer"),
    }
    if kept.generated is not None:
        reference = file_hash(ctx, f"{REFERENCE_STAGE.folder(t)}/{LOGPS}")
        parents |= {"beta": beta, "reference": reference, **_loss_parents(ctx)}
    settings = replace(
        _train_settings(ctx),
        learning_rate=learning_rate,
        beta=beta,
        loss=ctx.config.loss.options,
        steps=ctx.config.training.steps,
    )
    return _train_stage(
        ctx,
        POLICY_STAGE.folder(t),
        start,
        kept,
        settings,
        parents,
        step0_is_reference=ctx.config.reference == "iteration" or t == 0,
        extra={
            "pairs": len(kept),
            "skipped_pairs": skipped,
            "losers/identical_frac": skipped / len(pairs),
        },
    )
