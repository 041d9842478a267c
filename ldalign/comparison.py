"""Several methods from one start, on the same prompts and the same budget: what `train/compare.py`
runs and reports.

The start policy is made once. Then every method trains from it, on the same rows with the same
number of optimizer steps, at each learning rate of one grid (first seed); its best on the
validation rows is run with the other seeds and reported on the rest of the held-out rows, which no
choice has seen. Every training is a run folder of its own, so the whole can be stopped and gone on
with at any time. What methods have in common (samples, guide, reference) is made once a seed and
linked into the runs that use it; their manifests prove that it fits.

Differences are paired by prompt: a method's figure for a prompt is the mean over seeds, the
standard error is over prompts. It holds for these seeds' average; the spread between seeds is
beside it.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.evaluation.statistics import standard_error
from ldalign.pipeline import STARTED
from ldalign.report import LEADING
from ldalign.settings import CompareConfig, RunConfig
from ldalign.stages import start_name
from ldalign.summaries import benchmark_summaries
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.files import make_folder, read_jsonl, write_json, write_text

START = "start"
# What runs of one seed have in common, whatever their method.
SHARED = ("start/evaluation", "guide", "iteration_0/responses", "iteration_0/reference")
FIGURES = ("sampled", "greedy", "nll")


@dataclass(frozen=True)
class Arm:
    """One method of the comparison, with the weights of its pairs."""

    name: str  # as the user gave it: METHOD or METHOD/WEIGHTS
    method: str
    weights: str

    @classmethod
    def of(cls, name: str) -> "Arm":
        """Of "ld_align" or "ld_align/shuffled"."""
        method, _, weights = name.partition("/")
        return cls(name, method, weights or "latent")


def start_config(config: CompareConfig) -> RunConfig:
    """The run that makes the start policy: SFT and its evaluation."""
    return _plain(
        config,
        run=f"{config.run}/{START}",
        iterations=0,
        learning_rate=config.compare.learning_rates[0],
        continual_sft=replace(config.continual_sft, epochs=0),
        method="ld_align",
    )


def arm_config(
    config: CompareConfig, start: Path, arm: Arm, seed: int, learning_rate: float
) -> RunConfig:
    """One training of one method: from the start policy, on the rows that the start's run wrote
    down.
    """
    data = Path(config.run) / START / "data"
    return _plain(
        config,
        run=str(arm_folder(config, arm, seed, learning_rate)),
        policy=str(start),
        method=arm.method,
        weights=arm.weights,
        seed=seed,
        learning_rate=learning_rate,
        data=str(data / "train.jsonl"),
        heldout=str(data / "heldout.jsonl"),
        turns="last",
        sft=replace(config.sft, epochs=0),
        continual_sft=replace(config.continual_sft, epochs=0),
        benchmarks=replace(config.benchmarks, tasks=[]),
    )


def arm_folder(config: CompareConfig, arm: Arm, seed: int, learning_rate: float) -> Path:
    """Where that training lies."""
    return Path(config.run) / f"seed_{seed}" / f"{arm.name.replace('/', '-')}-{learning_rate:g}"


def _plain(config: CompareConfig, **changes: Any) -> RunConfig:
    names = RunConfig.__dataclass_fields__
    return RunConfig(**{name: getattr(config, name) for name in names} | changes)


def share(config: CompareConfig, seed: int, folder: Path) -> None:
    """Links what other runs of this seed have made into a new run's folder. Rank 0 does it; all
    ranks call it.

    The new run also gets the start's date, as their prompts must be the same.
    """

    def link() -> None:
        make_folder(folder)
        (folder / "lock").touch()
        if not (folder / STARTED).is_file():
            write_text(
                folder / STARTED, (Path(config.run) / START / STARTED).read_text(encoding="utf-8")
            )
        for name in SHARED:
            made = sorted(
                path
                for path in folder.parent.glob(f"*/{name}")
                if (path / "manifest.json").is_file()
            )
            if made and not (folder / name).exists():
                make_folder((folder / name).parent)
                partial = folder / f"{name}.shared"
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(made[0], partial, copy_function=os.link)
                partial.rename(folder / name)

    on_rank0(link)


# ------------------------------------------------------------------------------------- measurements


def read_answers(folder: Path) -> dict[str, dict[str, float]]:
    """Figures of one policy for every held-out row, by id: sampled and greedy (shares right), nll
    (nats a token).
    """
    figures: dict[str, dict[str, float]] = {}
    for r in read_jsonl(folder / "evaluation/answers.jsonl"):
        figures[r["id"]] = {"nll": -r["logp"] / r["n_tokens"]}
        greedy, sampled = r.get("correct", [])[:1], r.get("correct", [])[1:]
        if greedy:
            figures[r["id"]]["greedy"] = float(greedy[0])
        if sampled:
            figures[r["id"]]["sampled"] = sum(sampled) / len(sampled)
    return figures


def last_policy(folder: Path, config: CompareConfig) -> Path:
    """The folder of the last iteration in a training's run."""
    return folder / f"iteration_{config.iterations - 1}"


