"""What a comparison of several methods from one start has found: the numbers of its page.

The start policy is made once. Then every method trains from it, on the same rows with the same
number of optimizer steps, at each learning rate of one grid (first seed); its best on the
validation rows is run with the other seeds and reported on the rest of the held-out rows, which no
choice has seen. `ldalign.run.comparison` has the arms and reads their answers;
`ldalign.report.comparison_page` writes the page.

Methods of one seed share samples, guide, row order and the random numbers of the evaluation, so
differences are taken seed by seed and prompt by prompt; their errors are of both
(`ldalign.evaluation.crossed`).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ldalign.evaluation.crossed import bootstrap, estimate, ratio, smallest_difference
from ldalign.evaluation.statistics import Array, holm, spearman, standard_error, superiority
from ldalign.report.analysis import RunPairs, read_pairs
from ldalign.report.words import command, machine_line
from ldalign.run.compare_settings import CompareConfig
from ldalign.run.comparison import (
    START,
    Arm,
    arm_folder,
    iteration_folders,
    last_iteration,
    read_answers,
    scored_by,
    searched,
    validation_ids,
)
from ldalign.run.folder import SUMMARY, benchmark_summaries, read_machine, read_summary
from ldalign.run.stages.evaluation import answers_file
from ldalign.run.stages.guide import GUIDE_STAGE
from ldalign.run.stages.policy import start_name
from ldalign.system.config import to_yaml
from ldalign.system.errors import InputError
from ldalign.system.files import read_jsonl

Numbers = dict[str, Any]
Table = dict[str, Array]  # by figure, the values of one policy: (seeds, prompts)
# How far texts are from others by sentence embeddings, 1 - cos (N,); of two lists and their ids.
Distance = Callable[[Sequence[str], Sequence[str], Sequence[str]], Array]
CLOSENESS = "closeness"  # cosine of a policy's answers and the real response, by that model
SHOWN = ("sampled", "greedy", CLOSENESS, "nll")  # the first that there is leads
# What every other method is held against, where it is compared; without any of them all pairs are.
ANCHORS = ("ld_align", "spin", "sft")
ORACLE = "ld_align/oracle"
EQUAL = ("spin", "ld_align/uniform")  # weights of 1: what a weight's gain is counted from
MANY = 1e6  # degrees of freedom of an error that is known


def summarise(
    config: CompareConfig,
    arms: Sequence[Arm],
    chosen: Mapping[str, float],
    distance: Distance | None = None,
) -> Numbers:
    """Returns what the page shows. chosen: every method's learning rate. distance: by sentence
    embeddings, where such a model is given.
    """
    validation, test = validation_ids(config)
    tables = read_tables(config, arms, chosen, test, distance)
    figures = [name for name in SHOWN if name in tables[START]]
    primary, others = comparisons(config, tables)
    return {
        "rows": {"validation": len(validation), "test": len(test)},
        "seeds": config.compare.seeds,
        "figures": figures,
        "learning_rates": dict(chosen),
        "searched_by": searched_by(config, arms[0], chosen[arms[0].name]),
        "search": {arm.name: search(config, arm) for arm in arms},
        "policies": {
            name: {figure: asdict(estimate(table[figure])) for figure in figures}
            for name, table in tables.items()
        },
        "primary": primary,
        "others": others,
        "on_the_way": on_the_way(config, arms, chosen, test, tables),
        "oracle": oracle_shares(tables),
        "guides": guides(config, arms, chosen),
        "weights": weights_before_training(config, arms, chosen, distance),
        "power_before": power_before(
            tables[START], config.evaluation.samples, len(config.compare.seeds)
        ),
        "settings": asdict(config.of_all.compare),
        "steps": config.training.steps,
        "iterations": config.iterations,
        "global_batch": config.global_batch,
        "max_rows": config.max_rows,
        "benchmarks": benchmarks(config, arms, chosen),
        "again": again(config),
    }


def again(config: CompareConfig) -> Numbers:
    """What makes the comparison again: every key that is not its default (YAML), the command, the
    commit and the machine, as the run wrote them down.
    """
    machine = read_machine(Path(config.run))
    return {
        "settings": to_yaml(config.of_all, changed=True),
        "command": command({"run": config.run}, machine, "compare"),
        "commit": machine.get("git_commit"),
        "machine": machine_line(machine) if machine else None,
    }


# --------------------------------------------------------------------------------- policies' tables


def read_tables(
    config: CompareConfig,
    arms: Sequence[Arm],
    chosen: Mapping[str, float],
    ids: Sequence[str],
    distance: Distance | None = None,
) -> dict[str, Table]:
    """The figures of the start and of every method's last policy, on these held-out rows.

    distance: measures `closeness`, of answers to rows that no program checks.
    """

    def read(arm: Arm, seed: int) -> tuple[Path, Path]:
        run = arm_folder(config, arm, seed, chosen[arm.name])
        return run / START, last_iteration(run, config)

    seeds = config.compare.seeds
    # The start's answers are in every training's folder: they are made once a seed.
    folders = {START: [read(arms[0], seed)[0] for seed in seeds]}
    folders |= {arm.name: [read(arm, seed)[1] for seed in seeds] for arm in arms}
    answers = {name: [read_answers(folder) for folder in own] for name, own in folders.items()}
    if distance is not None:
        every = [folder for own in folders.values() for folder in own]
        close = iter(closeness(every, distance))
        for table in (table for own in answers.values() for table in own):
            for row, value in next(close).items():
                table[row][CLOSENESS] = value
    return {name: table_of(own, ids) for name, own in answers.items()}


def closeness(folders: Sequence[Path], distance: Distance) -> list[dict[str, float]]:
    """How close each policy's answers come to the real responses, by id of the rows that have
    answers which no program checks: the mean cosine of the samples, or of the greedy answer where
    there are none.

    folders: the policies', as of `read_answers`. All are measured in one call, as they have the
    real responses and many an answer in common.
    """
    out: list[dict[str, float]] = [{} for _ in folders]
    asked: list[tuple[int, str, str, str]] = []  # policy, row, real response, answer
    for n, folder in enumerate(folders):
        for r in read_jsonl(answers_file(folder)):
            if "greedy" in r and not r["correct"]:
                own = r["sampled"] or [r["greedy"]]
                asked += [(n, r["id"], r["real"], answer) for answer in own]
                out[n][r["id"]] = 0.0
    if asked:
        _, ids, real, answers = zip(*asked, strict=True)
        counts = Counter((n, row) for n, row, _, _ in asked)
        for (n, row, _, _), far in zip(asked, distance(real, answers, ids), strict=True):
            out[n][row] += (1 - float(far)) / counts[n, row]
    return out


def table_of(answers: Sequence[Mapping[str, Mapping[str, float]]], ids: Sequence[str]) -> Table:
    """Returns {figure: (seeds, rows)} of the rows in `ids`, without figures that no row has."""
    out = {}
    for name in SHOWN:
        kept = [i for i in ids if name in answers[0][i]]
        if kept:
            out[name] = np.array([[table[i][name] for i in kept] for table in answers])
    return out


def searched_by(config: CompareConfig, arm: Arm, rate: float) -> str:
    """The figure that the validation rows choose by; all policies answer the same rows, so that any
    training tells.
    """
    run = arm_folder(config, arm, config.compare.seeds[0], rate)
    return scored_by(read_answers(last_iteration(run, config)), validation_ids(config)[0])


def search(config: CompareConfig, arm: Arm) -> dict[str, Numbers]:
    """By learning rate, the score on the validation rows with the first seed, by how much the best
    one's is more, paired by row, and the standard error of that over rows.
    """
    found = searched(config, arm)
    best = max(found.values(), key=lambda values: values.mean())
    return {
        f"{rate:g}": {
            "score": float(values.mean()),
            "below": float((best - values).mean()),
            "se": standard_error(best - values),
        }
        for rate, values in found.items()
    }


def benchmarks(
    config: CompareConfig, arms: Sequence[Arm], chosen: Mapping[str, float]
) -> dict[str, Numbers]:
    """Returns {policy: {task: [its summary, a seed each]}} of the start, which has one, and of
    every method's last policy.
    """
    last = f"iteration_{config.iterations - 1}"
    folders = {START: [Path(config.run) / START]}
    folders |= {
        arm.name: [arm_folder(config, arm, n, chosen[arm.name]) for n in config.compare.seeds]
        for arm in arms
    }
    out: dict[str, Numbers] = {}
    for name, runs in folders.items():
        policy, tasks = start_name(config) if name == START else last, dict[str, list[Numbers]]()
        for run in runs:
            for key, value in benchmark_summaries(run).items():
                if key.startswith(f"{policy}/"):
                    tasks.setdefault(key.rpartition("/")[2], []).append(value)
        out[name] = tasks
    return {name: tasks for name, tasks in out.items() if tasks}


# -------------------------------------------------------------------------------------- differences


def comparisons(
    config: CompareConfig, tables: Mapping[str, Table]
) -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """The differences named in advance, and the others shown: {"A - B": {figure: numbers}}.

    Of the leading figure, the first that there is, the numbers have `p_holm`, p adjusted by Holm's
    method over each of the two families; no other figure is tested.
    """
    named = config.primary
    rest = [pair for pair in shown_pairs(list(tables)) if not {pair, pair[::-1]} & {*named}]
    families = []
    for pairs in (named, rest):
        family = {f"{a} - {b}": difference(tables[a], tables[b]) for a, b in pairs}
        leading = {name: next(iter(gaps.values())) for name, gaps in family.items()}
        adjusted = holm({name: gap["p"] for name, gap in leading.items()})
        for name, gap in leading.items():
            gap["p_holm"] = adjusted[name]
        families.append(family)
    return families[0], families[1]


def shown_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of policies whose difference is shown, first less second: every method and the
    start; and all pairs of methods one of which is an anchor (LD-Align less any other, any other
    less SPIN and SFT). Without an anchor all pairs of methods.
    """
    methods = [name for name in names if name != START]
    anchors = [name for name in ANCHORS if name in methods]
    others = [name for name in methods if name not in anchors]
    pairs = [(name, START) for name in methods]
    pairs += combinations(anchors or methods, 2)
    for name in others:
        pairs += [(a, name) if a == ANCHORS[0] else (name, a) for a in anchors]
    return pairs


