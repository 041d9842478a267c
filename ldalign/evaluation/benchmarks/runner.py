"""Benchmarks as stages: every task of a policy is a folder of its own, NAME/benchmarks/TASK, so a
finished one is kept whatever becomes of the next.

A folder holds summary.json (metrics, each with its standard error as METRIC_se), task.json
(definition, versions) and samples.jsonl (every row: prompt, log-probs or generated text, verdict).
"""

import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any

from ldalign.evaluation.benchmarks.definitions import Benchmark, no_harness
from ldalign.system.metrics import Metrics

Sample = dict[str, Any]
FILTERS = {
    "none": "",
    "strict-match": "/strict",
    "flexible-extract": "/flexible",
}  # the harness's -> ending of a metric


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
