"""The stage guide: the guiding model, trained on both responses of every row.

RUN/guide is the first iteration's; with guide.retrain the others have theirs in iteration_t/guide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ldalign.data.pairs import Chosen, Pair, Pairs
from ldalign.data.rows import Row, history_text
from ldalign.evaluation.guide import SURE, heldout_figures, sentence, tells_apart
from ldalign.models.gpt2 import GPT2Config
from ldalign.models.guide import Guide, GuideConfig, GuideLoss
from ldalign.models.guide_folder import (
    check_room,
    check_trained_guide,
    is_trained_guide,
    new_guide,
    pretrained_guide,
    read_guide_tokenizer,
    save_guide,
)
from ldalign.models.mistral import Mistral
from ldalign.models.weights import check_model, context_length, count_parameters
from ldalign.run.context import Context, checkpoint_plan
from ldalign.run.manifest import SAME_FILES, Parents, hash_model_folder, hash_settings
from ldalign.run.settings import RunConfig
from ldalign.run.stage import Cost, Stage
from ldalign.system import distributed
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.files import hash_file
from ldalign.system.metrics import Metrics, MetricsLog, say
from ldalign.system.untrusted import read_json
from ldalign.training.batches import count_steps
from ldalign.training.guide import GuideTrainSettings, heldout_count, split, train_guide
from ldalign.training.latent_map import LatentMap

# guide.backbone=auto takes the policy for the towers, but where it has more weights than LARGE and
# more rows than MANY are at hand: then a small new guide has enough to learn from, and reading all
# rows through the policy once more would cost about a third of training it.
LARGE, MANY = 2e9, 20_000
SUMMARY = "summary.json"  # of the run that trained a guide, in its folder
GATE_FIGURES = ("rows", "differing", "sibling_gain", "sibling_gain_se")
MAX_TOKENS = 512  # of prompt and response, of a guide that reads text


@dataclass(frozen=True)
class GuidePlan:
    """What guide a config asks for."""

    towers: Literal["policy", "gpt2", "new"]  # what they start as
    frozen: bool  # one tower is both, and is not trained
    why: str  # a sentence for the run's first lines

    @property
    def reads_ids(self) -> bool:
        """Whether it reads the policy's own token ids."""
        return self.towers == "policy"


def guide_plan(ctx: Context) -> GuidePlan:
    """The guide that is to be trained."""
    g, rows = ctx.config.guide, len(ctx.used[1])
    # A new one is trained: where that is not wanted, the policy it is.
    many = rows > MANY and ctx.parameters > LARGE and g.towers != "frozen"
    towers: Literal["policy", "gpt2", "new"]
    if g.folder is not None:
        towers, why = "gpt2", f"its towers start as the GPT-2 in {g.folder}"
    elif g.backbone == "policy" or (g.backbone == "auto" and not many):
        towers, why = "policy", "its towers are the policy that self-play starts from"
    else:
        towers, why = "new", f"new towers of {g.layers} layers and width {g.width}"
    if g.backbone == "auto" and g.folder is None:
        why += (
            f" (guide.backbone=auto: {rows} rows suffice for a new one, and the policy's "
            f"{ctx.parameters / 1e9:.1f} billion weights would take long)"
            if many
            else " (guide.backbone=auto: a pretrained model tells responses apart from few rows)"
        )
    frozen = g.towers == "frozen" or (g.towers == "auto" and towers != "new")
    what = "not trained, one for both" if frozen else "both trained"
    return GuidePlan(towers, frozen, f"guide: {why}; {what}")


def say_guide(ctx: Context, planned: Sequence[str]) -> None:
    """Says what guide the planned stages will train, and why.

    Raises InputError as `check_reach`: now, and not once the responses are sampled.
    """
    config = ctx.config
    if GUIDE_STAGE.folder(0) not in planned:
        return
    if config.guide.folder is not None and is_trained_guide(Path(config.guide.folder)):
        say(f"guide: the trained one in {config.guide.folder}, as it is")
        return
    plan = guide_plan(ctx)
    check_reach(ctx, plan)
    say(plan.why)