def difference(first: Table, second: Table) -> dict[str, Numbers]:
    """First minus second of two policies, by figure: mean, errors, interval, p, and the bootstrap's
    error and interval.
    """
    out = {}
    for figure, values in first.items():
        gaps = values - second[figure]
        found, drawn = estimate(gaps), bootstrap(gaps)
        low, high = np.quantile(drawn, [0.025, 0.975]).tolist()
        again = {"se": float(drawn.std()), "low": low, "high": high}
        out[figure] = {**asdict(found), "sees": found.sees(), "bootstrap": again}
    return out


def on_the_way(
    config: CompareConfig,
    arms: Sequence[Arm],
    chosen: Mapping[str, float],
    ids: Sequence[str],
    tables: Mapping[str, Table],
) -> Numbers:
    """How much of a method's difference from the start is there after each iteration: `figure`, the
    first that every policy's answers have, and `methods`, {method: [value and errors, an iteration
    each]}. {} where there is one iteration, or only the last is measured.
    """
    if config.iterations < 2 or config.evaluation.iterations == "last":
        return {}
    start = {name: v for name, v in tables[START].items() if name != CLOSENESS}
    figure = next(iter(start))
    out: dict[str, list[Numbers]] = {}
    for arm in arms:
        runs = [arm_folder(config, arm, n, chosen[arm.name]) for n in config.compare.seeds]
        earlier = zip(*(iteration_folders(run, config)[:-1] for run in runs), strict=True)
        found = [table_of([read_answers(folder) for folder in own], ids) for own in earlier]
        found.append(tables[arm.name])
        out[arm.name] = [asdict(estimate(table[figure] - start[figure])) for table in found]
    return {"figure": figure, "methods": out}


