"""What a run's files say together: pairs joined by row id, correlations, concentration of weights.

One reader of a run folder, `read_pairs`, and pure functions over what it found. No model is loaded.
Formulas: docs/report.md.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ldalign.data import embedded
from ldalign.evaluation.statistics import Array, spearman, superiority
from ldalign.objective import effective_size
from ldalign.system.files import read_jsonl

Numbers = dict[str, Any]  # what is known of a policy, a stage or a run, by name

# -------------------------------------------------------------------------------------------- pairs


@dataclass(frozen=True)
class Sides:
    """What a method calls the two responses of a pair: the one made likelier, and the other."""

    better: str
    worse: str


OWN = Sides("real", "generated")
GIVEN = Sides("chosen", "rejected")
RANKED = Sides("preferred", "rejected")


def sides_of(method: Any) -> Sides:
    """Returns the names of the sides for a value of the key `method`."""
    return {"dpo": GIVEN, "self_reward": RANKED, "rlaif": RANKED}.get(str(method), OWN)


@dataclass(frozen=True)
class RunPairs:
    """One iteration's pairs, in the data's order; arrays are (N,), NaN where the run does not say.

    real and generated are named for LD-Align's and SPIN's: the better and the worse side, whatever
    `sides` calls them.
    """

    iteration: int
    ids: list[str]
    prompts: list[str]
    real: list[str]
    generated: list[str]
    tokens: Array  # of the generated response
    finished: NDArray[np.bool_]  # the generated response ended by itself
    trained: NDArray[np.bool_]  # the pair counts: its responses differ
    distance: Array
    weight: Array
    logp_real: Array  # under the reference, summed over the response, nats
    logp_generated: Array
    right: Array  # 1.0 where the checker accepts the generated response, 0.0 where not
    reward_real: Array
    reward_generated: Array
    sides: Sides = OWN
    preference: Array | None = None  # a judge's for the better sample, in [0.5, 1]; NaN: none
    data: Sequence[str] = ()  # the data's own responses, where neither side is one

    @property
    def nll(self) -> Array:
        """NLL of the generated response under the reference, nats per token.

        It may be of a part: max_length may have cut what was scored.
        """
        return -self.logp_generated / np.maximum(self.tokens, 1)

    @property
    def length_gap(self) -> Array:
        """Difference in length of the two responses, characters, without its sign."""
        gaps = [abs(len(g) - len(r)) for g, r in zip(self.generated, self.real, strict=True)]
        return np.array(gaps, dtype=np.float64)


# What a distance is laid against: key, name with its unit, the values of an iteration's pairs.
MEASURES: tuple[tuple[str, str, Callable[[RunPairs], Array]], ...] = (
    ("tokens", "length of the generated response, tokens", lambda p: p.tokens),
    ("length_gap", "difference in length, characters", lambda p: p.length_gap),
    ("nll", "NLL of the generated response, nats/token", lambda p: p.nll),
    ("nll_sum", "NLL of the generated response, nats", lambda p: -p.logp_generated),
    ("nll_real", "NLL of the real response, nats", lambda p: -p.logp_real),
    ("margin", "log-prob, real - generated, nats", lambda p: p.logp_real - p.logp_generated),
    ("wrong", "generated answer is wrong", lambda p: 1 - p.right),
    ("reward_gap", "reward, real - generated", lambda p: p.reward_real - p.reward_generated),
)


def read_pairs(run: Path, t: int) -> RunPairs | None:
    """Joins iteration t's pairs by row id from the run's finished stages; None without any."""
    folder, data = run / f"iteration_{t}", run / "data/train.jsonl"
    if not data.is_file():
        return None
    rows = {row["id"]: row for row in read_jsonl(data)}
    if not (folder / "responses/responses.jsonl").is_file():
        return _given_pairs(folder, t, rows)
    sampled = read_jsonl(folder / "responses/responses.jsonl")
    records = [record for record in sampled if record["id"] in rows]
    if len({record["id"] for record in records}) < len(records):
        return _ranked_pairs(folder, t, rows, records)
    real = [_response(rows[record["id"]]) for record in records]
    return _join(folder, t, rows, real, records)


def _given_pairs(folder: Path, t: int, rows: Mapping[str, Any]) -> RunPairs | None:
    """Joins preference data's pairs, chosen and rejected, once the reference has scored them."""
    if not (folder / "reference/rows.json").is_file():
        return None
    scored = json.loads((folder / "reference/rows.json").read_text(encoding="utf-8"))
    used = [rows[id_] for id_ in scored if "rejected" in rows.get(id_, ())]
    if not used:
        return None
    whole = {"n_tokens": math.nan, "finish_reason": "stop"}  # the data's responses have ends
    records = [
        {"id": row["id"], "response": row["rejected"][-1]["content"], **whole} for row in used
    ]
    return replace(_join(folder, t, rows, [_response(row) for row in used], records), sides=GIVEN)