def check_reach(ctx: Context, plan: GuidePlan) -> None:
    """Raises InputError where towers that are pretrained do not read as many tokens as are asked
    for.
    """
    if plan.towers != "new":
        folder = ctx.start if plan.towers == "policy" else Path(str(ctx.config.guide.folder))
        check_room(guide_config(ctx, plan), context_length(folder), str(folder))


def guide_config(ctx: Context, plan: GuidePlan) -> GuideConfig:
    """What the guide's distances depend on, what the config leaves to the towers filled in."""
    g = ctx.config.guide
    return GuideConfig(
        g.readout,
        g.latent_tokens,
        g.latent_width,
        g.latent_norm or ("none" if plan.towers == "new" else "rms"),
        g.injection,
        _max_tokens(ctx, plan),
    )


def train_settings(ctx: Context, plan: GuidePlan) -> GuideTrainSettings:
    """How the guide is trained, what the config leaves to the towers filled in."""
    g = ctx.config.guide
    dropout = g.token_dropout if g.token_dropout is not None else 0.0 if plan.frozen else 1.0
    usual_map: LatentMap = "fitted" if plan.frozen else "tuned"
    if plan.towers == "new" or (g.readout, g.injection) != ("mean", "output"):
        usual_map = "drawn"
    latent_map = g.latent_map or usual_map
    if plan.frozen:
        # Half of it where the latents move too.
        usual = 4e-3 if latent_map == "fitted" else 2e-3
    else:
        usual = 1e-3 if plan.towers == "new" else 1e-4
    loss = GuideLoss(
        g.contrast, g.bag_of_words, dropout, g.latent_dropout, g.latent_noise, g.loss_tokens
    )
    return GuideTrainSettings(
        g.epochs,
        g.global_batch,
        g.learning_rate or usual,
        ctx.config.training.micro_tokens,
        loss,
        latent_map,
    )


def _cost(ctx: Context, name: str) -> Cost:
    g, rows, plan = ctx.config.guide, len(ctx.used[1]), guide_plan(ctx)
    weights = _tower_parameters(ctx, plan)
    read = g.epochs * guide_tokens(ctx)
    trained_on = rows - heldout_count(rows, g.heldout_fraction)
    steps = count_steps(trained_on, g.global_batch, g.epochs)
    if plan.frozen:
        # A forward pass, and the head's work for two latents, which is about as much again.
        return Cost(
            scored=2 * read if plan.reads_ids else 0, steps=steps, kept=ctx.dtype.itemsize * weights
        )
    return Cost(
        # Another guide is small beside the policy: its tokens are left out. The decoder reads each
        # response with two latents.
        trained=3 * read if plan.reads_ids else 0,
        steps=steps,
        kept=2 * 4 * weights,  # two towers in float32
        checkpoint=3 * 2 * 4 * weights,  # and AdamW's two averages
    )


GUIDE_STAGE = Stage("guide", _cost, numbered_from=1)


def guide_tokens(ctx: Context) -> int:
    """How many tokens of the policy's all rows have, both responses: what a guide reads of them in
    one pass.
    """
    return ctx.used_tokens


def _tower_parameters(ctx: Context, plan: GuidePlan) -> int:
    """The number of weights of one of the guide's towers."""
    g = ctx.config.guide
    if plan.towers == "policy":
        return ctx.parameters
    if g.folder is not None:
        return count_parameters(check_model(Path(g.folder)))
    return 12 * g.layers * g.width**2 + (g.vocabulary + _positions(ctx)) * g.width


def _max_tokens(ctx: Context, plan: GuidePlan) -> int | None:
    """The most tokens of a pair's prompt and longer response that the guide reads."""
    g = ctx.config.guide
    return g.max_tokens or (None if plan.reads_ids else MAX_TOKENS)


def _positions(ctx: Context) -> int:
    """How many tokens a new tower can read."""
    g = ctx.config.guide
    return max(1024, (g.max_tokens or MAX_TOKENS) + g.latent_tokens)


