"""Benchmarks as stages: every task of a policy is a folder of its own, NAME/benchmarks/TASK, so a
finished one is kept whatever becomes of the next.

A folder holds summary.json (metrics, each with its standard error as METRIC_se), task.json
(definition, versions) and samples.jsonl (every row: prompt, log-probs or generated text, verdict).
"""

import importlib.metadata
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from ldalign.context import Context
from ldalign.evaluation.benchmarks.definitions import Benchmark, no_harness
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.pipeline import Parents, hash_model_folder
from ldalign.settings import RunConfig
from ldalign.summaries import benchmark_summaries, stage
from ldalign.system import distributed
from ldalign.system.files import write_json, write_jsonl
from ldalign.system.metrics import Metrics, say

Sample = dict[str, Any]
FILTERS = {
    "none": "",
    "strict-match": "/strict",
    "flexible-extract": "/flexible",
}  # the harness's -> ending of a metric


def wanted(config: RunConfig) -> list[Benchmark]:
    """The benchmarks that the config asks for."""
    b = config.benchmarks
    data = Path(b.data).expanduser() if b.data else None
    return [Benchmark(name, data, b.shots) for name in dict.fromkeys(b.tasks)]


def check_benchmarks(config: RunConfig) -> None:
    """Everything that can be wrong with them before a run begins: names, files, every row, lm-eval,
    the hub.
    """
    found = wanted(config)
    if found:
        harness_version()
        quiet()
    for benchmark in found:
        benchmark.task()


def planned_benchmarks(config: RunConfig, name: str) -> list[str]:
    """The stages of the policy called `name`."""
    return [f"{name}/benchmarks/{task}" for task in dict.fromkeys(config.benchmarks.tasks)]


def benchmark_stages(ctx: Context, name: str, policy: Path) -> None:
    """Runs what the config asks for on `policy`, which the run calls `name`. The weights are read
    once, if at all.
    """
    loaded: list[Any] = []

    def model() -> Any:
        from ldalign.evaluation.benchmarks.harness import HarnessModel

        if not loaded:
            mistral = cast(Mistral, load_model(policy, ctx.dtype, ctx.device))
            loaded.append(
                HarnessModel(
                    model=mistral,
                    tokenizer=ctx.tokenizer,
                    micro_tokens=ctx.config.training.micro_tokens,
                    batch_rows=ctx.config.sampling.batch_rows,
                    seed=ctx.config.seed,
                )
            )
        return loaded[0]

    for benchmark in wanted(ctx.config):
        _benchmark_stage(ctx, name, policy, benchmark, model)


def _benchmark_stage(
    ctx: Context, name: str, policy: Path, benchmark: Benchmark, model: Callable[[], Any]
) -> Metrics:
    settings, task = ctx.config.benchmarks, benchmark.name

    def make(folder: Path) -> Metrics:
        about = benchmark.definition["metadata"]
        metrics, samples = run_benchmark(model(), benchmark, settings.limit, settings.chat_template)
        if distributed.rank() == 0:
            write_jsonl(folder / "samples.jsonl", samples)
            write_json(
                folder / "task.json",
                {
                    "task": task,
                    "version": benchmark.version,
                    "definition": benchmark.definition_hash,
                    "data": benchmark.source,
                    "lm_eval": harness_version(),
                    "main": about["main"],
                    "chance": about["chance"],
                },
            )
        return metrics

    parents: Parents = {
        "policy": hash_model_folder(policy),
        "task": f"{task} {benchmark.version}",
        "definition of the task": benchmark.definition_hash,
        "benchmarks.data": benchmark.source,
        "shots": benchmark.used_shots,
        "benchmarks.limit": "all" if settings.limit is None else settings.limit,
        "benchmarks.chat_template": settings.chat_template,
        "dtype": str(ctx.dtype),
        "lm-eval": harness_version(),
        **(ctx.tokenizer.template_parents if settings.chat_template else {}),
    }
    return stage(ctx, f"{name}/benchmarks/{task}", parents, make)


def run_benchmark(
    model: Any, benchmark: Benchmark, limit: int | None = None, chat_template: bool = False
) -> tuple[Metrics, list[Sample]]:
    """Metrics and samples of one benchmark, the same on every rank; `model` is any model of the
    harness.

    Metrics: rows, shots, chat_template (0 or 1), version, and every score with its standard error,
    as lm-eval gives them.
    """
    from lm_eval.evaluator import evaluate

    quiet()
    task = benchmark.task()
    result = evaluate(
        model,
        {"tasks": {benchmark.name: task}, "groups": {}},
        limit=limit,
        bootstrap_iters=1000,
        log_samples=True,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=True,
    )
    assert result is not None  # for the harness, every rank is the first
    scores = result["results"][benchmark.name]
    samples = _samples(result["samples"][benchmark.name])
    metrics: Metrics = {
        "rows": float(len(samples)),
        "shots": float(benchmark.used_shots),
        "chat_template": float(chat_template),
        "version": benchmark.version,
    }
    for key, value in scores.items():
        metric, _, filter_name = key.partition(",")
        if filter_name in FILTERS:
            error = metric.endswith("_stderr")
            named = metric.removesuffix("_stderr") + FILTERS[filter_name] + ("_se" if error else "")
            # of one row there is no standard error
            metrics[named] = 0.0 if value == "N/A" else float(value)
    return metrics, samples


def _samples(logged: Sequence[Sample]) -> list[Sample]:
    """The harness's samples, one a row: of a generated answer it has one a filter."""
    rows: dict[int, Sample] = {}
    for sample in logged:
        arguments, ending = sample["arguments"], FILTERS[sample["filter"]]
        row = rows.setdefault(
            sample["doc_id"],
            {
                "row": sample["doc_id"],
                "prompt": arguments[0][0],
                "target": sample["target"],
            },
        )
        if isinstance(arguments[0][1], str):
            row["choices"] = [continuation for _, continuation in arguments]
            row["logprobs"] = [response[0] for response in sample["filtered_resps"]]
            row["greedy"] = [response[1] for response in sample["filtered_resps"]]
        else:
            row["generated"] = sample["resps"][0][0]
            row[f"extracted{ending}"] = sample["filtered_resps"][0]
        row |= {f"{metric}{ending}": float(sample[metric]) for metric in sample["metrics"]}
    return [rows[i] for i in sorted(rows)]


def harness_version() -> str:
    """Of the installed lm-eval. EnvironmentProblem where it is not installed."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise no_harness(error) from None


def quiet() -> None:
    # It warns of what our definitions do on purpose.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def say_table(run: Path) -> None:
    """The scores of all policies of a run folder, with standard errors and how
    they were measured.
    """
    lines = []
    for name, summary in benchmark_summaries(run).items():
        policy, _, task = name.partition("/benchmarks/")
        about = json.loads((run / name / "task.json").read_text(encoding="utf-8"))
        scores = ", ".join(
            f"{key} {100 * value:.1f} +- {100 * summary[f'{key}_se']:.1f}"
            for key, value in summary.items()
            if f"{key}_se" in summary
        )
        lines.append(
            f"| {policy} | {task} | {scores} | {summary['rows']:.0f} | {summary['shots']:.0f} | "
            f"{'on' if summary['chat_template'] else 'off'} | {about['version']:g} | "
            f"{about['lm_eval']} |"
        )
    if lines:
        head = (
            "| policy | benchmark | score, % +- standard error | rows | shots | chat template | "
            "version | lm-eval |"
        )
        say("\n".join(["", head, "|---" * 8 + "|", *lines]))