def score(figures: dict[str, dict[str, float]], ids: Sequence[str]) -> float:
    """What a learning rate is chosen by, on the validation rows: sampled accuracy, else greedy;
    unchecked, -NLL.
    """
    rows = [figures[i] for i in ids]
    for name in FIGURES[:2]:
        if all(name in row for row in rows):
            return float(np.mean([row[name] for row in rows]))
    return -float(np.mean([row["nll"] for row in rows]))


def validation_ids(config: CompareConfig) -> tuple[list[str], list[str]]:
    """The held-out rows that learning rates are chosen on, and those that are reported."""
    ids = [r["id"] for r in read_jsonl(Path(config.run) / START / "data/heldout.jsonl")]
    return ids[: config.compare.validation_rows], ids[config.compare.validation_rows :]


def summarise(
    config: CompareConfig,
    arms: Sequence[Arm],
    chosen: dict[str, float],
    searched: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Everything the table shows: each arm's means, and differences from the start and between
    arms.
    """
    validation, test = validation_ids(config)
    seeds = config.compare.seeds
    start = _over_seeds(
        [read_answers(_start_of(config, arms, chosen, seed)) for seed in seeds], test
    )
    tables = {
        arm.name: _over_seeds(
            [
                read_answers(last_policy(arm_folder(config, arm, seed, chosen[arm.name]), config))
                for seed in seeds
            ],
            test,
        )
        for arm in arms
    }
    policies = {name: _row(table, start) for name, table in {START: start, **tables}.items()}
    contrasts = {
        f"{a} - {b}": _row(tables[a], tables[b])["difference"]
        for n, a in enumerate(tables)
        for b in list(tables)[:n]
    }
    return {
        "rows": {"validation": len(validation), "test": len(test)},
        "seeds": seeds,
        "learning_rates": chosen,
        "search": searched,
        "policies": policies,
        "contrasts": contrasts,
        "settings": asdict(config.compare),
        "steps": config.training.steps,
        "global_batch": config.global_batch,
        "max_rows": config.max_rows,
        "benchmarks": _benchmarks(config, arms, chosen),
    }


def _benchmarks(
    config: CompareConfig, arms: Sequence[Arm], chosen: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """{policy: {task: its summary}} of the start and of each arm's first seed."""
    seed, last = config.compare.seeds[0], f"iteration_{config.iterations - 1}"
    folders = {START: (Path(config.run) / START, start_name(config))}
    folders |= {arm.name: (arm_folder(config, arm, seed, chosen[arm.name]), last) for arm in arms}
    out: dict[str, dict[str, Any]] = {}
    for name, (run, policy) in folders.items():
        found = benchmark_summaries(run).items()
        out[name] = {
            key.rpartition("/")[2]: value for key, value in found if key.startswith(f"{policy}/")
        }
    return {name: tasks for name, tasks in out.items() if tasks}


def _start_of(
    config: CompareConfig, arms: Sequence[Arm], chosen: dict[str, float], seed: int
) -> Path:
    return arm_folder(config, arms[0], seed, chosen[arms[0].name]) / START


def _over_seeds(
    tables: Sequence[dict[str, dict[str, float]]], ids: Sequence[str]
) -> dict[str, np.ndarray]:
    """{figure: (seeds, rows)} of the rows in `ids`, without figures that no row has."""
    out = {}
    for name in FIGURES:
        kept = [i for i in ids if name in tables[0][i]]
        if kept:
            out[name] = np.array([[table[i][name] for i in kept] for table in tables])
    return out


def _row(table: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any]:
    out: dict[str, Any] = {"difference": {}}
    for name, values in table.items():
        gaps = values - other[name]
        out[name] = float(values.mean())
        out[f"{name}_se"] = standard_error(values.mean(0))
        out["difference"][name] = {
            "mean": float(gaps.mean()),
            "se": standard_error(gaps.mean(0)),
            "by_seed": [float(gap) for gap in gaps.mean(1)],
        }
    return out


# ------------------------------------------------------------------------------------------- report


def write_comparison(config: CompareConfig, summary: dict[str, Any]) -> str:
    """Writes report/comparison.json, .md and, with matplotlib, .svg and .png; returns the Markdown
    page.
    """
    folder = Path(config.run) / "report"
    text = render(summary)
    if distributed.rank() == 0:
        make_folder(folder)
        write_json(folder / "comparison.json", summary)
        write_text(folder / "comparison.md", text)
        try:
            from ldalign.figures import contrasts, write_chart
        except ImportError:
            return (
                f"{text}\n(no figure: matplotlib is not installed; pip install 'ldalign[report]')"
            )
        write_chart(contrasts(summary), folder)
    return text


def render(summary: dict[str, Any]) -> str:
    """The Markdown page."""
    policies = summary["policies"]
    figures = [name for name in FIGURES if name in policies[START]]
    titles = {"sampled": "sampled, %", "greedy": "greedy, %", "nll": "NLL, nats/token"}
    seeds, rows = summary["seeds"], summary["rows"]
    lines = [
        f"**{len(seeds)} seed(s), {rows['test']} held-out rows; learning rates chosen on "
        f"{rows['validation']} more**",
        "",
        f"Every method: {summary['max_rows']} prompts, {summary['steps']} optimizer steps of "
        f"{summary['global_batch']}",
        "",
        _line(
            [
                "method",
                "learning rate",
                *(titles[f] for f in figures),
                *(f"{titles[f]} - start" for f in figures),
                f"each seed: {titles[figures[0]]} - start",
            ]
        ),
        _line(["---"] * (3 + 2 * len(figures))),
    ]
    for name, row in policies.items():
        cells = [name, f"{summary['learning_rates'][name]:g}" if name != START else ""]
        cells += [_shown(f, row[f], row[f"{f}_se"]) for f in figures]
        if name == START:
            cells += [""] * (len(figures) + 1)
        else:
            gaps = row["difference"]
            cells += [_shown(f, gaps[f]["mean"], gaps[f]["se"], sign="+") for f in figures]
            cells.append(
                ", ".join(_shown(figures[0], gap, sign="+") for gap in gaps[figures[0]]["by_seed"])
            )
        lines.append(_line(cells))
    lines += [
        "",
        "**Between methods** (first minus second)",
        "",
        _line(["", *(titles[f] for f in figures), f"each seed: {titles[figures[0]]}"]),
        _line(["---"] * (2 + len(figures))),
    ]
    for name, gaps in summary["contrasts"].items():
        by_seed = ", ".join(
            _shown(figures[0], gap, sign="+") for gap in gaps[figures[0]]["by_seed"]
        )
        lines.append(
            _line(
                [
                    name,
                    *(_shown(f, gaps[f]["mean"], gaps[f]["se"], sign="+") for f in figures),
                    by_seed,
                ]
            )
        )
    rates = summary["settings"]["learning_rates"]
    what = "-NLL" if figures[0] == "nll" else f"{figures[0]} accuracy, %"
    lines += [
        "",
        f"**The search** (seed {seeds[0]}, validation rows: {what}; the best is taken)",
        "",
        _line(["method", *(f"{rate:g}" for rate in rates)]),
        _line(["---"] * (1 + len(rates))),
    ]
    factor = 1 if figures[0] == "nll" else 100
    for name, found in summary["search"].items():
        lines.append(
            _line(
                [
                    name,
                    *(
                        f"{factor * found[f'{rate:g}']:.{1 if factor > 1 else 4}f}"
                        for rate in rates
                    ),
                ]
            )
        )
    lines += _benchmark_lines(summary["benchmarks"], seeds[0])
    lines += [
        "",
        "+- is one standard error over prompts of the seeds' mean; differences are paired by "
        "prompt.",
        "",
    ]
    return "\n".join(lines)


def _benchmark_lines(found: dict[str, dict[str, Any]], seed: int) -> list[str]:
    """Every task's leading metric, of the first seed's policies."""
    if not found:
        return []
    tasks = sorted({task for scores in found.values() for task in scores})
    first = next(iter(found.values()))
    metrics = {
        task: next(
            m for m in LEADING if any(m in scores.get(task, {}) for scores in found.values())
        )
        for task in tasks
    }
    lines = [
        "",
        f"**Benchmarks**, % (seed {seed}; +- one standard error over rows)",
        "",
        _line(["", *(f"{task} {metric}" for task, metric in metrics.items())]),
        _line(["---"] * (1 + len(tasks))),
    ]
    for name, scores in found.items():
        cells = [
            _shown(m, scores[t][m], scores[t][f"{m}_se"]) if t in scores else ""
            for t, m in metrics.items()
        ]
        lines.append(_line([name, *cells]))
    shots = ", ".join(
        f"{t}: {s['rows']:.0f} rows, {s['shots']:.0f} shots" for t, s in sorted(first.items())
    )
    return [*lines, "", f"{shots}."]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(figure: str, value: float, error: float | None = None, sign: str = "") -> str:
    """Accuracies in per cent, NLL in nats."""
    factor, digits = (1, 4) if figure == "nll" else (100, 1)
    text = f"{factor * value:{sign}.{digits}f}"
    return text if error is None else f"{text} +- {factor * error:.{digits}f}"
