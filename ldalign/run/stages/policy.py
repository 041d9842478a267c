"""The stages of a run, each a folder with a manifest: data, policy (SFT or alignment), responses,
guide, distances, reference, evaluation.

A stage reads the folders of the stages before it and writes its own; `manifest.run_stage` skips
what is done and refuses what was made from something else. A stage's parents are what its output
depends on: contents (hashes of rows, model folders, files of earlier stages) and config keys by
their own names, so that a refusal names the key. Not among them is what only moves work about and
changes the last bits at most: micro_tokens, batch_rows, checkpointing, shard_ranks, whole,
checkpoint.*, the number of ranks. Every function here is called by all ranks.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ldalign.data.pairs import Pair, usable
from ldalign.data.rows import data_hash
from ldalign.models.weights import load_model, save_model
from ldalign.run.context import Context, file_hash, plan
from ldalign.run.manifest import Parents, hash_model_folder, hash_settings
from ldalign.run.settings import RunConfig, SftKeys
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.metrics import Metrics
from ldalign.training.policy import TrainSettings, train

log = logging.getLogger(__name__)


SCHEDULE_KEYS = (
    "training.schedule",
    "training.warmup_ratio",
    "training.weight_decay",
    "training.max_grad_norm",
    "training.master_dtype",
    "training.state_dtype",
)


# ---------------------------------------------------------------------------------------------- SFT


def start_stage(ctx: Context) -> Path:
    """The policy that self-play starts from: the given one, after SFT where the
    config asks for it.
    """
    return sft_stage(ctx, "sft", ctx.start) if ctx.config.sft.epochs else ctx.start


def start_name(config: RunConfig) -> str:
    """What the start policy is called in the run folder and the table."""
    return "sft" if config.sft.epochs else "start"


def sft_stage(ctx: Context, group: Literal["sft", "continual_sft"], start: Path) -> Path:
    """Supervised fine-tuning of `start` on real responses by one group of config keys; returns the
    policy's folder.
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
        ctx, f"{group}/policy", start, pairs, settings, {"data": data_hash(rows), **keys}
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
    """Trains `start` on pairs; the stage folder is a model folder that also holds metrics.jsonl and
    summary.json.
    """

    def make(folder: Path) -> Metrics:
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
            checkpoints=plan(ctx, folder),
        )
        dtype = torch.bfloat16 if ctx.config.policy_dtype == "bfloat16" else torch.float32
        state = distributed.full_state(model, dtype)
        if distributed.rank() == 0:
            save_model(model, folder, start, dtype, state)
        return summary | (extra or {})

    parents = {
        **parents,
        "policy": hash_model_folder(start),
        **ctx.tokenizer.template_parents,
        **ctx.keys("seed", "policy_dtype", *SCHEDULE_KEYS),
        "dtype": str(ctx.dtype),
    }
    ctx.run.stage(name, parents, make, resume=True)
    return ctx.run.path / name


# ---------------------------------------------------------------------------------------- iteration


def policy_stage(
    ctx: Context, t: int, start: Path, pairs: Sequence[Pair], made_from: Parents
) -> Path:
    """Trains `start` on the iteration's pairs; returns the next policy's folder. made_from: as in
    `reference_stage`.
    """
    kept = [pair for pair in pairs if usable(pair)]
    if not kept:
        raise InputError(
            f"iteration {t}: there is no pair left to learn from: every loser equals its winner, "
            "or the judge saw none better; this is the end of what the method can do, or raise "
            "sampling.temperature"
        )
    skipped = len(pairs) - len(kept)
    parents: dict[str, str | int | float] = {
        "data": ctx.used_hash,
        **made_from,
        "weights": hash_settings([p.weight for p in kept]),
        "learning_rate": ctx.config.at("learning_rate", t),
        **ctx.keys(
            "method",
            "global_batch",
            "max_length",
            "training.epochs",
            "training.steps",
            "training.optimizer",
        ),
    }
    if kept[0].generated is not None:
        reference = file_hash(ctx, f"iteration_{t}/reference/reference.safetensors")
        parents |= {"beta": ctx.config.at("beta", t), "reference": reference}
    settings = replace(
        _train_settings(ctx),
        learning_rate=ctx.config.at("learning_rate", t),
        beta=ctx.config.at("beta", t),
        steps=ctx.config.training.steps,
    )
    return _train_stage(
        ctx,
        f"iteration_{t}/policy",
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


# --------------------------------------------------------------------------------------- evaluation
