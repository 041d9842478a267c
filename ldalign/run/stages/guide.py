"""The stage guide: the guiding model, trained on both responses of every row.

RUN/guide is the first iteration's; with guide.retrain the others have theirs in iteration_t/guide.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ldalign.data.rows import prompt_text
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import Guide, GuideConfig
from ldalign.models.guide_folder import (
    check_trained_guide,
    is_trained_guide,
    new_guide,
    policy_guide,
    read_guide_tokenizer,
    save_guide,
)
from ldalign.models.mistral import Mistral
from ldalign.models.weights import check_model, count_parameters
from ldalign.run.context import Context, checkpoint_plan
from ldalign.run.manifest import Parents, hash_model_folder, hash_settings
from ldalign.run.settings import GuideKeys, RunConfig
from ldalign.run.stage import Cost, Stage
from ldalign.run.stages.responses import RESPONSES
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.files import hash_file, read_jsonl
from ldalign.system.metrics import Metrics
from ldalign.training.batches import count_steps
from ldalign.training.guide import GuideTrainSettings, train_guide


def _cost(ctx: Context, name: str) -> Cost:
    g, rows = ctx.config.guide, len(ctx.used[1])
    held_out = max(2, round(rows * g.heldout_fraction))
    weights = 2 * 4 * _tower_parameters(ctx)  # two towers in float32
    return Cost(
        # Another guide is small beside the policy: its tokens are left out.
        trained=g.epochs * sum(guide_tokens(ctx)) if guide_is_policy(g) else 0,
        steps=count_steps(rows - held_out, g.global_batch, g.epochs),
        kept=weights,
        checkpoint=3 * weights,  # and AdamW's two averages
    )


GUIDE_STAGE = Stage("guide", _cost, numbered_from=1)


def guide_is_policy(guide: GuideKeys) -> bool:
    """Whether a guide of the policy's own size is to be trained."""
    return guide.backbone == "policy" and guide.folder is None


def guide_tokens(ctx: Context) -> tuple[int, int]:
    """How much the guide's encoder and its decoder read of both responses of every row, in tokens
    of the policy's.
    """
    g = ctx.config.guide
    encoded = decoded = 0
    for pair in ctx.used[1]:
        prompt, real = len(pair.prompt), len(pair.real)
        encoded += min(prompt + 2 * real, 2 * g.max_tokens) + 2 * g.latent_tokens
        decoded += 2 * (min(prompt + real, g.max_tokens) + g.latent_tokens)
    return encoded, decoded


def _tower_parameters(ctx: Context) -> int:
    """The number of weights of one of the guide's two towers."""
    g = ctx.config.guide
    if guide_is_policy(g):
        return ctx.parameters
    if g.folder is not None:
        return count_parameters(check_model(Path(g.folder).expanduser()))
    return 12 * g.layers * g.width**2 + (g.vocabulary + _positions(g)) * g.width


def _positions(guide: GuideKeys) -> int:
    """How many tokens a new tower can read."""
    return max(1024, guide.max_tokens + guide.latent_tokens)


def check_guide(config: RunConfig, planned: Sequence[str]) -> None:
    """Checks the given guide's files, from their headers, where a planned stage
    needs it. Raises InputError.
    """
    guide = config.guide
    if GUIDE_STAGE.folder(0) not in planned or guide.folder is None:
        return
    folder = Path(guide.folder).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"guide={guide.folder}: no such folder; give a GPT-2 folder or one that train/guide.py "
            "wrote"
        )
    if is_trained_guide(folder):
        check_trained_guide(folder)
    elif isinstance(check_model(folder), Mistral):
        raise InputError(
            f"{folder}: is no gpt2; give a GPT-2 folder or one that train/guide.py wrote "
            "(guide=FOLDER), or guide.backbone=policy and no folder"
        )
    read_guide_tokenizer(folder)


def guide_stage(
    ctx: Context, t: int, start: Path | None = None, generated: Sequence[str] | None = None
) -> Path:
    """Trains the guide on real and generated responses, or takes the trained one that is given;
    returns its folder.

    It is in guide/ where t is 0, else in iteration_t/guide: a guide of that iteration's own,
    trained anew from what the first began with (seed, folder or start policy). start: the policy
    that self-play starts from; guide.backbone=policy needs it. generated: a text a row of
    `ctx.used`; None: the samples in iteration_t/responses.
    """
    g = ctx.config.guide
    given = Path(g.folder).expanduser() if g.folder else None
    if given is not None and is_trained_guide(given):
        return given
    rows, _ = ctx.used
    name = GUIDE_STAGE.folder(t)
    if generated is None:
        generated = [r["response"] for r in read_jsonl(ctx.run.path / RESPONSES.format(t))]

    def make(folder: Path) -> Metrics:
        texts = [
            (prompt_text(row), row.response, loser)
            for row, loser in zip(rows, generated, strict=True)
        ]
        guide = _untrained_guide(ctx, given, start, [text for row in texts for text in row])
        examples = [(guide.example(x, y), guide.example(x, z)) for x, y, z in texts]
        settings = GuideTrainSettings(
            g.epochs,
            g.global_batch,
            g.learning_rate,
            ctx.config.training.micro_tokens,
            g.heldout_fraction,
        )
        losses = train_guide(
            guide.to(ctx.device),
            examples,
            settings,
            device=ctx.device,
            seed=ctx.config.seed,
            metrics_path=folder / "metrics.jsonl",
            ids=[row.id for row in rows],
            checkpoints=checkpoint_plan(ctx, folder),
        )
        state = distributed.full_state(guide, torch.float32)
        if distributed.rank() == 0:
            save_guide(guide, folder, state)
        return losses

    ctx.run.stage(name, _guide_parents(ctx, given, start, generated), make, resume=True)
    return ctx.run.path / name


def _untrained_guide(
    ctx: Context, given: Path | None, start: Path | None, texts: Sequence[str]
) -> Guide:
    """The guide that training begins with: two copies of the policy `start`, of the GPT-2 in
    `given`, or of a new GPT-2 whose tokenizer is trained on `texts`.
    """
    g, seed = ctx.config.guide, ctx.config.seed
    config = GuideConfig(
        g.latent_tokens, g.latent_width, g.token_dropout, g.latent_dropout, g.max_tokens
    )
    if g.backbone == "policy":
        assert start is not None
        return policy_guide(config, seed, start)
    size = GPT2Config(g.vocabulary, _positions(g), g.width, g.layers, g.heads)
    return new_guide(config, seed, given, texts, size)


def _guide_parents(
    ctx: Context, given: Path | None, start: Path | None, generated: Sequence[str]
) -> Parents:
    of_policy = ctx.config.guide.backbone == "policy"
    without = {"guide.folder", "guide.retrain"}
    if of_policy or given is not None:  # the towers' sizes are not ours to say
        without |= {f"guide.{name}" for name in ("layers", "width", "heads", "vocabulary")}
    keys = {name: value for name, value in ctx.keys("guide", "seed").items() if name not in without}
    if of_policy:
        assert start is not None
        begun: Parents = {"policy": hash_model_folder(start)}
    else:
        begun = {"pretrained": hash_model_folder(given) if given else "none"}
    return {**keys, "data": ctx.used_hash, "responses": hash_settings(list(generated)), **begun}


def guide_hash(folder: Path) -> str:
    """sha256 over a trained guide's folder: both towers, latent head, tokenizer and guide.json."""
    # The folder itself counts as one: latent.safetensors and tokenizer.json lie in it.
    parts = [hash_model_folder(part) for part in (folder, folder / "encoder", folder / "decoder")]
    return hash_settings([*parts, hash_file(folder / "guide.json")])