def oracle_shares(tables: Mapping[str, Table]) -> Numbers:
    """Which share of what the checker's weights gain over equal ones each other weight gains.

    {} without the oracle or a method of equal weights. `shares`: {figure: {method: value, low,
    high}}, and None for a method where the oracle's own gain may be none.
    """
    base = next((name for name in EQUAL if name in tables), None)
    if base is None or ORACLE not in tables:
        return {}
    weighted = [name for name in tables if name.startswith("ld_align") and name != base]
    shares: dict[str, dict[str, Numbers | None]] = {}
    for figure, equal in tables[base].items():
        gain = tables[ORACLE][figure] - equal
        found = {
            name: ratio(tables[name][figure] - equal, gain) for name in weighted if name != ORACLE
        }
        shares[figure] = {name: asdict(share) if share else None for name, share in found.items()}
    return {"gain": f"{ORACLE} - {base}", "shares": shares}


def power_before(start: Table, samples: int, seeds: int) -> Numbers:
    """What can be known before any training of the differences that would be seen in sampled
    accuracy: those of two policies that answer every prompt right as often as the start does, and
    independently; and `prompts`, how many have a checker and count. {} without two samples of
    checked answers.

    A prompt's share of right ones of n samples varies by p (1 - p) / n, estimated without bias by
    share (1 - share) / (n - 1). Effects of seeds and prompts on the difference come on top.
    """
    if "sampled" not in start or samples < 2:
        return {}
    shares = start["sampled"]
    variance = float((shares * (1 - shares)).mean()) / (samples - 1)
    prompts = shares.shape[1]
    se = float(np.sqrt(2 * variance / (seeds * prompts)))
    return {"se": se, "sees": smallest_difference(se, MANY), "prompts": prompts}


