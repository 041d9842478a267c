"""The stages POLICY/benchmarks/TASK: public benchmarks of a policy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from ldalign.evaluation.benchmarks.definitions import Benchmark
from ldalign.evaluation.benchmarks.runner import harness_version, quiet, run_benchmark
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model
from ldalign.run.context import Context
from ldalign.run.manifest import Parents, hash_model_folder
from ldalign.run.settings import RunConfig
from ldalign.run.stage import Stage
from ldalign.system import distributed
from ldalign.system.files import write_json, write_jsonl
from ldalign.system.metrics import Metrics

BENCHMARKS_STAGE = Stage("benchmarks", by_task=True)


def wanted(config: RunConfig) -> list[Benchmark]:
    """The benchmarks that the config asks for."""
    b = config.benchmarks
    data = Path(b.data) if b.data else None
    return [Benchmark(name, data, b.shots) for name in dict.fromkeys(b.tasks)]


def check_benchmarks(config: RunConfig) -> None:
    """Checks what can be wrong with the benchmarks before a run begins: names, files, every row,
    lm-eval, the hub.

    Raises InputError or EnvironmentProblem, which name it.
    """
    found = wanted(config)
    if found:
        harness_version()
        quiet()
    for benchmark in found:
        benchmark.task()


def planned_benchmarks(config: RunConfig, name: str) -> list[str]:
    """The names of the benchmark stages of the policy that the run calls `name`."""
    return [_folder(name, task) for task in dict.fromkeys(config.benchmarks.tasks)]


def _folder(name: str, task: str) -> str:
    return f"{BENCHMARKS_STAGE.folder(name)}/{task}"


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
    return ctx.run.stage(_folder(name, task), parents, make)
