"""Several gloo ranks on one machine give what one gives. They run this very file."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from runs import one_thread, run_script
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from ldalign.data.pairs import Pair
from ldalign.models.mistral import Mistral
from ldalign.models.weights import load_model, stored_state, write_weights
from ldalign.system import distributed, exits
from ldalign.system.distributed import Sharding
from ldalign.system.metrics import Mean
from ldalign.training.batches import deal, pair_costs
from ldalign.training.policy import TrainSettings, accumulate_gradients, global_batch, train
from ldalign.training.scoring import response_logps

CPU = torch.device("cpu")
# 5 pairs, then 2: on 4 ranks the last step leaves two of them without a pair. Micro-batches of one
# or two pairs.
SETTINGS = TrainSettings(
    epochs=25, global_batch=5, micro_tokens=45, learning_rate=1e-3, optimizer="adamw"
)
# What must not change the trajectory either, by number of ranks: steps to compare, and settings.
# The vocabulary of 61 is no multiple of 2 or 4.
VARIANTS: dict[int, dict[str, tuple[int, dict[str, Any]]]] = {
    1: {"checkpointing": (50, {"checkpointing": "full"})},
    2: {
        "checkpointing": (10, {"checkpointing": "selective"}),
        "whole": (10, {"sharding": Sharding(whole="all")}),
        "copies": (10, {"sharding": Sharding(ranks=1, whole="nothing")}),
    },
    4: {
        "hybrid": (50, {"sharding": Sharding(ranks=2)}),
        "hybrid, nothing whole": (
            10,
            {"sharding": Sharding(ranks=2, whole="nothing"), "micro_tokens": 1},
        ),
    },
}
CASES = [
    (ranks, name)
    for ranks, variants in VARIANTS.items()
    for name in ("plain", *variants)
    if ranks > 1 or name != "plain"
]


def training_pairs() -> list[Pair]:
    pairs = tiny.pairs(7, weights=[0.3, 1.7, 0.0, 2.2, 0.8, 1.0, 0.5])
    table = response_logps(tiny.mistral(), pairs, 10_000, CPU).tolist()
    return [
        replace(p, ref_real=real, ref_generated=gen)
        for p, (real, gen) in zip(pairs, table, strict=True)
    ]


def work(folder: Path) -> dict[str, Any]:
    """Does what every rank does; rank 0's findings go to `folder`, others' must be the same."""
    device = distributed.start("cpu")
    rank, world = distributed.rank(), distributed.world_size()
    pairs = training_pairs()
    found: dict[str, Any] = {"world": world}

    for name, sharding in {
        "plain": Sharding(),
        "copies of two": Sharding(ranks=min(2, world)),
    }.items():
        found[f"{name} norms"] = norms(pairs, sharding, device)
    if world > 1:
        found["calls"] = {
            whole: calls(pairs, Sharding(world // 2, whole), device)  # type: ignore[arg-type]
            for whole in ("nothing", "gradients", "all")
        }

    for name, (steps, changes) in {"plain": (50, {}), **VARIANTS[world]}.items():
        model = tiny.mistral()
        train(
            model,
            pairs,
            replace(SETTINGS, **changes, max_steps=steps),
            compute_dtype=torch.float32,
            device=device,
            seed=0,
            stage="policy",
            metrics_path=folder / f"{name}.jsonl",
        )
        state = distributed.full_state(model, torch.float32)
        assert bool(state) == (rank == 0)
        if world > 1:
            whole = {name: p.full_tensor() for name, p in model.named_parameters()}  # type: ignore[attr-defined]
            for p in whole.values():
                assert torch.equal(distributed.total(p), p * world)  # the same on every rank
            if rank == 0:
                assert all(torch.equal(state[name], p) for name, p in whole.items())
        if rank == 0:
            save_file(state, folder / f"{name}.safetensors")

    save_tiny(folder / "model", rank)
    loaded = load_model(
        folder / "model",
        torch.float32,
        cut=lambda m: distributed.shard(
            m, m.blocks, torch.float32, device, Sharding(ranks=min(2, world))
        ),
    )
    found["loaded norms"] = norms(pairs, Sharding(ranks=min(2, world)), device, loaded)

    mine = list(range(rank, 8, world))
    found["merged"] = distributed.merge_rows(8, mine, torch.tensor(mine) ** 2).tolist()
    found["logps"] = response_logps(tiny.mistral(), pairs, 45, device).tolist()

    last = Mean()
    # a rank without rows: named, not counted, not even its NaN
    last.muted = rank == world - 1 and world > 1
    last.add("x", torch.tensor([1.0, 3.0]) if not last.muted else torch.tensor([float("nan")]))
    last.muted = False
    last.add("y", torch.tensor(10.0 * (rank + 1)), count=rank + 1)
    found["muted"] = means(last, device)
    distributed.barrier()
    distributed.stop()
    return found


def save_tiny(folder: Path, rank: int) -> None:
    """tiny.mistral() as a model folder, made by one rank, and there for all when this returns."""
    if rank == 0:
        folder.mkdir()
        model = tiny.mistral()
        raw = {**asdict(model.config), "model_type": "mistral"}
        (folder / "config.json").write_text(json.dumps(raw))
        write_weights(stored_state(model, model.state_dict()), folder, torch.float32)
    distributed.barrier()


def norms(
    pairs: list[Pair], sharding: Sharding, device: torch.device, model: Mistral | None = None
) -> dict[str, Any]:
    """Returns a global batch's loss, metrics and gradient norms: before clipping, after, plain."""
    mean, model = Mean(), model or tiny.mistral()
    distributed.shard(model, model.blocks, torch.float32, device, sharding)
    settings = replace(SETTINGS, sharding=sharding)
    batch = global_batch(model, pairs, settings, device)
    loss = float(distributed.total(accumulate_gradients(model, batch, settings, mean, device)))
    grads = [
        p.grad.full_tensor() if distributed.world_size() > 1 else p.grad for p in model.parameters()
    ]  # type: ignore
    plain = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    norm, factor = map(float, distributed.clip_grad_norm(model, 0.5))
    assert distributed.clip_grad_norm(model, 0.0)[1] == 1
    return {
        "loss": loss,
        "plain": plain,
        "norm": norm,
        "after": norm * factor,
        "means": means(mean, device),
    }