def check_guide(config: RunConfig, planned: Sequence[str]) -> None:
    """Checks the given guide's files, from their headers, where a planned stage
    needs it. Raises InputError.
    """
    guide = config.guide
    if GUIDE_STAGE.folder(0) not in planned or guide.folder is None:
        return
    folder = Path(guide.folder)
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


def agree_on_guide(config: RunConfig, planned: Sequence[str]) -> None:
    """Raises EnvironmentProblem where a rank finds another guide in the folder that is given than
    rank 0 does; `check_guide` has seen it. All ranks.
    """
    if GUIDE_STAGE.folder(0) in planned and config.guide.folder is not None:
        folder = Path(config.guide.folder)
        hashed = guide_hash if is_trained_guide(folder) else hash_model_folder
        distributed.agree(lambda: {f"the guide {folder}": hashed(folder)}, SAME_FILES)


def guide_stage(ctx: Context, t: int, start: Path, pairs: Pairs) -> Path:
    """Trains the guide on real and generated responses, or takes the trained one that is given;
    returns its folder.

    It is in guide/ where t is 0, else in iteration_t/guide: a guide of that iteration's own,
    trained anew from what the first began with (seed, folder or start policy). start: the policy
    that self-play starts from. pairs: one a row of `ctx.used`, with losers, in the policy's ids.
    Raises NumericsError where it does not tell the two apart and guide.gate is stop.
    """
    g = ctx.config.guide
    given = Path(g.folder) if g.folder else None
    if given is not None and is_trained_guide(given):
        _check_given(ctx, given)
        return given
    rows, _ = ctx.used
    name, plan = GUIDE_STAGE.folder(t), guide_plan(ctx)

    def make(folder: Path) -> Metrics:
        guide = untrained_guide(ctx, plan, start, rows, pairs)
        read = guide_pairs(ctx, guide, rows, pairs)
        settings = train_settings(ctx, plan)
        seen, unseen = split(read, g.heldout_fraction, ctx.config.seed, name)
        metrics = folder / "metrics.jsonl"
        tokens = train_guide(
            guide,
            seen,
            settings,
            compute_dtype=ctx.dtype,
            device=ctx.device,
            seed=ctx.config.seed,
            stage=name,
            metrics_path=metrics,
            checkpoints=checkpoint_plan(ctx, folder),
        )
        figures = heldout_figures(guide, unseen, settings.micro_tokens)
        MetricsLog(metrics, name).write(figures, sentence(figures))
        state = distributed.full_state(guide, None)
        if distributed.rank() == 0:
            save_guide(guide, folder, state)
        return figures | {"tokens": tokens}

    parents = _guide_parents(ctx, plan, given, start, pairs)
    figures = ctx.run.stage(name, parents, make, resume=True)
    _check_gate(ctx, name, figures)
    return ctx.run.path / name


def _check_given(ctx: Context, folder: Path) -> None:
    """`_check_gate` by the figures that lie beside a trained guide, where its run left them."""
    figures = read_json(folder / SUMMARY, missing={})
    if all(isinstance(figures.get(key), int | float) for key in GATE_FIGURES):
        _check_gate(ctx, str(folder), figures)
    else:
        say(
            f"WARNING: {folder}: has no held-out figures ({SUMMARY}), so it is not known whether "
            "this guide tells a row's two responses apart"
        )


def _check_gate(ctx: Context, name: str, figures: Metrics) -> None:
    """Stops, or warns, where a guide does not tell a row's two responses apart and weights are made
    of its distances.
    """
    if tells_apart(figures):
        return
    if figures["differing"] < 2:
        found = (
            f"{name}: of {figures['rows']:.0f} held-out rows, the two responses of "
            f"{figures['differing']:.0f} differ, so it is not known whether the guide tells any "
            "apart"
        )
        if ctx.config.guide.gate == "stop":
            raise NumericsError(
                f"{found}: the policy answers as the data does; use other or more rows (max_rows, "
                "guide.heldout_fraction), or a higher sampling.temperature; guide.gate=warn goes "
                "on all the same"
            )
        say(f"WARNING: {found} (guide.gate=warn)")
        return
    gain, error = figures["sibling_gain"], figures["sibling_gain_se"]
    found = (
        f"{name}: the guide does not tell a row's two responses apart: its own latent over the "
        f"other's is worth {gain:+.3f} +- {error:.3f} nats a response, on "
        f"{figures['differing']:.0f} held-out rows, which is not {SURE:.0f} standard errors above 0"
    )
    if ctx.config.guide.gate == "stop":
        raise NumericsError(
            f"{found}; its weights would be noise. Use more rows (max_rows), raise guide.epochs or "
            f"guide.learning_rate, in another run folder or after deleting "
            f"{ctx.run.path / name}; guide.gate=warn goes on all the same"
        )
    say(f"WARNING: {found}: its weights are near noise (guide.gate=warn)")


