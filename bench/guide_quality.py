"""Which guide tells two responses apart: readout, objective, regularisation, injection, towers.

    python bench/guide_quality.py --out FOLDER [--data FOLDER] [--judge FOLDER] [--only WORD]

Trains every guide of bench/guide_quality.yaml on the same rows, with each seed, and measures it on
the same held-out prompts: what its latents are worth (`ldalign.evaluation.guide`), and whether a
judge calls the farther of two samples the worse one (`ldalign.evaluation.agreement`); beside it
what needs no training. Needs no peer; not part of `make bench`, as it takes over an hour.

--out: where samples and results are kept: run again, it goes on where it stopped. --data: the
folder of the real rows' files; --judge: that of all-MiniLM-L6-v2; a set that lacks its file is
left out and named. --only: the arms whose name has this in it. The page and the numbers go to
bench/results/guide-quality.{md,json}.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
import yaml

from ldalign.data import embedded
from ldalign.data.pairs import Pair, with_losers
from ldalign.evaluation.agreement import summary, verdict
from ldalign.evaluation.guide import heldout_figures
from ldalign.evaluation.statistics import superiority
from ldalign.models.guide import Guide, States, joined
from ldalign.models.guide_folder import pooled_guide
from ldalign.models.weights import load_model
from ldalign.objective import effective_size, latent_distance
from ldalign.run.context import Context
from ldalign.run.manifest import hash_settings
from ldalign.run.settings import RunConfig
from ldalign.run.stages.agreement_samples import agreement_samples_stage
from ldalign.run.stages.guide import guide_pairs, guide_plan, train_settings, untrained_guide
from ldalign.run.stages.judged import open_judge
from ldalign.run.stages.policy import planned_start, start_stage
from ldalign.run.stages.responses import responses_stage
from ldalign.system.config import load_config
from ldalign.system.exits import run
from ldalign.train.command import open_run
from ldalign.training.guide import keep_states, keeps_states, train_guide
from ldalign.training.latent_map import standardise
from ldalign.training.scoring import response_logps

HERE = Path(__file__).resolve().parent
# What a result depends on beside its keys: it is measured anew where one of these has changed.
PARTS = ("models/guide.py", "models/guide_folder.py", "training/guide.py", "training/latent_map.py")
CODE = hash_settings([(HERE.parent / "ldalign" / part).read_text() for part in PARTS])
CONFIG = HERE / "guide_quality.yaml"
FIGURE_ROWS = 150  # held out, of which a latent's worth is measured; agreement is over all
FEW = {"max_rows": 24, "evaluation.rows": 12, "guide.epochs": 1}  # what --small puts over the keys


def main(argv: list[str]) -> None:
    parser = common.options("guide_quality", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of samples and results")
    parser.add_argument("--data", type=Path, help="folder of the real rows' files")
    parser.add_argument("--judge", type=Path, help="folder of the sentence-embedding model")
    parser.add_argument("--only", default="", help="arms whose name has this in it")
    parser.add_argument("--set", dest="chosen", default="", help="sets whose name has this in it")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the experiment")
    args = parser.parse_args(argv)
    plan = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    arms = {name: keys for name, keys in plan["arms"].items() if args.only in name}
    found: dict[str, Any] = {}
    for name, asked in plan["sets"].items():
        if args.chosen not in name:
            continue
        missing = lacking(asked, args)
        if missing:
            common.say(f"{name}: left out: {missing}")
            found[name] = {"skipped": missing}
            continue
        own = {arm: keys for arm, keys in arms.items() if arm in asked.get("arms", arms)}
        found[name] = measure_set(name, asked, own, plan["seeds"], args)
    result = common.result("guide_quality", args, sets=found)
    common.save(result, render(result), args.results, "guide-quality")


def lacking(asked: Mapping[str, Any], args: argparse.Namespace) -> str | None:
    """What a set needs and has not got."""
    if "data" in asked and (args.data is None or not (args.data / asked["data"]).is_file()):
        return f"{asked['data']} is not there (--data FOLDER)"
    if asked.get("judge") == "embedding" and args.judge is None:
        return "its judge is a sentence-embedding model (--judge FOLDER)"
    return None


def measure_set(
    name: str,
    asked: Mapping[str, Any],
    arms: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """The results of one set of rows: {"without training": ..., "arms": {arm: [one a seed]}}."""
    folder = args.out / name.replace(" ", "-")
    keys = [f"run={folder / 'run'}", *asked.get("keys", ())]
    if "data" in asked:
        keys.append(f"data={args.data / asked['data']}")
    if asked.get("judge"):
        keys += [f"judge={asked['judge']}", f"judge.folder={args.judge}"]
    if args.small:
        keys += [f"{key}={value}" for key, value in FEW.items()]
    path = HERE.parent / asked["config"] if "config" in asked else None
    if args.small:
        path = HERE.parent / "configs" / "toy.yaml"
    config = load_config(RunConfig, path, keys)
    with open_run(config, planned_start(config)) as ctx:
        rows = Rows.of(ctx)
        results = folder / "results"
        results.mkdir(parents=True, exist_ok=True)
        untrained = kept(results / "untrained.json", {}, lambda: measure_untrained(rows))
        found: dict[str, list[dict[str, Any]]] = {}
        for seed in seeds:
            for arm, changes in arms.items():
                place = results / f"{seed}-{common_name(arm)}.json"
                given = [f"{key}={'null' if v is None else v}" for key, v in changes.items()]
                began = time.perf_counter()
                own = load_config(RunConfig, path, [*keys, f"seed={seed}", *given])
                one = kept(place, changes, lambda: measure_arm(rows, own))  # noqa: B023
                common.say(
                    f"{name}: {arm}, seed {seed}: sibling gain {one['sibling_gain']:+.2f} +- "
                    f"{one['sibling_gain_se']:.2f}, first {one['first_gain']:+.3f}, agreement "
                    f"{one.get('agreement/rate', float('nan')):.3f} / "
                    f"{one.get('agreement/sure_rate', float('nan')):.3f} "
                    f"({time.perf_counter() - began:.0f} s)"
                )
                found.setdefault(arm, []).append(one)
    return {"without training": untrained, "arms": found}


def kept(path: Path, changes: Mapping[str, Any], make: Any) -> dict[str, Any]:
    """The result in a file, made and written first where it is not there for these changes, or is
    of another ldalign.
    """
    whose = {"changes": dict(changes), "code": CODE}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("whose") == whose:
            return dict(stored["result"])
    result = make()
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps({"whose": whose, "result": result}, indent=1) + "\n", encoding="utf-8"
    )
    os.replace(partial, path)
    return dict(result)


def common_name(arm: str) -> str:
    """The arm's name as a file's."""
    return "".join(c if c.isalnum() or c == "." else "-" for c in arm)


@dataclasses.dataclass
class Rows:
    """The rows of a set, sampled and judged once for all arms."""

    ctx: Context
    start: Path
    train: list[Pair]  # real against sampled, the policy's ids
    first: list[Pair]  # held out: real against the first sample
    second: list[Pair]
    records: list[dict[str, Any]]  # of both samples: texts, tokens, the judge's preference
    states: dict[int, list[States]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, ctx: Context) -> "Rows":
        """Makes or reads the policy, its samples and the judge's preferences."""
        start = start_stage(ctx)
        most = ctx.config.max_length
        losers = responses_stage(ctx, 0, start).tokens
        samples = agreement_samples_stage(ctx, start)
        heldout = ctx.heldout.pairs[: len(samples) // 2]
        both = [
            with_losers(heldout, [s["token_ids"] for s in samples[side::2]], most)
            for side in (0, 1)
        ]
        rows = ctx.heldout.rows[: len(heldout)]
        texts = [[s["response"] for s in samples[side::2]] for side in (0, 1)]
        preferences = open_judge(ctx, start).prefer(rows, *texts)
        records = [
            {
                "first": one,
                "second": other,
                "first_length": len(a.generated or ()),
                "second_length": len(b.generated or ()),
                "preference": None if np.isnan(p) else p,
            }
            for one, other, a, b, p in zip(*texts, *both, preferences, strict=True)
        ]
        return cls(ctx, start, with_losers(ctx.used[1], losers, most), *both, records)


def measure_arm(rows: Rows, config: RunConfig) -> dict[str, Any]:
    """Trains one guide and measures it."""
    ctx = dataclasses.replace(rows.ctx, config=config)
    plan = guide_plan(ctx)
    guide = untrained_guide(ctx, plan, rows.start, ctx.used[0], rows.train)
    settings = train_settings(ctx, plan)
    pairs = guide_pairs(ctx, guide, ctx.used[0], rows.train)
    # The same frozen tower makes the same states for every arm.
    share = plan.towers == "policy" and keeps_states(guide, pairs, settings, ctx.dtype)
    states = shared_states(rows, 0, guide, pairs, settings.micro_tokens) if share else None
    began = time.perf_counter()
    train_guide(
        guide,
        pairs,
        settings,
        compute_dtype=ctx.dtype,
        device=ctx.device,
        seed=config.seed,
        states=states,
    )
    seconds = time.perf_counter() - began
    return evaluate(rows, ctx, guide, share) | {"seconds": seconds}


def shared_states(
    rows: Rows, which: int, guide: Guide, pairs: Sequence[Pair], budget: int
) -> list[States]:
    """The frozen tower's states of the training pairs (0) or of both held-out lists (1, 2)."""
    if which not in rows.states:
        rows.states[which] = keep_states(guide, pairs, budget)
    return rows.states[which]


@torch.no_grad()
def evaluate(
    rows: Rows, ctx: Context, guide: Guide, share: bool, trained: bool = True
) -> dict[str, Any]:
    """Held-out figures over the first samples, and agreement over both. Of a guide that is not
    trained, its distances say all there is to say.
    """
    guide.eval()
    chosen = ctx.heldout.rows[: len(rows.first)]
    budget = ctx.config.training.micro_tokens
    distances, figures = [], {}
    for which, own in ((1, rows.first), (2, rows.second)):
        pairs = guide_pairs(ctx, guide, chosen, own)
        states = shared_states(rows, which, guide, pairs, budget) if share else None
        if which == 1 and trained:
            some = None if states is None else states[:FIGURE_ROWS]
            figures = heldout_figures(guide, pairs[:FIGURE_ROWS], budget, some)
        if states is None:
            distances.append(guide.pair_distances(pairs, budget).tolist())
        else:
            z = guide.latent.read(joined(states).read)
            distances.append(latent_distance(z[0::2], z[1::2]).tolist())
    if not trained:
        figures = {"ess": effective_size(torch.tensor(distances[0], dtype=torch.float64))}
    return figures | agreement(rows, distances) | wrong(rows, distances)


def agreement(rows: Rows, distances: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How often the judge calls the farther sample the worse one."""
    records = []
    for record, one, other in zip(rows.records, *distances, strict=True):
        own = record | {"first_distance": one, "second_distance": other}
        records.append(own | {"verdict": verdict(own)})
    found = summary(records)
    # What each pair said, so that two guides can be compared pair by pair.
    return found | {"verdicts": [r["verdict"] for r in records]}


def wrong(rows: Rows, distances: Sequence[Sequence[float]]) -> dict[str, float]:
    """The area under the curve of "far means wrong", over the first samples, where a program says
    which are wrong.
    """
    heldout = rows.ctx.heldout.rows[: len(rows.first)]
    if any(row.kind is None for row in heldout):
        return {}
    right = np.array(
        [
            embedded.check(str(row.kind), row.answer, record["first"])
            for row, record in zip(heldout, rows.records, strict=True)
        ]
    )
    d = np.array(distances[0])
    found = superiority(d[~right], d[right])
    return (
        {} if found is None else {"auc": found.value, "auc_low": found.low, "auc_high": found.high}
    )


def measure_untrained(rows: Rows) -> dict[str, Any]:
    """What needs no training: the policy's mean states, a guide before training, NLL, length."""
    ctx = rows.ctx
    pooled = pooled_guide(rows.start, ctx.dtype, ctx.device)
    found = {"mean states": evaluate(rows, ctx, pooled, True, trained=False)}
    plan = guide_plan(ctx)
    if plan.towers == "policy":
        guide = untrained_guide(ctx, plan, rows.start, ctx.used[0], rows.train)
        standardise(guide, guide_pairs(ctx, guide, ctx.used[0], rows.train))
        found["a drawn map, untrained"] = evaluate(rows, ctx, guide, True, trained=False)
    lengths = [[float(r[f"{side}_length"]) for r in rows.records] for side in ("first", "second")]
    model = load_model(rows.start, ctx.dtype, ctx.device).requires_grad_(False)
    nll = []
    for own, counts in zip((rows.first, rows.second), lengths, strict=True):
        logps = response_logps(model, own, ctx.config.training.micro_tokens, ctx.device)
        nll.append((-logps[:, 1].double() / torch.tensor(counts).double()).tolist())
    found["NLL"] = agreement(rows, nll) | wrong(rows, nll)
    found["length"] = agreement(rows, lengths) | wrong(rows, lengths)
    return found


# --------------------------------------------------------------------------------------- the page


def render(result: Mapping[str, Any]) -> list[str]:
    """The Markdown page."""
    lines = [
        "## What tells two responses apart",
        "",
        "Held out, `bench/guide_quality.yaml`; each line is one change of the default, the mean of "
        "its seeds. Sibling gain: nats a response that a response's own latent adds to its "
        "log-prob over the latent of the other response to the same prompt, and the same at the "
        "first token where the two differ, +- standard errors over rows (a seed's, averaged). "
        "Better: how often its own latent is the better one. ESS: effective sample size of the "
        "distances. Agreement: how often the judge calls the farther of two samples the worse "
        "one, on all pairs and on the half of which it is surest, with 95 % intervals; and the "
        "default's rate less this one's, paired. AUC: of \"far means wrong\".",
    ]
    for name, found in result["sets"].items():
        lines += ["", f"### {name}", ""]
        if "skipped" in found:
            lines.append(f"Not run: {found['skipped']}.")
            continue
        header = "sibling gain", "first token", "better", "ESS", "agreement", "surer half"
        lines += common.table("guide", *header, "default less this", "AUC", "s")
        default = found["arms"].get("the default", [])
        for title, one in found["without training"].items():
            lines.append(_line(title, [one], default, trained=False))
        for title, ones in found["arms"].items():
            lines.append(_line(title, ones, default, trained=True))
    return lines


def _line(
    title: str,
    ones: Sequence[Mapping[str, Any]],
    default: Sequence[Mapping[str, Any]],
    trained: bool,
) -> str:
    def mean(key: str) -> float:
        return float(np.mean([one[key] for one in ones])) if key in ones[0] else float("nan")

    def rate(prefix: str) -> str:
        if f"{prefix}rate" not in ones[0]:
            return ""
        low, high = mean(f"{prefix}low"), mean(f"{prefix}high")
        return f"{mean(f'{prefix}rate'):.3f} ({low:.3f} to {high:.3f})"

    gain = first = better = ess = seconds = ""
    if trained:
        gain = f"{mean('sibling_gain'):+.2f} +- {mean('sibling_gain_se'):.2f}"
        first = f"{mean('first_gain'):+.3f} +- {mean('first_gain_se'):.3f}"
        better, seconds = f"{mean('own_better'):.0%}", f"{mean('seconds'):.0f}"
    if "ess" in ones[0]:
        ess = f"{mean('ess'):.2f}"
    auc = ""
    if "auc" in ones[0]:
        auc = f"{mean('auc'):.3f} ({mean('auc_low'):.3f} to {mean('auc_high'):.3f})"
    return common.row(
        title, gain, first, better, ess, rate("agreement/"), rate("agreement/sure_"),
        _paired(ones, default), auc, seconds,
    )  # fmt: skip


def _paired(ones: Sequence[Mapping[str, Any]], default: Sequence[Mapping[str, Any]]) -> str:
    """The default's rate of agreement less this one's, on the pairs that both decide."""
    gaps = list(_gaps(ones, default))
    if not gaps or not any(any(gap) for gap in gaps):
        return ""
    values = [np.array(gap) for gap in gaps]
    error = np.mean([v.std(ddof=1) / np.sqrt(len(v)) for v in values])
    return f"{np.mean([v.mean() for v in values]):+.3f} +- {error:.3f}"


def _gaps(
    ones: Sequence[Mapping[str, Any]], default: Sequence[Mapping[str, Any]]
) -> Iterator[list[float]]:
    for n, base in enumerate(default):
        one = ones[min(n, len(ones) - 1)]
        decided = [
            (a, b)
            for a, b in zip(base["verdicts"], one["verdicts"], strict=True)
            if {a, b} <= {"agree", "disagree"}
        ]
        if len(decided) > 1:
            yield [float(a == "agree") - float(b == "agree") for a, b in decided]


if __name__ == "__main__":
    run(main)
