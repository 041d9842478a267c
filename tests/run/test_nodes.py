"""Several nodes: torchruns that meet at a port, as on several hosts, here on one machine."""

import re
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import ROOT, run_on_nodes
from safetensors.torch import load_file, save_file
from toy_context import config_of, open_toy

from ldalign.data.store import tokens_hash
from ldalign.models.toy import write_toy_model
from ldalign.run.manifest import hash_model_folder, run_stage
from ldalign.run.stages.guide import agree_on_guide, guide_hash
from ldalign.system import distributed, exits
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.files import read_jsonl
from ldalign.train.align import main

ONE = ["iterations=1", "continual_sft.epochs=0"]
ARGUMENTS = ["--config", ROOT / "configs/toy.yaml", "report=table", *ONE]
SHORT = "method=dpo sft.epochs=0 max_rows=32 evaluation.rows=4 evaluation.samples=0".split()
# (ranks a node, keys): the model sharded over all ranks, or in copies, one a node
CASES = {
    "sharded": (1, []),
    "copies": (2, ["training.shard_ranks=2"]),
    "copies, short": (1, [*SHORT, "training.shard_ranks=1"]),
}
LONG = ("sharded", "copies")


def losses(run: Path, stage: str) -> list[float]:
    return [r["loss"] for r in read_jsonl(run / stage / "metrics.jsonl") if "loss" in r]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in CASES],
)
def test_two_nodes_are_one_rank(
    name: str, tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """Both torchruns share the run folder; the policies differ by rounding alone."""
    ranks, keys = CASES[name]
    given = [*ARGUMENTS, f"cache={toy_cache}", *keys]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [key for key in map(str, given) if not key.startswith("training.shard_ranks")]
    main([*alone, f"run={one}"])
    node = [ROOT / "train/align.py", *given, f"run={two}"]
    for done in run_on_nodes(node, node, ranks_a_node=ranks):
        assert done.returncode == 0, done.stderr
    stage = "iteration_0/policy"
    assert len(losses(one, stage)) > 1
    assert losses(two, stage) == pytest.approx(losses(one, stage), abs=1e-4)
    policies = [load_file(run / stage / "model.safetensors") for run in (one, two)]
    start = load_file(toy_cache / "toy-2/model.safetensors")
    for weight, expected in policies[0].items():
        moved = (expected - start[weight].float()).norm()
        assert moved > 0 and (policies[1][weight] - expected).norm() <= 1e-2 * moved, weight


def change_a_weight(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1
    save_file(weights, path, {"format": "pt"})


DIFFERENT = {  # what the second node has: keys of its own, or a change in its folder; the line
    "settings": (["learning_rate=1e-4"], r"learning_rate 0\.0001, rank 0 on \S+ has 0\.001; start"),
    "policy": (change_a_weight, r"the policy policy [0-9a-f]{64}, rank 0 on \S+ has [0-9a-f]{64};"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*DIFFERENT, "run folder"])
def test_nodes_that_differ_are_refused(kind: str, tmp_path: Path, toy_cache: Path) -> None:
    """Each node in a folder of its own, with relative paths, as on hosts: one line on each, which
    names rank, host and key, and nothing is made in the run folder.
    """
    change, expected = DIFFERENT.get(kind, ([], ""))
    nodes = [tmp_path / node for node in "ab"]
    for node in nodes:
        write_toy_model(node / "policy")
    if kind == "run folder":  # what a rank 0 of the same name and number left on another disk
        for node in nodes:
            (node / "run").mkdir()
        (nodes[1] / "run/lock").write_text(f"host {socket.gethostname()} pid 1\n")
    else:
        (nodes[1] / "run").symlink_to(nodes[0] / "run")
    if callable(change):
        change(nodes[1] / "policy")
    own = change if isinstance(change, list) else []
    command = [ROOT / "train/align.py", *ARGUMENTS, *SHORT, f"cache={toy_cache}"]
    command += ["policy=policy", "run=run"]
    done = run_on_nodes(command, [*command, *own], folders=nodes)
    lines = [line for node in done for line in node.stderr.splitlines()]
    said = [line for line in lines if line.startswith("ldalign: error: ")]
    assert [node.returncode for node in done] == [1, 1]  # torchrun's
    assert len(said) == 2, done[0].stderr + done[1].stderr
    for line in said:
        if kind == "run folder":
            assert re.search(
                r"rank 1: run: on \S+ this is not the run folder of rank 0 \(host", line
            )
            assert "give a folder that all hosts share (run=PATH)" in line
        else:
            assert re.search(rf"rank 1 on \S+ has {expected}", line)
    left = {path.name for node in nodes for path in node.glob("run/*")}
    assert left <= {"lock"}


DIES = """
import os, sys
from pathlib import Path
import torch
from ldalign.system import distributed, exits

def main(argv):
    deaths, starts = int(argv[0]), Path(argv[1]) / os.environ["RANK"]
    with starts.open("a") as file:
        file.write("x")
    distributed.start("cpu", 5)
    distributed.barrier()
    start = len(starts.read_text())
    if start <= deaths and start % distributed.world_size() == distributed.rank():
        os._exit(1)
    distributed.barrier()
    assert distributed.total(torch.ones(1)) == distributed.world_size()
    starts.with_suffix(".done").touch()

exits.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_restarts_ranks_that_die(nodes: int, tmp_path: Path) -> None:
    """The ranks die in turn, each start of theirs with the store of the one before."""
    deaths, ranks = 4, 2
    script = tmp_path / "dies.py"
    script.write_text(DIES)
    command = [script, deaths, tmp_path]
    done = run_on_nodes(*[command] * nodes, ranks_a_node=ranks // nodes, restarts=10)
    assert [node.returncode for node in done] == [0] * nodes, done[0].stderr
    assert (tmp_path / "0.done").exists() and (tmp_path / "1.done").exists()
    starts = [len((tmp_path / str(rank)).read_text()) for rank in range(ranks)]
    assert deaths < max(starts) <= 11


def of_two(monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]) -> None:
    """This process is rank 0 of two; rank 1 on host `far` has `other`."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "on_all", lambda find: [find(), ("far", other)])


def test_ranks_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {"a": 1, "b": "x"}
    of_two(monkeypatch, dict(mine))
    distributed.agree(lambda: mine, "mend")
    of_two(monkeypatch, {"b": "y", "c": 2})
    host = re.escape(socket.gethostname())
    expected = rf"^rank 1 on far has a none, rank 0 on {host} has 1 \(and another b, c\); mend$"
    with pytest.raises(InputError, match=expected):
        distributed.agree(lambda: mine, "mend", InputError)


def test_a_rank_alone_looks_at_nothing(in_process: None) -> None:
    distributed.agree(lambda: pytest.fail("was called"), "")


def test_a_stages_inputs_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    of_two(monkeypatch, {"policy": "0" * 64, "data": "x"})
    folder = tmp_path / "reference"
    with pytest.raises(
        EnvironmentProblem, match=rf"^rank 1 on far has policy 000.* 111.*for {folder},"
    ):
        run_stage(folder, {"policy": "1" * 64, "data": "x"}, lambda partial: None)
    assert not list(tmp_path.iterdir())


def test_a_given_guide_is_compared(monkeypatch: pytest.MonkeyPatch, toy_run: Path) -> None:
    guide, planned = toy_run / "guide", ["guide"]
    config = config_of(toy_run.parent, f"guide={guide}")
    of_two(monkeypatch, {f"the guide {guide}": guide_hash(guide)})
    agree_on_guide(config, planned)
    of_two(monkeypatch, {f"the guide {guide}": "0" * 64})
    agree_on_guide(config, ["iteration_0/policy"])
    with pytest.raises(EnvironmentProblem, match=rf"rank 1 on far has the guide {guide} 000"):
        agree_on_guide(config, planned)


@pytest.mark.parametrize(
    "name",
    [
        "template",
        "training rows",
        "training tokens",
        "held-out tokens",
        "dtype",
        "kernels",
        "threads",
    ],
)
def test_what_is_read_is_compared(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, in_process: None
) -> None:
    """The policy's own template, the rows as they are read from the run folder, and the machine."""
    seen: list[dict[str, Any]] = []

    def agree(find: Callable[[], dict[str, Any]], mend: str) -> None:
        seen.append(find())

    monkeypatch.setenv("LDALIGN_BACKEND", "eager")
    monkeypatch.setattr(distributed, "agree", lambda find, mend, **more: agree(find, mend))
    ctx = open_toy(tmp_path)
    compared = {key: value for values in seen for key, value in values.items()}
    assert compared[f"the policy {ctx.start}"] == hash_model_folder(ctx.start)
    expected = {
        "template": ctx.tokenizer.template_hash,
        "training rows": ctx.used_hash,
        "training tokens": tokens_hash(ctx.train),
        "held-out tokens": tokens_hash(ctx.heldout),
        "dtype": "torch.float32",
        "kernels": "eager",
        "threads": 1,
    }
    assert compared[name] == expected[name]


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(peers: list[Any], mine: tuple[str, int, dict[str, str]], group: Any) -> None:
        peers[:] = [mine, ("far", 7, {**mine[2], "torch": "2.11.0"})]

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "_keep_alive", lambda: None)
    monkeypatch.setattr(exits, "PEERS", [])
    played = SimpleNamespace(new_group=lambda **options: None, all_gather_object=gather)
    monkeypatch.setattr(distributed, "dist", played)
    expected = rf"rank 1 on far has torch 2.11.0, rank 0 on .* has {torch.__version__}; install"
    with pytest.raises(EnvironmentProblem, match=expected.replace("+", r"\+")):
        distributed._meeting.__wrapped__()