def untrained_guide(
    ctx: Context, plan: GuidePlan, start: Path, rows: Sequence[Row], pairs: Sequence[Pair]
) -> Guide:
    """The guide that training begins with: the policy `start`, the GPT-2 that is given, or a new
    GPT-2 whose tokenizer is trained on the texts of rows and pairs.
    """
    g, seed, config = ctx.config.guide, ctx.config.seed, guide_config(ctx, plan)
    if plan.towers == "new":
        size = GPT2Config(g.vocabulary, _positions(ctx), g.width, g.layers, g.heads)
        texts = [history_text(row.history) for row in rows]
        texts += [ctx.tokenizer.decode(y) for pair in pairs for y in pair.responses]
        return new_guide(config, seed, texts, size).to(ctx.device)
    own = plan.towers == "policy"
    folder, template = (start, ctx.template) if own else (Path(str(g.folder)), None)
    return pretrained_guide(config, seed, folder, plan.frozen, ctx.dtype, ctx.device, template)


def guide_pairs(
    ctx: Context, guide: Guide, rows: Sequence[Row], pairs: Sequence[Pair]
) -> Sequence[Pair]:
    """The pairs in the guide's token ids: the tokens that the policy is trained on, or their text
    where the guide has another tokenizer. A response has an end token where it ended by itself.
    """
    own = guide.chat is not None and hash_file(guide.chat.folder / "tokenizer.json") == hash_file(
        ctx.tokenizer.folder / "tokenizer.json"
    )
    if own:
        return Chosen(pairs, change=guide.fit)
    ends = ctx.tokenizer.end_ids
    out = []
    for row, pair in zip(rows, pairs, strict=True):
        real, generated = (ctx.tokenizer.decode(y) for y in pair.responses)
        ended = [bool(y) and y[-1] in ends for y in pair.responses]
        out.append(guide.pair(row.id, row.history, real, generated, (ended[0], ended[1])))
    return out


def _guide_parents(
    ctx: Context, plan: GuidePlan, given: Path | None, start: Path, pairs: Pairs
) -> Parents:
    without = {"guide.folder", "guide.retrain", "guide.gate", "guide.backbone", "guide.towers"}
    if plan.towers != "new":  # the towers' sizes are not ours to say
        without |= {f"guide.{name}" for name in ("layers", "width", "heads", "vocabulary")}
    keys = {name: value for name, value in ctx.keys("guide", "seed").items() if name not in without}
    begun: Parents = {"towers": plan.towers, "frozen": str(plan.frozen), "dtype": str(ctx.dtype)}
    if plan.towers == "policy":
        begun = {**begun, "policy": hash_model_folder(start)}
        if ctx.template is not None:  # the policy's own counts with its folder
            begun |= ctx.tokenizer.template_parents
    elif given is not None:
        begun = {**begun, "pretrained": hash_model_folder(given)}
    return {**keys, "data": ctx.used_hash, "pairs": pairs.content_hash, **begun}


def guide_hash(folder: Path) -> str:
    """sha256 over a trained guide's folder: towers, latent head, tokenizer and guide.json."""
    # The folder itself counts as one: latent.safetensors and tokenizer.json lie in it.
    parts = [folder, *(folder / name for name in ("encoder", "decoder"))]
    hashes = [hash_model_folder(part) for part in parts if part.is_dir()]
    return hash_settings([*hashes, hash_file(folder / "guide.json")])
