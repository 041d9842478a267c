"""guide, iteration_t/guide: the guide, trained on both responses of every row."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ldalign.data.rows import prompt_text
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import GuideConfig
from ldalign.models.guide_folder import (
    check_trained_guide,
    is_trained_guide,
    new_guide,
    policy_guide,
    read_guide_tokenizer,
    save_guide,
)
from ldalign.models.mistral import Mistral
from ldalign.models.weights import check_model
from ldalign.run.context import Context, plan
from ldalign.run.manifest import Parents, hash_model_folder, hash_settings
from ldalign.run.settings import RunConfig
from ldalign.run.stages.responses import RESPONSES
from ldalign.system import distributed
from ldalign.system.errors import InputError
from ldalign.system.files import hash_file, read_jsonl
from ldalign.system.metrics import Metrics
from ldalign.training.guide import GuideTrainSettings, train_guide


def check_guide(config: RunConfig, planned: Sequence[str]) -> None:
    """The given guide's files, from their headers, where a planned stage needs it. Raises
    InputError.
    """
    guide = config.guide
    if "guide" not in planned or guide.folder is None:
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
    name = f"iteration_{t}/guide" if t else "guide"
    if generated is None:
        generated = [r["response"] for r in read_jsonl(ctx.run.path / RESPONSES.format(t))]

    def make(folder: Path) -> Metrics:
        texts = [
            (prompt_text(row), row.response, loser)
            for row, loser in zip(rows, generated, strict=True)
        ]
        config = GuideConfig(
            g.latent_tokens, g.latent_width, g.token_dropout, g.latent_dropout, g.max_tokens
        )
        if g.backbone == "policy":
            assert start is not None
            guide = policy_guide(config, ctx.config.seed, start)
        else:
            size = GPT2Config(
                g.vocabulary, max(1024, g.max_tokens + g.latent_tokens), g.width, g.layers, g.heads
            )
            guide = new_guide(
                config, ctx.config.seed, given, [t for row in texts for t in row], size
            )
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
            checkpoints=plan(ctx, folder),
        )
        state = distributed.full_state(guide, torch.float32)
        if distributed.rank() == 0:
            save_guide(guide, folder, state)
        return losses

    ctx.run.stage(name, _guide_parents(ctx, given, start, generated), make, resume=True)
    return ctx.run.path / name


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
    """Of a trained guide's folder."""
    # The folder itself counts as one: latent.safetensors and tokenizer.json lie in it.
    parts = [hash_model_folder(part) for part in (folder, folder / "encoder", folder / "decoder")]
    return hash_settings([*parts, hash_file(folder / "guide.json")])
