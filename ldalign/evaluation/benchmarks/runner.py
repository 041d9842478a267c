"""Runs one benchmark on a model through lm-eval: its metrics, and a sample of every row.

run/stages/benchmarks.py makes a stage of it: every task of a policy is a folder of its own, so a
finished one is kept whatever becomes of the next.
"""

import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any

from ldalign.evaluation.benchmarks.definitions import Benchmark, no_harness
from ldalign.system.metrics import Metrics

Sample = dict[str, Any]  # what is kept of one row
# The harness's filters of a generated answer: what the names of their metrics end in here.
FILTERS = {"none": "", "strict-match": "/strict", "flexible-extract": "/flexible"}


def run_benchmark(
    model: Any, benchmark: Benchmark, limit: int | None = None, chat_template: bool = False
) -> tuple[Metrics, list[Sample]]:
    """Runs one benchmark: metrics and samples, the same on every rank.

    model: any model of the harness. Metrics: rows, shots, chat_template (0 or 1), version, and
    every score with its standard error (METRIC_se), as lm-eval gives them.
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
            ending = FILTERS[filter_name] + ("_se" if metric.endswith("_stderr") else "")
            # N/A: one row has no standard error
            metrics[metric.removesuffix("_stderr") + ending] = (
                0.0 if value == "N/A" else float(value)
            )
    return metrics, samples


def _samples(logged: Sequence[Sample]) -> list[Sample]:
    """Joins the harness's samples to one a row: of a generated answer it has one a filter."""
    rows: dict[int, Sample] = {}
    for sample in logged:
        arguments, ending = sample["arguments"], FILTERS[sample["filter"]]
        number = sample["doc_id"]
        begun = {"row": number, "prompt": arguments[0][0], "target": sample["target"]}
        row = rows.setdefault(number, begun)
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
    """Returns the installed lm-eval's version. Raises EnvironmentProblem where there is none."""
    try:
        return importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError as error:
        raise no_harness(error) from None


def quiet() -> None:
    """Silences lm-eval's warnings: they are of what our definitions do on purpose."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
