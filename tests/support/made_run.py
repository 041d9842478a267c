"""Run folders of every kind with made numbers, for what reads a run: no model, a second each.

What a run of a small model on the embedded tasks leaves, in size and kind: two iterations, a
baseline, a guide that tells responses apart, and a few cautions. The texts are rows of the embedded
set, some of them spoilt.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ldalign.data import embedded
from ldalign.evaluation.agreement import RIVALS
from ldalign.evaluation.statistics import standard_error
from ldalign.run.settings import RunConfig
from ldalign.system.config import to_yaml
from ldalign.system.files import hash_file

PAIRS, PROMPTS, SAMPLES = 120, 96, 4
MACHINE = {
    "ldalign": "0.1.0",
    "git_commit": "0123456789abcdef0123456789abcdef01234567-dirty",
    "python": "3.11.7",
    "packages": {"torch": "2.13.0+cpu", "numpy": "2.4.6"},
    "system": "Linux-6.18-x86_64-with-glibc2.36",
    "cpu": "AMD EPYC",
    "cores": 2,
    "gpus": [],
    "world_size": 1,
}
POLICY = "a-policy-with-made-numbers"  # so that no picture of such a run is taken for a result
# A path longer than a phone is wide, without a place to break it.
LONG_PATH = "/srv/models/" + "a-folder-with-a-long-name/" * 6 + POLICY
GUIDE = {
    "rows": 51, "differing": 23, "true": 2.31, "other": 2.48, "none": 2.42, "latent_gain": 0.17,
    "sibling_gain": 1.033, "sibling_gain_se": 0.241, "first_gain": 0.633, "first_gain_se": 0.146,
    "own_better": 0.83, "own_better_se": 0.07, "none_gain": 0.318, "none_gain_se": 0.106,
    "other_gain": 0.543, "other_gain_se": 0.13, "ess": 0.84, "length_share": 0.02,
    "cut_share": 0.001, "tokens": 41234,
}  # fmt: skip


def made_run(folder: Path, kind: str) -> Path:
    """Makes a run folder as the script `kind` leaves it: align, evaluate, judge, sft or guide."""
    makers: dict[str, Callable[[Path], None]] = {
        "align": _align,
        "evaluate": lambda run: _evaluation(run, "start", 0.5, 0),
        "judge": _judge,
        "sft": _sft,
        "guide": _guide,
    }
    (folder / "data").mkdir(parents=True)
    config = to_yaml(RunConfig(run=f"runs/{kind}", policy=LONG_PATH))
    (folder / "config.yaml").write_text(config)
    (folder / "environment.json").write_text(json.dumps(MACHINE))
    _stage(folder, "data", 1.2, {"rows/train": 900, "rows/heldout": PROMPTS, "rows/unused": 3104})
    makers[kind](folder)
    seal(folder)
    return folder


def seal(run: Path) -> None:
    """Gives every stage of a run the manifest that fits its files, and keeps its parents."""
    for summary in sorted(run.rglob("summary.json")):
        path = summary.with_name("manifest.json")
        found = json.loads(path.read_text()) if path.is_file() else {"parents": {}}
        files = {
            str(file.relative_to(path.parent)): {
                "size": file.stat().st_size,
                "sha256": hash_file(file),
            }
            for file in sorted(path.parent.rglob("*"))
            if file.is_file() and file != path
        }
        path.write_text(json.dumps({**found, "files": files}))


def _stage(
    run: Path, name: str, seconds: float, summary: dict[str, Any], **files: list[dict[str, Any]]
) -> Path:
    """A stage with its summary and its files of lines, by their names without the ending."""
    folder = run / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps({**summary, "seconds": seconds}))
    for file, records in files.items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{file}.jsonl").write_text(lines)
    return folder


def _align(run: Path) -> None:
    _sft(run)
    _guide(run)
    for t, skill in enumerate((0.52, 0.54)):
        _iteration(run, t)
        _evaluation(run, f"iteration_{t}", skill, t + 1)
    _stage(run, "continual_sft/policy", 48, _trained(), metrics=_sft_steps("continual_sft"))
    _evaluation(run, "continual_sft", 0.53, 7)
    why = "the best of 2 iterations by validation NLL, 0.0657 nats/token after step 22 of 22"
    chosen = {"policy": "iteration_1", "folder": "iteration_1/policy", "select": "best", "why": why}
    (run / "selected.json").write_text(json.dumps(chosen))


def _sft(run: Path) -> None:
    _stage(run, "sft/policy", 90, _trained(), metrics=_sft_steps("sft"))
    _evaluation(run, "sft", 0.5, 0)


def _trained() -> dict[str, float]:
    return {
        "loss": 0.227, "tokens": 58389, "steps": 57, "validation/step": 57.0,
        "validation/nll_start": 1.7842, "validation/nll": 0.0786, "validation/nll_last": 0.0786,
    }  # fmt: skip


def _sft_steps(name: str) -> list[dict[str, Any]]:
    steps = [{"stage": name, "global_step": n, "nll": 1.8 / (1 + n / 4)} for n in range(1, 58)]
    found = [{"global_step": n, "validation/nll": 1.8 / (1 + n / 4)} for n in range(0, 58, 19)]
    return [*steps, *found]


def _guide(run: Path) -> None:
    _stage(run, "iteration_0/responses", 11, {"tokens": 12848, "losers/truncated_frac": 0.01})
    _stage(run, "guide", 49, GUIDE, metrics=[{"loss": 4.0}] * 6 + [{"loss": 2.0}] * 2)


def _judge(run: Path) -> None:
    found: dict[str, float] = {"prompts": PROMPTS, "rows": 71, "ties": 17, "no_verdict": 2}
    found |= {"identical": 6, "rate": 0.648, "low": 0.532, "high": 0.749, "chance": 0.5}
    found |= {"sure_rows": 36, "sure_rate": 0.722, "sure_low": 0.56, "sure_high": 0.842}
    for n, name in enumerate(RIVALS):
        for part, rows in (("", 60), ("_sure", 30)):
            own = {"rows": rows, "rate": 0.5 + 0.02 * n, "low": 0.38, "high": 0.64}
            own |= {"behind": 0.14 - 0.02 * n, "behind_se": 0.061}
            found |= {f"{name}{part}_{key}": value for key, value in own.items()}
    _stage(run, "agreement_samples", 14, {"rows": PROMPTS, "tokens": 9120})
    folder = _stage(run, "agreement", 5, {f"agreement/{key}": v for key, v in found.items()})
    parents = {"judge.model": "checker", "guide": "f00d"}
    (folder / "manifest.json").write_text(json.dumps({"parents": parents}))


def _spoilt(text: str, n: int) -> str:
    """Another answer: of three, one wrong, one longer, one that does not end."""
    return (f"{text[:-2]} 7", f"Let me think. {text}", f"{text}\n" * 3)[n % 3]


def _iteration(run: Path, t: int) -> None:
    draw = np.random.default_rng(10 + t)
    rows = embedded.make_rows(0, "train", PAIRS)
    real = [row["messages"][-1]["content"] for row in rows]
    same = draw.random(PAIRS) < 0.55
    own = [
        text if s else _spoilt(text, i) for i, (text, s) in enumerate(zip(real, same, strict=True))
    ]
    distance = np.where(same, 0.0, draw.gamma(4.0, 0.9, PAIRS) + 0.2)
    kept = np.flatnonzero(~same)
    weight = distance / distance[kept].mean()
    name = f"iteration_{t}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run / "data/train.jsonl").write_text(lines)
    _stage(
        run,
        f"{name}/responses",
        11,
        {"tokens": 12848, "losers/truncated_frac": 0.01},
        responses=[
            {"id": r["id"], "response": text, "n_tokens": len(text) // 3, "finish_reason": "stop"}
            for r, text in zip(rows, own, strict=True)
        ],
    )
    low, middle, high = np.quantile(distance[kept], (0.1, 0.5, 0.9)).tolist()
    found = {"distance/mean": float(distance[kept].mean()), "distance/p10": low}
    found |= {"distance/p50": middle, "distance/p90": high, "distance/length_share": 0.06}
    found |= {"distance/cut_share": 0.004, "weight/std": float(weight[kept].std())}
    found |= {"weight/min": float(weight[kept].min()), "weight/max": float(weight[kept].max())}
    found |= {"weight/ess": float(weight[kept].mean() ** 2 / (weight[kept] ** 2).mean())}
    _stage(
        run,
        f"{name}/distances",
        7,
        found,
        distances=[
            {"id": rows[i]["id"], "distance": float(distance[i]), "weight": float(weight[i])}
            for i in range(PAIRS)
        ],
    )
    reference = _stage(run, f"{name}/reference", 7, {})
    (reference / "rows.json").write_text(json.dumps([rows[i]["id"] for i in kept]))
    logps = -draw.gamma(3.0, 2.0, (len(kept), 2)) - 0.4 * distance[kept][:, None]
    save_file({"logps": logps}, reference / "reference.safetensors")
    steps = [
        {
            "stage": name, "global_step": n, "loss/unweighted": 0.693 - 0.0006 * n,
            "rewards/margins": 0.0012 * n + draw.normal(0, 0.004),
            "rewards/chosen": -0.0002 * n + draw.normal(0, 0.003),
            "rewards/rejected": -0.0014 * n + draw.normal(0, 0.003),
            "logps/chosen": -6 - 0.02 * n + draw.normal(), "logps/rejected": -8 - 0.1 * n,
            "rewards/accuracies": 0.5 + 0.006 * n,
        }
        for n in range(1, 26)
    ]  # fmt: skip
    checks = [{"global_step": n, "validation/nll": 0.078 - 0.0004 * n} for n in (0, 12, 25)]
    _stage(
        run,
        f"{name}/policy",
        42,
        {
            "loss": 0.6879, "tokens": 18831, "steps": 25, "rewards/margins": 0.009,
            "rewards/accuracies": 0.567, "pairs": len(kept), "losers/identical_frac": 0.61,
            "skipped_pairs": int(same.sum()), "validation/step": 25.0,
            "validation/nll_start": 0.0786, "validation/nll": 0.0695, "validation/nll_last": 0.0695,
        },
        metrics=[*steps, *checks],
    )  # fmt: skip


def _evaluation(run: Path, policy: str, skill: float, seed: int) -> None:
    """A policy's answers: prompts differ in how hard they are, alike for all policies."""
    rows = embedded.make_rows(0, "heldout", PROMPTS)
    ease = np.random.default_rng(5).normal(0, 0.35, PROMPTS)
    draw = np.random.default_rng(100 + seed)
    chance = np.clip(skill + ease, 0, 1)[:, None]
    right = np.random.default_rng(6).random((PROMPTS, 1 + SAMPLES)) < chance
    right ^= draw.random(right.shape) < 0.06
    tokens = np.array([len(row["messages"][-1]["content"]) // 3 + 1 for row in rows])
    logps = -tokens * draw.gamma(4.0, 0.016 - 0.01 * (skill - 0.5), PROMPTS)
    records = []
    for n, row in enumerate(rows):
        real = row["messages"][-1]["content"]
        said = [real if ok else _spoilt(real, n) for ok in right[n]]
        records.append(
            {
                "id": row["id"], "prompt": row["messages"][-2]["content"], "real": real,
                "logp": float(logps[n]), "n_tokens": int(tokens[n]), "greedy": said[0],
                "sampled": said[1:], "correct": right[n].tolist(),
            }
        )  # fmt: skip
    found: dict[str, float] = {"nll/real": float(-logps.sum() / tokens.sum())}
    found |= {"truncated_frac": 0.01, "tokens_generated": 11520}
    for key, values in (("greedy", right[:, 0]), ("sampled", right[:, 1:].mean(1))):
        values = values.astype(np.float64)
        found |= {f"accuracy/{key}": float(values.mean())}
        found |= {f"accuracy/{key}_se": standard_error(values)}
        for kind in sorted({row["kind"] for row in rows}):
            own = [value for value, row in zip(values, rows, strict=True) if row["kind"] == kind]
            found[f"accuracy/{key}/{kind}"] = float(np.mean(own))
    _stage(run, f"{policy}/evaluation", 18, found, answers=records)
