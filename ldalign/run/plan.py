"""What the stages of a run still have to do, in tokens read or made and in steps: what estimates
are made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldalign.models.guide_folder import is_trained_guide
from ldalign.run.context import Context
from ldalign.run.manifest import MANIFEST
from ldalign.run.settings import GuideKeys
from ldalign.training.batches import count_steps


@dataclass(frozen=True)
class Work:
    """What one stage does, in tokens read or made."""

    name: str
    trained: int = 0
    scored: int = 0
    generated: int = 0
    steps: int = 0  # of the optimizer


def to_do(ctx: Context, planned: Sequence[str]) -> list[str]:
    """Those of the planned stages that are not finished in the run folder; a trained guide that is
    given is none.
    """
    folder = ctx.config.guide.folder
    given = folder is not None and is_trained_guide(Path(folder).expanduser())
    return [
        name
        for name in planned
        if not (ctx.run.path / name / MANIFEST).is_file()
        and not (given and name.split("/")[-1] == "guide")
    ]


def stage_work(ctx: Context, name: str) -> Work:
    """The tokens of one planned stage. Sampled responses are taken to be as
    long as the real ones.
    """
    config, pairs = ctx.config, ctx.used[1]
    real = sum(len(p.real) for p in pairs)
    both = sum(len(p.prompt) + 2 * len(p.real) for p in pairs)
    top, _, step = name.rpartition("/")
    if step == "policy" and top in ("sft", "continual_sft"):
        sft = config.sft if top == "sft" else config.continual_sft
        own = ctx.train.pairs[: sft.rows]
        tokens = sft.epochs * sum(p.tokens for p in own)
        return Work(name, trained=tokens, steps=count_steps(len(own), sft.global_batch, sft.epochs))
    if step == "policy":
        steps = config.training.steps or count_steps(
            len(pairs), config.global_batch, config.training.epochs
        )
        return Work(
            name, trained=both * steps * config.global_batch // max(1, len(pairs)), steps=steps
        )
    if step in ("guide", "distances") and guide_is_policy(config.guide):
        encoded, decoded = guide_tokens(ctx)
        if step == "distances":
            return Work(name, scored=encoded)
        return Work(name, trained=config.guide.epochs * (encoded + decoded), steps=guide_steps(ctx))
    if step == "responses":
        samples = 2 if config.method in ("self_reward", "rlaif") else 1
        return Work(name, scored=sum(len(p.prompt) for p in pairs), generated=samples * real)
    if step == "judged":  # both orders of both answers
        return Work(name, scored=2 * both)
    if step == "reference":
        return Work(name, scored=both)
    if step == "evaluation":
        answers = 1 + config.evaluation.samples
        held = list(zip(ctx.heldout.rows, ctx.heldout.pairs, strict=True))
        every = ctx.config.reward.model is not None
        asked = [(answers if row.kind is not None else int(every), p) for row, p in held]
        return Work(
            name,
            scored=sum(p.tokens + n * len(p.prompt) for n, p in asked),
            generated=sum(n * len(p.real) for n, p in asked),
        )
    if step == "agreement_samples":
        asked_twice = ctx.heldout.pairs[: config.agreement.rows]
        return Work(
            name,
            scored=sum(len(p.prompt) for p in asked_twice),
            generated=2 * sum(len(p.real) for p in asked_twice),
        )
    return Work(name)  # another guide is small beside the policy, and its stages are left out


def guide_is_policy(guide: GuideKeys) -> bool:
    """Whether a guide of the policy's own size is to be trained."""
    return guide.backbone == "policy" and guide.folder is None


def guide_steps(ctx: Context) -> int:
    """Optimizer steps of a guide's training."""
    g, rows = ctx.config.guide, len(ctx.used[1])
    return count_steps(rows - max(2, round(rows * g.heldout_fraction)), g.global_batch, g.epochs)


def guide_tokens(ctx: Context) -> tuple[int, int]:
    """What the guide's encoder and its decoder read of both responses of every row, in the policy's
    tokens.
    """
    g = ctx.config.guide
    sizes = [(len(p.prompt), len(p.real)) for p in ctx.used[1]]
    encoded = sum(
        min(prompt + 2 * real, 2 * g.max_tokens) + 2 * g.latent_tokens for prompt, real in sizes
    )
    return encoded, sum(
        2 * (min(prompt + real, g.max_tokens) + g.latent_tokens) for prompt, real in sizes
    )
