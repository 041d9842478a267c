"""The stage POLICY/evaluation: held-out likelihood and accuracy, with every answer."""

from pathlib import Path
from typing import cast

from ldalign.evaluation.held_out import EvaluationSettings, Unchecked, evaluate
from ldalign.generation.sampling import Sampling
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.run.context import Context
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.stage import Cost, Stage
from ldalign.system import distributed
from ldalign.system.files import write_jsonl
from ldalign.system.metrics import Bar, Metrics, say
from ldalign.system.partial_rows import FOLDER as PARTS


def _cost(ctx: Context, name: str) -> Cost:
    settings, heldout = _settings(ctx), ctx.heldout
    asked = [
        (settings.answers(row), pair) for row, pair in zip(heldout.rows, heldout.pairs, strict=True)
    ]
    return Cost(
        scored=sum(pair.tokens + answers * len(pair.prompt) for answers, pair in asked),
        generated=sum(answers * len(pair.real) for answers, pair in asked),
    )


EVALUATION_STAGE = Stage("evaluation", _cost)
ANSWERS = "answers.jsonl"  # in its folder: every held-out row with every answer


def answers_file(policy: Path) -> Path:
    """Where a policy's folder in a run (RUN/iteration_1) has its held-out answers."""
    return policy / EVALUATION_STAGE.name / ANSWERS


def _settings(ctx: Context) -> EvaluationSettings:
    e, config = ctx.config.evaluation, ctx.config
    unchecked: Unchecked = "nothing"
    if e.answers != "checked" or config.reward.model is not None:
        unchecked = "samples" if e.answers == "all" else "greedy"
    return EvaluationSettings(
        e.samples,
        Sampling(config.max_new_tokens, e.temperature),
        config.sampling.batch_rows,
        config.training.micro_tokens,
        config.seed,
        unchecked,
    )


def evaluation_stage(ctx: Context, name: str, policy: Path) -> Metrics:
    """Measures `policy` on the held-out rows, into NAME/evaluation with every answer it gave;
    returns the metrics, {} where no rows are held out.
    """
    name = EVALUATION_STAGE.folder(name)
    if not ctx.heldout.rows:
        return {}
    settings = _settings(ctx)
    unchecked = any(row.kind is None for row in ctx.heldout.rows)

    def make(folder: Path) -> Metrics:
        model = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
        answers = sum(settings.answers(row) for row in ctx.heldout.rows)
        share = answers // distributed.world_size()
        with Bar(name, share, "rows", most=settings.sampling.max_new_tokens) as progress:
            metrics, records = evaluate(
                model,
                ctx.tokenizer,
                ctx.heldout.rows,
                ctx.heldout.pairs,
                settings,
                ctx.device,
                folder / PARTS,
                progress,
                release=True,
            )
        if distributed.rank() == 0:
            write_jsonl(folder / ANSWERS, records)
        return metrics

    others = {"nothing": "", "greedy": "to every row, greedy alone", "samples": "to every row"}
    said = others[settings.unchecked] if unchecked else ""
    parents: Parents = {
        "policy": hash_model_folder(policy),
        "data (held-out rows)": ctx.heldout_hash,
        "dtype": str(ctx.dtype),
        **ctx.tokenizer.template_parents,
        **ctx.keys("max_length", "max_new_tokens", "seed"),
        **ctx.keys("evaluation.samples", "evaluation.temperature"),
        **({"answers": said} if said else {}),
    }
    metrics = ctx.run.stage(name, parents, make, resume=True)
    if "accuracy/greedy" in metrics:
        say(
            f"{name}: greedy {metrics['accuracy/greedy']:.1%}, sampled "
            f"{metrics.get('accuracy/sampled', 0):.1%} right, nll {metrics['nll/real']:.4f}"
        )
    else:
        say(f"{name}: nll of real responses {metrics['nll/real']:.4f}")
    return metrics
