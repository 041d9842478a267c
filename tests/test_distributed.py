"""Several gloo ranks on one machine give what one rank gives. The ranks run this very file, under torchrun."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import run_script
from safetensors.torch import load_file, save_file

from ldalign import distributed
from ldalign.batches import Pair, deal
from ldalign.metrics import Mean
from ldalign.scoring import response_logps
from ldalign.training import TrainSettings, accumulate_gradients, train

CPU = torch.device("cpu")
# 5 pairs, then 2: on 3 ranks the last step leaves a rank without a pair. Micro-batches of one or two pairs.
SETTINGS = TrainSettings(epochs=25, global_batch=5, micro_tokens=45, learning_rate=1e-3, optimizer="adamw")


def training_pairs() -> list[Pair]:
    pairs = tiny.pairs(7, weights=[0.3, 1.7, 0.0, 2.2, 0.8, 1.0, 0.5])
    table = response_logps(tiny.mistral(), pairs, 10_000, CPU).tolist()
    return [replace(p, ref_real=real, ref_generated=gen) for p, (real, gen) in zip(pairs, table, strict=True)]


def work(folder: Path) -> dict[str, Any]:
    """What every rank does; rank 0's findings go to `folder`, the other ranks' results are compared with its own."""
    device = distributed.start("cpu")
    rank, world = distributed.rank(), distributed.world_size()
    pairs = training_pairs()
    found: dict[str, Any] = {"world": world}

    mean = Mean()
    model = tiny.mistral()
    distributed.shard(model, model.blocks, torch.float32, device)
    found["first loss"] = accumulate_gradients(model, pairs, SETTINGS, mean, device, True)
    found["norm"] = float(distributed.clip_grad_norm(model, 0.5))
    found["norm after"] = float(distributed.clip_grad_norm(model, 0.0))
    found["means"] = mean.reduce(device)

    model = tiny.mistral()
    found["last epoch"] = train(
        model, pairs, SETTINGS, compute_dtype=torch.float32, device=device, seed=0, stage="policy",
        metrics_path=folder / "metrics.jsonl",
    )  # fmt: skip
    state = distributed.full_state(model, torch.float32)
    assert bool(state) == (rank == 0)
    whole = {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
    for p in whole.values():
        assert torch.equal(distributed.total(p), p * world)  # the same on every rank
    if rank == 0:
        assert all(torch.equal(state[name], p) for name, p in whole.items())
        save_file(state, folder / "state.safetensors")

    mine = list(range(rank, 8, world))
    found["merged"] = distributed.merge_rows(8, mine, torch.tensor(mine) ** 2).tolist()
    found["logps"] = response_logps(tiny.mistral(), pairs, 45, device).tolist()

    last = Mean()
    last.muted = rank == world - 1 and world > 1  # a rank without rows: named, not counted, not even its NaN
    last.add("x", torch.tensor([1.0, 3.0]) if not last.muted else torch.tensor([float("nan")]))
    last.muted = False
    last.add("y", torch.tensor(10.0 * (rank + 1)), count=rank + 1)
    found["muted"] = last.reduce(device)
    distributed.barrier()
    distributed.stop()
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, Any]]]:
    out = {}
    for ranks in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = run_script(__file__, folder, ranks=ranks)
        if "terminate called without an active exception" in done.stderr:
            # Seen once in a dozen runs, at exit, after all the work: a thread of torch's, not yet understood.
            (folder / "metrics.jsonl").unlink(missing_ok=True)
            done = run_script(__file__, folder, ranks=ranks)
        assert done.returncode == 0, done.stderr
        out[ranks] = folder, json.loads((folder / "found.json").read_text())
    return out


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


Results = dict[int, tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize("ranks", [2, 3])
def test_same_trajectory_as_one_rank(results: Results, ranks: int) -> None:
    """50 steps: losses within 1e-4, mean drift within 1e-5; every metric by example; no line written twice."""
    one, many = steps(results[1][0]), steps(results[ranks][0])
    assert results[ranks][1]["world"] == ranks and len(one) == len(many) == 50
    gap = torch.tensor([a["loss"] - b["loss"] for a, b in zip(one, many, strict=True)], dtype=torch.float64)
    assert gap.abs().max() < 1e-4 and gap.mean().abs() < 1e-5
    assert one[-1]["loss"] < 0.8 * one[1]["loss"]
    free = {"tokens_per_second", "time/step", "memory/peak_gib", "entropy", "mean_token_accuracy"}
    free.add("rewards/accuracies")  # at step 0 every pair is a tie but for rounding
    assert one[0].keys() == many[0].keys()
    for name in one[0].keys() - free - {"stage"}:
        assert many[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_same_policy_as_one_rank(results: Results, ranks: int) -> None:
    one, many = (load_file(results[n][0] / "state.safetensors") for n in (1, ranks))
    start = tiny.mistral().state_dict()
    assert one.keys() == many.keys() == start.keys()
    for name, p in one.items():
        assert p.shape == start[name].shape
        assert (many[name] - p).norm() < 1e-2 * (p - start[name]).norm(), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_gradient_norm_is_global(results: Results, ranks: int) -> None:
    one, many = results[1][1], results[ranks][1]
    assert one["norm"] > 0.6
    assert many["norm"] == pytest.approx(one["norm"], rel=1e-4)
    assert many["norm after"] == pytest.approx(0.5, rel=1e-4) == one["norm after"]
    assert many["first loss"] == pytest.approx(one["first loss"], rel=1e-6)


def test_a_rank_runs_out_of_pairs(results: Results) -> None:
    """The case is there: with 3 ranks and a last batch of 2, one rank has an empty micro-batch."""
    plan = deal([pair.tokens for pair in training_pairs()[:2]], 3, SETTINGS.micro_tokens)
    assert [len(micros[0]) for micros in plan] == [1, 1, 0]
    one, many = steps(results[1][0])[1], steps(results[3][0])[1]
    assert many["rewards/margins"] == pytest.approx(one["rewards/margins"], rel=1e-3, abs=1e-5)
    assert many["len/chosen"] == one["len/chosen"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_merged_rows_and_scores(results: Results, ranks: int) -> None:
    assert results[ranks][1]["merged"] == [i**2 for i in range(8)]
    table, expected = torch.tensor(results[ranks][1]["logps"]), torch.tensor(results[1][1]["logps"])
    assert (table - expected).abs().max() < 1e-4 and table.shape == (7, 2)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_means_weigh_examples_not_ranks(results: Results, ranks: int) -> None:
    assert results[ranks][1]["muted"] == {"x": 2.0, "y": pytest.approx(10.0)}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    findings = work(target)
    if findings["world"] == 1 or os.environ["RANK"] == "0":
        (target / "found.json").write_text(json.dumps(findings))
