"""Judge agreement alone.

    ldalign judge [--ranks N] policy=FOLDER guide=FOLDER judge=WHO run=RUN [key=value ...]
    torchrun train/judge.py ...

Samples two answers a held-out prompt, calls the one farther from the real response in latent space
the worse one, and counts how often a judge agrees (paper 5.2), into RUN/agreement. With the
settings of a run of align.py and its folder: on that run's start policy, or agreement.policy, by
its guide. WHO: checker, policy, a model folder, with judge.endpoint=URL the name of a model there,
or embedding: which sample is closer to the real response, by the sentence-embedding model in
judge.folder=FOLDER. Other keys: agreement.*, judge.*, evaluation.rows, sampling.*.
"""

from pathlib import Path

from ldalign.run.context import Context
from ldalign.run.settings import GUIDED, RunConfig
from ldalign.run.stages.agreement import AGREEMENT_STAGE, agreement_stage, find_guide
from ldalign.run.stages.agreement_samples import AGREEMENT_SAMPLES_STAGE
from ldalign.run.stages.policy import planned_start, start_stage
from ldalign.system import exits
from ldalign.train.command import need, run_script


def main(argv: list[str]) -> None:
    """Reads the settings, samples, judges."""
    run_script(argv, __doc__ or "", judge, planned, check)


def check(config: RunConfig) -> None:
    """Raises InputError where there are no prompts to answer."""
    need(
        config.evaluation.rows > 0,
        "evaluation.rows=0: no held-out prompts; give evaluation.rows=200, say",
    )
    judged = config.method != "ld_align" or config.weights in (*GUIDED, "pooled")
    need(
        judged,
        f"weights={config.weights}: a guide's distance is judged here, or that of mean states "
        "(weights=pooled); leave weights out (judge=embedding lets an embedding model judge)",
    )


def judge(ctx: Context) -> str:
    """Samples and judges, after SFT where that is asked for; returns the closing line."""
    need(
        bool(ctx.heldout.rows),
        "heldout_fraction=0: no held-out prompts; raise it, or give heldout=FILE",
    )
    # A method without a guide may still be given one to judge.
    asked = ctx.config.needs_guide or ctx.config.guide.folder is not None
    guide = find_guide(ctx) if asked else None
    given, start = ctx.config.agreement.policy, start_stage(ctx)
    agreement_stage(ctx, Path(given) if given else start, guide, start)
    return f"Every pair: {ctx.run.path / AGREEMENT_STAGE.folder() / 'agreement.jsonl'}"


def planned(config: RunConfig) -> list[str]:
    """The names of the stages that `judge` makes."""
    return [*planned_start(config), AGREEMENT_SAMPLES_STAGE.folder(), AGREEMENT_STAGE.folder()]


if __name__ == "__main__":
    exits.run(main)