# ------------------------------------------------------------------------ what weights know, before


def guides(
    config: CompareConfig, arms: Sequence[Arm], chosen: Mapping[str, float]
) -> list[Numbers]:
    """The held-out figures of each seed's guide, which its methods share; [] where none has one."""
    out = []
    for seed in config.compare.seeds:
        runs = (arm_folder(config, arm, seed, chosen[arm.name]) for arm in arms)
        paths = (run / GUIDE_STAGE.folder(0) / SUMMARY for run in runs)
        found = next((path for path in paths if path.is_file()), None)
        if found is not None:
            out.append(read_summary(found.parent))
    return out


def weights_before_training(
    config: CompareConfig,
    arms: Sequence[Arm],
    chosen: Mapping[str, float],
    distance: Distance | None,
) -> dict[str, Numbers]:
    """By method with weights, what those of the first iteration know of the losers: `wrong`, a seed
    each, the probability that a wrong one weighs more than a right one (None: too few of a kind);
    `embedding`, Spearman's correlation of weight and distance from the data's response by sentence
    embeddings, and the numbers of wrong and right losers.
    """
    seeds = config.compare.seeds
    weighted = [arm for arm in arms if arm.method == "ld_align" and not arm.retrain]
    measured: dict[int, Array] = {}
    out: dict[str, Numbers] = {}
    for arm in weighted:
        found: list[Numbers] = []
        for seed in seeds:
            run = arm_folder(config, arm, seed, chosen[arm.name])
            pairs = read_pairs(run, 0)
            if pairs is None:
                raise InputError(
                    f"{run}: its rows or responses are gone, though it is finished; delete "
                    f"{run / 'iteration_0'} to have them made again"
                )
            if distance is not None and seed not in measured:
                # All methods of a seed have the same losers.
                measured[seed] = distance(pairs.real, pairs.generated, pairs.ids)
            found.append(_known(pairs, measured.get(seed)))
        out[arm.name] = {key: [numbers[key] for numbers in found] for key in found[0]}
    return out


def _known(pairs: RunPairs, far: Array | None) -> Numbers:
    """What one seed's weights know of the losers that are trained on. far: (N,), `Distance`."""
    kept = pairs.trained
    weight, right = pairs.weight[kept], pairs.right[kept]
    heavier = superiority(weight[right == 0], weight[right == 1])
    farther = None if far is None else spearman(weight, far[kept])
    return {
        "wrong": vars(heavier) if heavier else None,
        "embedding": vars(farther) if farther else None,
        "losers": {"wrong": int((right == 0).sum()), "right": int((right == 1).sum())},
    }