def _ranked_pairs(
    folder: Path, t: int, rows: Mapping[str, Any], records: Sequence[Any]
) -> RunPairs | None:
    """Joins the two samples of each prompt, the one the judge prefers against the other.

    None before the judge has judged.
    """
    path = folder / "judged/judged.jsonl"
    if not path.is_file():
        return None
    first, second = records[0::2], records[1::2]
    (preferences,) = _columns(path, [record["id"] for record in first], "preference")
    turned = preferences < 0.5
    better = [b if turn else a for a, b, turn in zip(first, second, turned, strict=True)]
    worse = [a if turn else b for a, b, turn in zip(first, second, turned, strict=True)]
    pairs = _join(folder, t, rows, [record["response"] for record in better], worse)
    trained = pairs.trained & (np.abs(preferences - 0.5) > 0)  # False for NaN
    return replace(
        pairs,
        sides=RANKED,
        preference=np.maximum(preferences, 1 - preferences),
        trained=trained,
        data=[_response(rows[record["id"]]) for record in first],
    )


def _response(row: Mapping[str, Any]) -> str:
    messages = row.get("messages") or row["chosen"]
    return str(messages[-1]["content"])


def _join(
    folder: Path, t: int, rows: Mapping[str, Any], real: list[str], records: Sequence[Any]
) -> RunPairs:
    """Joins `real` and the records' responses with all that the stages say of them by row id."""
    ids = [record["id"] for record in records]
    used = [rows[id_] for id_ in ids]
    generated = [record["response"] for record in records]
    finished = np.array([record["finish_reason"] == "stop" for record in records], dtype=bool)
    verdicts = [_verdict(row, *pair) for row, *pair in zip(used, generated, finished, strict=True)]
    distances = _columns(folder / "distances/distances.jsonl", ids, "distance", "weight")
    rewards = _columns(folder / "pair_rewards/rewards.jsonl", ids, "real", "generated")
    scored, logps = _reference(folder / "reference", ids)
    differ = np.array([a != b for a, b in zip(real, generated, strict=True)], dtype=bool)
    return RunPairs(
        t,
        ids,
        [(row.get("messages") or row["chosen"])[-2]["content"] for row in used],
        real,
        generated,
        np.array([record["n_tokens"] for record in records], dtype=np.float64),
        finished,
        differ if scored is None else scored,
        distances[0],
        distances[1],
        logps[0],
        logps[1],
        np.array(verdicts, dtype=np.float64),
        rewards[0],
        rewards[1],
    )


def _verdict(row: Mapping[str, Any], text: str, finished: bool) -> float:
    if row.get("kind") not in embedded.KINDS:
        return math.nan
    return float(finished and embedded.check(row["kind"], row["answer"], text))


def _columns(path: Path, ids: list[str], *names: str) -> Array:
    """Reads (names, N) values of a JSON Lines file by row id; NaN where it has no such row."""
    found = {record["id"]: record for record in read_jsonl(path)} if path.is_file() else {}
    missing: dict[str, float] = {}
    return np.array(
        [[found.get(i, missing).get(name, math.nan) for i in ids] for name in names],
        dtype=np.float64,
    )


def _reference(folder: Path, ids: list[str]) -> tuple[NDArray[np.bool_] | None, Array]:
    """Reads which of `ids` the reference scored, and their log-probs (2, N): real, then generated.

    The first is None where nothing was scored. Log-probs are sums over a response, in nats.
    """
    logps = np.full((2, len(ids)), math.nan)
    if not (folder / "rows.json").is_file():
        return None, logps
    scored = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    place = {id_: i for i, id_ in enumerate(scored)}
    known = np.array([id_ in place for id_ in ids], dtype=bool)
    if scored:
        table = load_file(folder / "reference.safetensors")["logps"]  # (pairs, 2)
        picked = table[[place[id_] for id_ in ids if id_ in place]]
        logps[:, known] = picked.astype(np.float64).T
    return known, logps


# ------------------------------------------------------------------------------------------ figures


def summarise(pairs: RunPairs) -> Numbers:
    """Returns what table.json keeps of an iteration: correlations of distance, concentration."""
    kept = pairs.trained
    distance, weight = pairs.distance[kept], pairs.weight[kept]
    if not len(distance) or not np.isfinite(distance).all():
        return {"pairs": int(kept.sum())}
    correlations = {key: spearman(distance, values(pairs)[kept]) for key, _, values in MEASURES}
    right = pairs.right[kept]
    farther = superiority(distance[right == 0], distance[right == 1])
    return {
        "pairs": int(kept.sum()),
        "distance/zero": int((distance == 0).sum()),
        "weight/ess": effective_size(torch.from_numpy(weight)),
        "weight/top10_share": top_share(weight),
        "spearman": {key: vars(found) for key, found in correlations.items() if found},
        **({"wrong_is_farther": vars(farther)} if farther else {}),
    }


def concentration(weights: Array) -> Array:
    """Share of the total weight that the k heaviest of N pairs carry, k = 0..N: (N + 1,)."""
    heaviest_first = np.sort(weights)[::-1]
    total = heaviest_first.sum()
    shares = heaviest_first.cumsum() / total if total > 0 else np.zeros(len(weights))
    return np.concatenate([[0.0], shares])


def top_share(weights: Array, share: float = 0.1) -> float:
    """Share of the total weight that the heaviest `share` of the pairs carry, at least one."""
    return float(concentration(weights)[math.ceil(share * len(weights))]) if len(weights) else 0.0
