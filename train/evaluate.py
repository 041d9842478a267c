"""Evaluation alone.

    ldalign evaluate [--ranks N] policy=FOLDER run=RUN [--config FILE.yaml] [key=value ...]
    torchrun train/evaluate.py ...

Measures any policy folder on the held-out rows, into RUN/start/evaluation: likelihood of the real
responses, and for rows that a program can check, greedy and sampled accuracy with every answer
given. With benchmarks.tasks=[...] also on public benchmarks, each into RUN/start/benchmarks/TASK
(docs/benchmarks.md); evaluation.rows=0 leaves these alone. Nothing is trained; the keys sft.*,
validation.* and iterations are ignored. Give every policy a run folder of its own.
"""

from ldalign.run.context import Context
from ldalign.run.measures import measure, measurements
from ldalign.run.settings import RunConfig
from ldalign.system import exits
from ldalign.train.command import need, run_script


def main(argv: list[str]) -> None:
    """Reads the settings, evaluates."""
    run_script(argv, __doc__ or "", evaluate, planned, check, trains=False)


def check(config: RunConfig) -> None:
    """Raises InputError where there is nothing to evaluate on."""
    need(
        config.evaluation.rows > 0 or bool(config.benchmarks.tasks),
        "evaluation.rows=0: nothing to evaluate on; give evaluation.rows=200, say, or "
        "benchmarks.tasks",
    )


def evaluate(ctx: Context) -> str:
    """Measures the given policy; returns the closing line."""
    measure(ctx, "start", ctx.start, "start")
    return (
        f"Every answer: {ctx.run.path / 'start'}, evaluation/answers.jsonl and "
        "benchmarks/*/samples.jsonl"
    )


def planned(config: RunConfig) -> list[str]:
    """The names of the stages that `evaluate` makes."""
    return measurements(config, "start")


if __name__ == "__main__":
    exits.run(main)