def means(mean: Mean, device: torch.device) -> dict[str, float]:
    """Returns the means over all ranks."""
    return mean.means(distributed.total(mean.totals(device)).tolist())


class Collectives(TorchDispatchMode):
    """Counts the process groups' operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._schema.name.removeprefix("c10d::")] += 1
        return func(*args, **(kwargs or {}))


def calls(pairs: list[Pair], sharding: Sharding, device: torch.device) -> dict[str, int]:
    """Counts how often a global batch of several micro-batches gathers, scatters and sums.

    Its micro-batches are returned too.
    """
    model = tiny.mistral()
    distributed.shard(model, model.blocks, torch.float32, device, sharding)
    settings = replace(SETTINGS, micro_tokens=20, sharding=sharding)
    with Collectives() as collectives:
        batch = global_batch(model, pairs, settings, device)
        accumulate_gradients(model, batch, settings, Mean(), device)
    plan = deal([p.tokens for p in pairs], distributed.world_size(), 20, pair_costs(model, pairs))
    return {**collectives.counts, "micro": len(plan[0])}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, Any]]]:
    out = {}
    for ranks in VARIANTS:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = run_script(__file__, folder, ranks=ranks)
        assert done.returncode == 0, done.stderr
        out[ranks] = folder, json.loads((folder / "found.json").read_text())
    return out


def steps(folder: Path, name: str = "plain") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


Results = dict[int, tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize(("ranks", "name"), CASES)
def test_same_trajectory_as_one_rank(results: Results, ranks: int, name: str) -> None:
    """50 steps: losses within 1e-4, mean drift within 1e-5; every metric by example; no line
    written twice.
    """
    one, many = steps(results[1][0]), steps(results[ranks][0], name)
    count = {**VARIANTS[ranks], "plain": (50, {})}[name][0]
    assert results[ranks][1]["world"] == ranks and len(one) == 50 and len(many) == count
    gap = torch.tensor(
        [a["loss"] - b["loss"] for a, b in zip(one, many, strict=False)], dtype=torch.float64
    )
    assert gap.abs().max() < 1e-4 and gap.mean().abs() < 1e-5
    assert one[-1]["loss"] < 0.8 * one[1]["loss"]
    free = {"tokens_per_second", "time/step", "memory/peak_gib", "entropy", "mean_token_accuracy"}
    free.add("rewards/accuracies")  # at step 0 every pair is a tie but for rounding
    assert one[0].keys() == many[0].keys()
    for key in one[0].keys() - free - {"stage"}:
        assert many[0][key] == pytest.approx(one[0][key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(
    ("ranks", "name"), [case for case in CASES if VARIANTS[case[0]].get(case[1], (50,))[0] == 50]
)
def test_same_policy_as_one_rank(results: Results, ranks: int, name: str) -> None:
    one = load_file(results[1][0] / "plain.safetensors")
    many = load_file(results[ranks][0] / f"{name}.safetensors")
    start = tiny.mistral().state_dict()
    assert one.keys() == many.keys() == start.keys()
    for key, p in one.items():
        assert p.shape == start[key].shape
        assert (many[key] - p).norm() < 1e-2 * (p - start[key]).norm(), key


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["plain", "copies of two", "loaded"])
def test_gradient_norm_is_global(results: Results, ranks: int, name: str) -> None:
    one, many = results[1][1]["plain norms"], results[ranks][1][f"{name} norms"]
    assert one["norm"] > 0.6
    assert many["norm"] == pytest.approx(one["norm"], rel=1e-4) == many["plain"]
    assert many["after"] == pytest.approx(0.5, rel=1e-4)
    assert many["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert many["means"]["rewards/margins"] == pytest.approx(
        one["means"]["rewards/margins"], rel=1e-3, abs=1e-5
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_nothing_is_gathered_or_reduced_for_nothing(results: Results, ranks: int) -> None:
    """Two blocks and the rest: three groups. Only the first block is let go of
    between forward and backward.

    Two copies of the model: on 2 ranks each is whole, so that nothing is
    gathered and nothing scattered.
    """
    calls = results[ranks][1]["calls"]
    micro = calls["all"]["micro"]
    assert micro > 1
    gathers = {"nothing": 4 * micro, "gradients": 4 * micro, "all": 3}
    scatters = {"nothing": 3 * micro, "gradients": 3, "all": 3}
    for whole, counts in calls.items():
        # each group's sum over the copies; the loss is summed by the loop, with the metrics
        assert counts["allreduce_"] == 3, whole
        assert counts.get("_allgather_base_", 0) == (gathers[whole] if ranks == 4 else 0), whole
        assert counts.get("_reduce_scatter_base_", 0) == (scatters[whole] if ranks == 4 else 0), (
            whole
        )


def test_a_rank_runs_out_of_pairs(results: Results) -> None:
    """The case is there: with 4 ranks and a last batch of 2, two ranks have an
    empty micro-batch.
    """
    plan = deal([pair.tokens for pair in training_pairs()[:2]], 4, SETTINGS.micro_tokens)
    assert [len(micros[0]) for micros in plan] == [1, 1, 0, 0]
    one, many = steps(results[1][0])[1], steps(results[4][0])[1]
    assert many["rewards/margins"] == pytest.approx(one["rewards/margins"], rel=1e-3, abs=1e-5)
    assert many["len/chosen"] == one["len/chosen"]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_merged_rows_and_scores(results: Results, ranks: int) -> None:
    assert results[ranks][1]["merged"] == [i**2 for i in range(8)]
    table, expected = torch.tensor(results[ranks][1]["logps"]), torch.tensor(results[1][1]["logps"])
    assert (table - expected).abs().max() < 1e-4 and table.shape == (7, 2)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_means_weigh_examples_not_ranks(results: Results, ranks: int) -> None:
    assert results[ranks][1]["muted"] == {"x": 2.0, "y": pytest.approx(10.0)}


JOINS = """
from ldalign.system import distributed, exits

def main(argv):
    print("joins", flush=True)
    distributed.start("cpu", 5)

exits.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_while_ranks_wait_for_others(rank: int, number: signal.Signals) -> None:
    """Rank 0 waits for rank 1 to come; rank 1 for rank 0, which is there and says nothing."""
    with socket.socket() as first:
        first.bind(("localhost", 0))
        port = first.getsockname()[1]
        if rank == 0:
            first.close()
        else:
            first.listen()
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        waiting = subprocess.Popen(
            [sys.executable, "-c", JOINS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**one_thread(), **variables},
        )
        assert waiting.stdout is not None and waiting.stdout.readline() == "joins\n"
        if rank == 1:
            connection, _ = first.accept()  # it is connected, and waits for an answer
            connection.recv(1)
        else:
            while True:  # until its store is there, which then waits for the other rank
                with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
                    break
                time.sleep(0.05)
        waiting.send_signal(number)
        _, said = waiting.communicate()
        assert waiting.returncode == 128 + number, said
        assert f"ldalign: error: rank {rank}: stopped by {number.name}; " in said


def main(argv: list[str]) -> None:
    target = Path(argv[0])
    findings = work(target)
    if findings["world"] == 1 or os.environ["RANK"] == "0":
        (target / "found.json").write_text(json.dumps(findings))


if __name__ == "__main__":
    exits.run(main)
