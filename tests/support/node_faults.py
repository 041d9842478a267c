"""Faults on one of two nodes: no run of them ends with exit 0 and a wrong result.

    .venv/bin/python tests/support/node_faults.py [--only NAME ...] [--restarts 20] [--seen FILE]

Each fault strikes a small run of all stages on two torchruns, on this machine (nodes.py): `b`, the
second, has a folder, files, environment and processes of its own, `a` is what all others are
compared with. Either the run ends with exit 0 and leaves, to the bit, what two undisturbed nodes
leave; or both nodes end with an error, of which a line says what is wrong. Then, unless the run
folder is as it was before, the same command is started again on sound nodes: it goes on to that
same result, or is refused in a line of its own.
All faults make the page docs/results/node-faults.md. --restarts: beside them so many runs of two
ranks under `torchrun --max-restarts`, of which a random one is killed at a random moment. --seen: a
file that keeps what each came to; what stands there already is not run again.
"""

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from faults import ROOT, differing, outcome
from nodes import LATE, Act, Ended, Node, Nodes, free_port, start_nodes
from safetensors.torch import load_file, save_file

from ldalign.data import embedded
from ldalign.models.toy import write_toy_model

PAGE = ROOT / "docs/results/node-faults.md"
COMMAND = ".venv/bin/python tests/support/node_faults.py --restarts 20"
KILL, STOP, GO, TERM, INT = (
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGCONT,
    signal.SIGTERM,
    signal.SIGINT,
)
# The toy run with all its stages, on as little as shows everything; a checkpoint after every step.
SETTINGS: dict[str, Any] = {
    "run": "run",
    "policy": "policy",
    "data": "data.jsonl",
    "cache": "cache",
    "iterations": 1,
    "timeout_minutes": 0.25,
    "report": "table",
    "max_rows": 12,
    "global_batch": 5,
    "max_new_tokens": 6,
    "heldout_fraction": 0.2,
    "sft": {"epochs": 1, "rows": 10, "learning_rate": 3.0e-3, "global_batch": 5},
    "continual_sft": {"epochs": 0},
    "evaluation": {"rows": 2, "samples": 1},
    "validation": {"rows": 2},
    "training": {"epochs": 1, "optimizer": "adamw", "micro_tokens": 100},
    "checkpoint": {"steps": 1},
}
GUIDE = {"global_batch": 4, "vocabulary": 300, "heldout_fraction": 0.2}
MENDED = (
    "It had found five that ended with exit 0 and another result, which are refused since: another "
    "token in the training, the held-out and the validation rows (only their texts were compared), "
    "plain PyTorch instead of the C++ kernels, and two threads instead of one (both by rounding)."
)
TRAINED = "iteration_0/policy: step 1/"  # a line of a run, in the middle of the alignment stage
LINE = r"^\S+: (?:step \d+/|done)"  # how a line of progress begins
CHECKPOINTED = "iteration_0/policy: step 2/"
SFT, RESPONSES, POLICY = "sft/policy", "iteration_0/responses", "iteration_0/policy"


@dataclass
class Scene:
    """What a fault finds: the two nodes as they would start, and what is to be done to them."""

    place: Path
    nodes: list[Node]
    acts: list[Act] = field(default_factory=list)

    @property
    def a(self) -> Path:
        return self.nodes[0].folder

    @property
    def b(self) -> Path:
        return self.nodes[1].folder

    @property
    def run(self) -> Path:
        return self.place / "shared/run"

    def change(self, number: int, **changes: Any) -> None:
        self.nodes[number] = replace(self.nodes[number], **changes)

    def tell(self, number: int, *keys: str) -> None:
        """Gives a node keys of its own."""
        self.change(number, arguments=[*self.nodes[number].arguments, *keys])

    def torchrun(self, number: int, *options: str) -> None:
        """Gives a node's torchrun options of its own."""
        self.change(number, torchrun=[*self.nodes[number].torchrun, *options])

    def spoil(self, number: int, **inside: Any) -> None:
        self.change(number, inside=inside)

    def variables(self, number: int, **environment: str) -> None:
        self.change(number, environment={**self.nodes[number].environment, **environment})


@dataclass(frozen=True)
class Fault:
    """What is done, and what is expected.

    says: what a line of the error must hold; None: the run is to end as if nothing had happened.
    keys: of both nodes. before: a line at which an earlier start of the same command was killed;
    "end": one that ended well; None: there was none. ranks: on each node. ends: what is said
    notwithstanding, the run ends well. may_miss: the run may be over before it strikes.
    """

    name: str
    change: Callable[[Scene], object]
    says: str | None = None
    keys: tuple[str, ...] = ()
    before: str | None = None
    restarts: int = 0
    ranks: tuple[int, int] = (1, 1)
    ends: bool = False
    may_miss: bool = False


# ------------------------------------------------------------------------------------- the changes


def flip(path: Path, place: int = -3) -> None:
    """Another value of one byte: of a digit where it is one."""
    content = bytearray(path.read_bytes())
    old = content[place]
    content[place] = ord(str((int(chr(old)) + 1) % 10)) if chr(old).isdigit() else old ^ 1
    path.write_bytes(bytes(content))


def flip_digit(path: Path, behind: str) -> None:
    """Another digit behind the first place where a text says `behind`."""
    found = re.search(behind.encode() + rb"(?=[0-9])", path.read_bytes())
    assert found is not None
    flip(path, found.end())


def in_tokens(path: Path) -> None:
    """Another token here and there, so that a row of the second rank's has one."""
    for place in range(148, path.stat().st_size, 4 * 40):
        flip(path, place)


def shown_otherwise(
    scene: Scene, name: str, change: Callable[[Path], None] = flip, node: int = 1
) -> None:
    """A node, alone, sees another content of a file of the run folder than what is there."""
    path = max(scene.run.glob(name))
    other = scene.place / f"other_{path.name}"
    shutil.copy(path, other)
    change(other)
    assert other.read_bytes() != path.read_bytes() and other.stat().st_size == path.stat().st_size
    scene.spoil(node, show=[str(path), str(other)])


def of_finished(
    name: str, change: Callable[[Path], None] = flip, node: int = 1, left: str = "*"
) -> Any:
    """A damaged view of a file of a finished run, of which the alignment is to be made again; of
    its stages beside it, those that `left` names are there.
    """

    def do(scene: Scene) -> None:
        gone = [*scene.run.glob("iteration_0/policy"), *scene.run.glob("iteration_0/evaluation")]
        gone += [path for path in scene.run.iterdir() if path.is_dir() and not path.match(left)]
        for path in gone:
            shutil.rmtree(path, ignore_errors=True)
        (scene.run / "selected.json").unlink()
        shown_otherwise(scene, name, change, node)

    return do


def of_checkpoint(file: str, change: Callable[[Path], None] = flip) -> Any:
    """A damaged view of a file of the only checkpoint."""

    def do(scene: Scene) -> None:
        kept = scene.run / f"{POLICY}.partial/checkpoint"
        *older, _ = sorted(kept.glob("step_*[0-9]"))
        for path in older:
            shutil.rmtree(path)
        shown_otherwise(scene, f"{POLICY}.partial/checkpoint/step_*[0-9]/{file}", change)

    return do


def edit(name: str, *edits: tuple[str, str], node: int = 1) -> Any:
    """Changes text in a file of a node's own folder."""

    def do(scene: Scene) -> None:
        path = scene.nodes[node].folder / name
        text = path.read_text()
        for old, new in edits:
            assert old in text, old
            text = text.replace(old, new, 1)
        path.write_text(text)

    return do


def another_model(scene: Scene) -> None:
    shutil.rmtree(scene.b / "policy")
    write_toy_model(scene.b / "policy", seed=1)


def one_weight(scene: Scene, folder: str = "policy") -> None:
    path = scene.b / folder / "model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 0.0625
    save_file(weights, path, {"format": "pt"})


def in_data(change: Callable[[list[str]], list[str]]) -> Any:
    def do(scene: Scene) -> None:
        path = scene.b / "data.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return do


def change_places(scene: Scene) -> None:
    """The node that was the second becomes the first, with data of its own."""
    in_data(lambda lines: [*lines, lines[0]])(scene)
    scene.nodes.reverse()


def gone(name: str, node: int = 1) -> Any:
    def do(scene: Scene) -> None:
        path = scene.nodes[node].folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    return do


def own_run_folder(scene: Scene, stale: bool = False) -> None:
    (scene.b / "run").unlink()
    (scene.b / "run").mkdir()
    if stale:
        (scene.b / "run/lock").write_text("host elsewhere pid 1\n0123456789abcdef\n")


def says(node: int, *keys: str) -> Any:
    return lambda scene: scene.tell(node, *keys)


def inside(node: int, **how: Any) -> Any:
    return lambda scene: scene.spoil(node, **how)


def two_dtypes(scene: Scene) -> None:
    scene.spoil(0, dtype="float32")
    scene.spoil(1, dtype="bfloat16")


def files(node: int, mode: str, at: int) -> Any:
    def do(scene: Scene) -> None:
        # a file is opened by the node's own name of the folder, and synced without a name
        own = scene.nodes[node].folder / "run"
        scene.spoil(node, mode=mode, at=at, under=str(scene.run if mode == "unsynced" else own))

    return do


def variables(node: int, **environment: str) -> Any:
    return lambda scene: scene.variables(node, **environment)


def acts(*what: Act) -> Any:
    return lambda scene: scene.acts.extend(what)


def option(node: int, *options: str) -> Any:
    return lambda scene: scene.torchrun(node, *options)


def late(scene: Scene, seconds: float) -> None:
    scene.change(1, late=seconds)


def alone(scene: Scene) -> None:
    scene.nodes.pop()
    scene.torchrun(0, "--rdzv-conf", "join_timeout=3")


def numbered(*numbers: int) -> Any:
    """torchrun's static way to meet: each node is told its number, and the first one's port."""

    def do(scene: Scene) -> None:
        port = str(free_port())
        for number, rank in enumerate(numbers):
            where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "static"]
            where += ["--node-rank", str(rank), "--master-addr", "localhost"]
            scene.change(number, torchrun=[*where, "--master-port", port])
        del scene.nodes[len(numbers) :]

    return do


def twice(scene: Scene) -> None:
    """The same command a second time, on the same run folder, by nodes that meet elsewhere."""
    more = torchrun_options(free_port())
    for node in scene.nodes[:2]:
        scene.nodes.append(replace(node, torchrun=more, late=1.0))


ENDED = "ended, or is out of reach"
# torchrun waits for the nodes that it was told of, for minutes of its own, before a rank begins.
WAITS = "no rank began"
GIVE_SAME = "give every host the same files"
SAME_COMMAND = "start the same command, with the same config file, on every host"
OWN_GUIDE = ("guide=guide",)
FAULTS = [
    # ---- settings
    Fault("another learning rate", says(1, "learning_rate=1e-4"), "has learning_rate 0.0001"),
    Fault("another seed", says(1, "seed=7"), "has seed 7, rank 0"),
    Fault("another beta", says(1, "beta=0.5"), "has beta 0.5"),
    Fault("another method", says(1, "method=spin"), "has method spin"),
    Fault("another dtype", says(1, "dtype=bfloat16"), "has dtype bfloat16"),
    Fault("fewer rows", says(1, "max_rows=10"), "has max_rows 10"),
    Fault("another distance", says(1, "distance=cosine"), "has distance"),
    Fault(
        "another config file at the same path",
        edit("config.yaml", ("optimizer: adamw", "optimizer: rmsprop")),
        "has training.optimizer rmsprop",
    ),
    Fault(
        "a config file with a key that is none", edit("config.yaml", ("beta:", "betta:")), "betta"
    ),
    Fault("no config file", gone("config.yaml"), "config.yaml"),
    # ---- the policy's, the guide's, the data's files
    Fault("another model at the same path", another_model, "has the policy policy"),
    Fault("one weight of the policy is another", one_weight, "has the policy policy"),
    Fault(
        "another tokenizer",
        edit("policy/tokenizer.json", ('"er": 259', '"er": 260'), ('t": 260', 't": 259')),
        "has the policy policy",
    ),
    Fault(
        "another chat template in the policy's folder",
        edit("policy/chat_template.jinja", ("assistant", "Assistant")),
        "has the policy policy",
    ),
    Fault(
        "another chat template by the key `template`",
        edit("template.jinja", ("assistant", "Assistant")),
        "has template",
        ("template=template.jinja",),
    ),
    Fault(
        "another end token",
        edit("policy/generation_config.json", ("2", "0")),
        "has the policy policy",
    ),
    Fault(
        "another rope_theta",
        edit("policy/config.json", ("10000.0", "20000.0")),
        "has the policy policy",
    ),
    Fault("no policy", gone("policy"), "policy"),
    Fault(
        "no policy in the node's own cache", lambda scene: None, r"rank 1: .*toy-2", ("policy=toy",)
    ),
    Fault(
        "another guide",
        partial(one_weight, folder="guide/decoder"),
        "has the guide guide",
        OWN_GUIDE,
    ),
    Fault("no guide", gone("guide"), "guide", OWN_GUIDE),
    Fault(
        "one row more in the data (which rank 0 alone reads)",
        in_data(lambda rows: [*rows, rows[0]]),
    ),
    Fault("rows in another order (as above)", in_data(lambda rows: rows[::-1])),
    Fault("no data (as above)", gone("data.jsonl")),
    Fault(
        "the nodes change places before a restart, and their data differ",
        change_places,
        "changed since this run began",
        before=TRAINED,
    ),
    # ---- the run folder
    Fault("a run folder of its own", own_run_folder, "is not the run folder of rank 0"),
    Fault(
        "an old copy of the run folder's lock",
        partial(own_run_folder, stale=True),
        "is not the run folder of rank 0",
    ),
    Fault("no run folder", gone("run"), "is not the run folder of rank 0"),
    Fault("a run folder that cannot be written", files(1, "full", 0), "cannot be written"),
    Fault("the same command a second time, on two more nodes", twice, "in use by", ends=True),
    # ---- one node sees other bytes of a stage than what is there
    *(
        Fault(f"sees {what}", change, said, before="end")
        for what, change, said in (
            (
                "another digit in the rows",
                of_finished("data/train.jsonl", partial(flip_digit, behind='"content": "[^0-9"]*')),
                "has training rows",
            ),
            (
                "another token in the rows, before the SFT",
                of_finished("data/train.tokens.npy", in_tokens, left="data"),
                "has training tokens",
            ),
            (
                "another token in the rows, before the alignment",
                of_finished("data/train.tokens.npy", in_tokens),
                "has training tokens",
            ),
            (
                "another token in the held-out rows",
                of_finished("data/heldout.tokens.npy", in_tokens, left="data"),
                "has held-out tokens",
            ),
            (
                "another token in the validation rows",
                of_finished("data/validation.tokens.npy", in_tokens, left="data"),
                "has validation tokens",
            ),
            (
                "another weight of the SFT policy",
                of_finished(f"{SFT}/model.safetensors"),
                "has policy",
            ),
            (
                "another token in the responses",
                of_finished(
                    f"{RESPONSES}/responses.jsonl", partial(flip_digit, behind='"token_ids": [[]')
                ),
                "has pairs",
            ),
            (
                "another weight of the guide",
                of_finished("guide/decoder/model.safetensors"),
                "has guide",
            ),
            (
                "another distance's weight",
                of_finished(
                    "iteration_0/distances/distances.jsonl",
                    partial(flip_digit, behind='"weight": [0-9].'),
                ),
                "has weights",
            ),
            (
                "another reference log-prob",
                of_finished("iteration_0/reference/reference.safetensors"),
                "has reference",
            ),
        )
    ),
    Fault(
        "rank 0 sees another reference log-prob",
        of_finished("iteration_0/reference/reference.safetensors", node=0),
        "damaged",
        before="end",
    ),
    Fault(
        "sees another weight in its part of the checkpoint",
        of_checkpoint("rank_00001.safetensors"),
        "no checkpoint can be used.*damaged",
        before=CHECKPOINTED,
    ),
    Fault(
        "sees another weight in the other part, which it does not read",
        of_checkpoint("rank_00000.safetensors"),
        before=CHECKPOINTED,
    ),
    Fault(
        "sees another step in the checkpoint's manifest",
        of_checkpoint("manifest.json", partial(flip_digit, behind='"step": ')),
        "no checkpoint can be used",
        before=CHECKPOINTED,
    ),
    # ---- versions, machine, environment
    Fault("another version of ldalign", inside(1, ldalign="0.0.1"), "has ldalign 0.0.1"),
    Fault("another version of torch", inside(1, torch="2.11.0"), "has torch 2.11.0"),
    Fault(
        "another kind of CPU, by dtype=auto",
        two_dtypes,
        "has dtype",
        ("dtype=auto",),
    ),
    Fault(
        "plain PyTorch instead of the C++ kernels",
        variables(1, LDALIGN_BACKEND="eager"),
        "has kernels eager",
    ),
    Fault("a backend that is none", variables(1, LDALIGN_BACKEND="fast"), "LDALIGN_BACKEND"),
    Fault("two threads instead of one", variables(1, OMP_NUM_THREADS="2"), "has threads 2"),
    Fault("another HOME", variables(1, HOME="/nowhere")),
    Fault(
        "another locale, time zone and order of sets",
        variables(1, LC_ALL="C", TZ="Pacific/Auckland", PYTHONHASHSEED="7"),
    ),
    Fault("the clock a day behind", inside(1, clock=-86_400)),
    Fault("the clock a day ahead", inside(1, clock=86_400)),
    # ---- processes
    Fault(
        "SIGKILL to its rank, before the ranks have met",
        acts(Act("", 1, KILL)),
        "did not all join within .* start those of every host together|is out of reach",
    ),
    *(
        Fault(f"SIGKILL to its rank, {when}", acts(Act(line, 1, KILL)), f"rank 1 {ENDED}|SIGKILL")
        for when, line in {
            "in the SFT": f"{SFT}: step 1/",
            "as the responses are made": f"{SFT}: done",
            "in the guide's training": "guide: step 1/",
            "as the reference is made": "iteration_0/distances: done",
            "in the alignment": TRAINED,
            "as the policy is evaluated": f"{POLICY}: done",
        }.items()
    ),
    Fault("SIGKILL to rank 0 in the alignment", acts(Act(TRAINED, 0, KILL)), f"rank 0 {ENDED}"),
    Fault(
        "SIGTERM to its rank in the alignment", acts(Act(TRAINED, 1, TERM)), "stopped by SIGTERM"
    ),
    Fault(
        "SIGTERM to its torchrun in the alignment",
        acts(Act(TRAINED, 1, TERM, "torchrun")),
        "stopped by SIGTERM",
    ),
    Fault(
        "Ctrl-C to the first torchrun, as the responses are made",
        acts(Act(f"{SFT}: done", 0, INT, "torchrun")),
        "SIG|interrupted|out of reach",
    ),
    Fault(
        "SIGKILL to its torchrun in the SFT; its rank lives on",
        acts(Act(f"{SFT}: step 1/", 1, KILL, "torchrun")),
        f"{ENDED}|stopped by SIGTERM",
        may_miss=True,
    ),
    Fault(
        "SIGKILL to the first torchrun, which holds the store, in the SFT",
        acts(Act(f"{SFT}: step 1/", 0, KILL, "torchrun")),
        f"{ENDED}|stopped by SIGTERM",
        may_miss=True,
    ),
    Fault(
        "its rank is stopped for 2 s in the alignment",
        acts(Act(TRAINED, 1, STOP), Act(TRAINED, 1, GO, after=2.0)),
    ),
    Fault(
        "its rank is stopped for longer than timeout_minutes",
        acts(Act(TRAINED, 1, STOP), Act(TRAINED, 1, GO, after=18.0)),
        ENDED,
    ),
    Fault(
        "its torchrun is stopped for 3 s",
        acts(
            Act(f"{SFT}: step 1/", 1, STOP, "torchrun"),
            Act(f"{SFT}: step 1/", 1, GO, "torchrun", 3.0),
        ),
    ),
    Fault("its connections are cut in the alignment", acts(Act(TRAINED, 1, to="cut")), ENDED),
    Fault(
        "rank 0's connections are cut as the reference is made",
        acts(Act("iteration_0/distances: done", 0, to="cut")),
        ENDED,
    ),
    Fault("SIGKILL to its rank, with --max-restarts", acts(Act(TRAINED, 1, KILL)), restarts=2),
    Fault(
        "SIGKILL to rank 0, with --max-restarts", acts(Act("guide: step 1/", 0, KILL)), restarts=2
    ),
    Fault(
        "both ranks are killed, one a stage after the other, with --max-restarts",
        acts(Act(f"{SFT}: step 1/", 1, KILL), Act(TRAINED, 0, KILL)),
        restarts=3,
    ),
    # ---- its disk
    Fault("its disk is full in the middle", files(1, "full", 9), "cannot be written"),
    Fault("one write fails", files(1, "broken", 5), "cannot be written"),
    Fault("no fsync succeeds", files(1, "unsynced", 0), "cannot be written"),
    Fault("rank 0's disk is full in the middle", files(0, "full", 90), "cannot be written"),
    Fault("no fsync of rank 0's succeeds", files(0, "unsynced", 12), "cannot be written"),
    # ---- how they meet
    Fault("it joins 3 s late", partial(late, seconds=3.0)),
    Fault("it never joins", alone, "Rendezvous"),
    Fault("it never joins, by torchrun's static way", numbered(0), WAITS),
    Fault(
        "it waits for another run's name",
        option(1, "--rdzv-id", "other", "--rdzv-conf", "join_timeout=3"),
        "Rendezvous",
    ),
    Fault("it says three nodes", option(1, "--nnodes", "3"), WAITS),
    Fault("it starts two ranks", option(1, "--nproc-per-node", "2"), ranks=(1, 2)),
    Fault("the nodes are numbered the other way round", numbered(1, 0)),
    Fault("both nodes are told that they are the second", numbered(1, 1), WAITS),
    Fault("both nodes are told that they are the first", numbered(0, 0), WAITS),
]


# ------------------------------------------------------------------------------------ a run of it


def torchrun_options(port: int, ranks: int = 1, nodes: int = 2, restarts: int = 0) -> list[str]:
    options = ["--nnodes", str(nodes), "--nproc-per-node", str(ranks)]
    options += ["--max-restarts", str(restarts), "--rdzv-id", "run", "--rdzv-backend", "c10d"]
    return [*options, "--rdzv-endpoint", f"localhost:{port}", "--local-addr", "localhost"]


@dataclass
class Seen:
    """What a fault came to, in words: of the run that it struck, and of the next, undisturbed one.

    good: whether both are as they have to be.
    """

    name: str
    codes: list[int]
    ranks: list[list[int]]
    said: str
    verdict: str
    again: str
    good: bool


class Proof:
    """Undisturbed runs to compare with, and trials. folder: for all that is made."""

    def __init__(self, driver: Nodes, folder: Path) -> None:
        self.driver, self.folder, self.count = driver, folder, 0
        self.sound = folder / "sound"  # a node's own files, as they should be
        write_toy_model(self.sound / "policy")
        shutil.copy(self.sound / "policy/chat_template.jinja", self.sound / "template.jinja")
        rows = embedded.make_rows(0, "train", 24)
        lines = (json.dumps({key: row[key] for key in ("id", "messages")}) for row in rows)
        (self.sound / "data.jsonl").write_text("".join(f"{line}\n" for line in lines))
        settings = yaml.safe_load((ROOT / "configs/toy.yaml").read_text(encoding="utf-8"))
        settings |= {**SETTINGS, "guide": settings["guide"] | GUIDE}
        (self.sound / "config.yaml").write_text(yaml.safe_dump(settings))
        self.lines: list[str] = []  # how those of an undisturbed run begin
        self.references: dict[tuple[tuple[str, ...], int], Path] = {}
        shutil.copytree(self.reference((), 2) / "guide", self.sound / "guide")

    def scene(self, keys: Sequence[str], ranks: Sequence[int] = (1, 1), restarts: int = 0) -> Scene:
        """Two sound nodes, and a run folder that holds nothing."""
        self.count += 1
        place, port = self.folder / f"trial_{self.count}", free_port()
        (place / "shared/run").mkdir(parents=True)
        nodes = []
        for name, own in zip("ab", ranks, strict=False):
            folder = place / name
            shutil.copytree(self.sound, folder)
            (folder / "run").symlink_to(place / "shared/run")
            options = torchrun_options(port, own, len(ranks), restarts)
            nodes.append(Node(folder, options, ["--config", "config.yaml", *keys]))
        return Scene(place, nodes)

    def reference(self, keys: tuple[str, ...], ranks: int) -> Path:
        """The run folder of an undisturbed run, which stays as it is: two nodes of a rank each, or
        as many ranks on one.
        """
        if (keys, ranks) not in self.references:
            scene = self.scene(keys, (1, 1) if ranks == 2 else (ranks,))
            ended = self.driver.run(scene.nodes)
            assert not any(ended.codes), "\n".join(ended.said)
            self.lines = self.lines or re.findall(LINE, ended.said[0], re.MULTILINE)
            self.references[keys, ranks] = scene.run
        return self.references[keys, ranks]

    def try_out(self, fault: Fault) -> Seen:
        """Strikes a run with a fault, and starts the same command again without it."""
        scene = self.scene(fault.keys, fault.ranks, fault.restarts)
        if fault.before == "end":
            shutil.copytree(self.reference(fault.keys, 2), scene.run, dirs_exist_ok=True)
        elif fault.before is not None:
            self.driver.run(scene.nodes, [Act(fault.before, n, KILL) for n in (0, 1)])

        def expected() -> dict[str, Any]:
            return outcome(self.reference(fault.keys, sum(fault.ranks)))

        fault.change(scene)
        before = contents(scene.run)
        ended = self.driver.run(scene.nodes, scene.acts)
        lines = error_lines(ended)
        verdict = judged(ended, lines, scene.run, expected)
        again, then = "-", []
        if verdict != "equal":
            again = "nothing was made"
            if contents(scene.run) != before:
                again, then = self.again(fault, scene.run, expected)
        struck = [line for line in lines if fault.says and re.search(fault.says, line)]
        said = (struck or lines or [""])[0]
        refused = bool(struck) and not fault.ends
        good = verdict == ("refused" if refused else "equal")
        good = good and bool(struck) == (
            fault.says is not None and not (fault.may_miss and not lines)
        )
        if fault.says == WAITS:
            good = verdict == WAITS
        good = good and again in ("equal", "refused", "nothing was made", "-")
        if again == "refused":
            again = f"refused: {then[0]}"
        if not good:
            print("\n".join([f"---- {fault.name}", *ended.said, *then]), file=sys.stderr)
        shutil.rmtree(scene.place)
        return Seen(fault.name, ended.codes, ended.ranks, short(said), verdict, short(again), good)

    def again(self, fault: Fault, run: Path, expected: dict[str, Any]) -> tuple[str, Sequence[str]]:
        """The same command on the same run folder, by sound nodes: what it came to, and said."""
        scene = self.scene(fault.keys, fault.ranks)
        for node in scene.nodes:
            (node.folder / "run").unlink()
            (node.folder / "run").symlink_to(run)
        ended = self.driver.run(scene.nodes)
        lines = error_lines(ended)
        shutil.rmtree(scene.place)
        return judged(ended, lines, run, expected), lines


def contents(run: Path) -> dict[Path, bytes]:
    """The files of a run's stages, as they are."""
    return {path: path.read_bytes() for path in run.glob("*/**/*") if path.is_file()}


def judged(
    ended: Ended, lines: Sequence[str], run: Path, expected: Callable[[], dict[str, Any]]
) -> str:
    """What a run came to: equal, refused, or what may not be."""
    ranks = [code for node in ended.ranks for code in node]
    # Where the other torchrun was killed, torch has the one that is left wait 300 s for it.
    done = bool(ranks) and not any(ranks)
    if LATE in ended.codes and not done:
        return "HANGS" if ranks else WAITS
    if 0 in ended.codes or done:  # whoever started that node takes the run for done
        wrong = differing(outcome(run), expected())
        return f"WRONG: exit 0, and another {', '.join(wrong[:3])}" if wrong else "equal"
    return "refused" if lines else "SAYS NOTHING"


def error_lines(ended: Ended) -> list[str]:
    """What ldalign said of an error, each line once; where it did not come so far, torchrun."""
    said = "\n".join(ended.said)
    ours = re.findall(r"^ldalign: error: (.*)$", said, re.MULTILINE)
    lines = ours or re.findall(
        r"^(?:torch\.\S*\.)?(\w+(?:Error|Exception)(?:: .*)?)$", said, re.MULTILINE
    )
    return list(dict.fromkeys(lines))


# ---------------------------------------------------------------------------------- real restarts


def restarts(proof: Proof, count: int, begin: int = 0) -> Iterator[str]:
    """Runs by `torchrun --nproc-per-node 2 --max-restarts 3`, of which a random rank is killed at a
    random moment: up to a second after a random line of those that an undisturbed run says. What
    each came to, "equal" where it should be. begin: so many have been.
    """
    expected = outcome(proof.reference((), 2))
    for number in range(begin, count):
        draw, struck = random.Random(number), False
        while not struck:  # it may have ended before
            line, after, rank = draw.choice(proof.lines), draw.uniform(0, 1), draw.randrange(2)
            scene = proof.scene((), (2,), 3)
            act = Act(line, 0, KILL, after=after, rank=rank)
            ended = proof.driver.run(scene.nodes, [act])
            struck = -KILL in ended.ranks[0]
            came = judged(ended, error_lines(ended), scene.run, lambda: expected)
            shutil.rmtree(scene.place)
        if came != "equal":
            print(*ended.said, file=sys.stderr)
        print(f"restart {number + 1}: {after:.2f} s after `{line}`: {came}", flush=True)
        yield came


# ------------------------------------------------------------------------------------------ page


def page(seen: Mapping[str, Seen], restarted: Sequence[str]) -> str:
    """The page; of faults without a result it says so."""
    harmless = sum(one.verdict == "equal" for one in seen.values())
    waited = sum(one.verdict == WAITS for one in seen.values())
    good = sum(one.good for one in seen.values())
    wrong = sum("WRONG" in one.verdict + one.again for one in seen.values())
    lines = [
        "# Faults on two nodes",
        "",
        f"    {COMMAND}",
        "",
        f"{len(seen)} faults, each on a small run of all stages by two torchruns on one machine, "
        "with files, environment and processes of their own (the ranks are forked from a process "
        "that has everything imported); they strike the second node where nothing else is said. "
        f"{harmless} ended with exit 0 and, to the bit, the files of two undisturbed "
        f"nodes; of {waited} torchrun began no rank; the others ended on both nodes with an error. "
        "Then the same command was started "
        "again, without the fault, where the run folder had changed. As expected: "
        f"**{good} of {len(seen)}**; with exit 0 and another result: "
        f"**{wrong}**.",
        "",
        "Exit codes: of the torchruns (1 for any rank's error, negative: a signal, 999: it waited "
        "for another, for minutes by torch's settings, and was ended), then of the ranks of "
        "each in the order in which they ended. Started again: `equal`, the undisturbed files; "
        "`nothing was made`, the run folder was as before. Hashes are cut to 8 digits.",
        "",
        "| fault | what was said | torchruns | ranks | came to | started again |",
        "|---|---|---|---|---|---|",
    ]
    for fault in FAULTS:
        cells = [fault.name, "no result yet", "", "", "", ""]
        if one := seen.get(fault.name):
            ranks = "; ".join(" ".join(map(str, codes)) or "-" for codes in one.ranks)
            codes = " ".join(map(str, one.codes))
            cells = [one.name, one.said, codes, ranks, one.verdict, one.again]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    lines += ["", MENDED]
    if restarted:
        equal = sum(came == "equal" for came in restarted)
        lines += [
            "",
            "## Restarts",
            "",
            "Runs of two ranks by `torchrun --nproc-per-node 2 --max-restarts 3`, a random rank of "
            "which is killed (SIGKILL) at a random moment, from its start to its last stage: "
            f"**{equal} of {len(restarted)}** ended with exit 0 and, to the bit, the files of an "
            "undisturbed run.",
        ]
    return "\n".join(lines) + "\n"


def short(line: str) -> str:
    """A line of an error for the page: no folder or number that is another each time."""
    line = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{56}\b", r"\1", line)
    line = re.sub(r"/\S*?/(?:trial_\d+/)(?:shared/)?", "", line)
    line = re.sub(r"host \S+ pid \d+", "host HOST pid N", line)
    line = re.sub(r"(rank \d+) on \S+", r"\1 on HOST", line)
    line = re.sub(r" on \S+ this is", " on HOST this is", line)
    line = re.sub(r"\b\d{4,5}\b(?=[\]:])", "N", line)
    line = line.replace("<", "&lt;")
    return line if len(line) <= 300 else f"{line[:297]}..."


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", help="beginnings of the names of faults; no page")
    parser.add_argument("--restarts", type=int, default=0)
    parser.add_argument("--seen", type=Path, help="JSON Lines")
    chosen = parser.parse_args()
    faults = [f for f in FAULTS if not chosen.only or f.name.startswith(tuple(chosen.only))]
    with tempfile.TemporaryDirectory() as folder:
        path = chosen.seen or Path(folder) / "seen.jsonl"
        seen, restarted = read_seen(path)
        driver = start_nodes(Path(folder))
        proof = Proof(driver, Path(folder))
        with path.open("a", encoding="utf-8", buffering=1) as file:
            for fault in faults:
                if fault.name in read_seen(path)[0]:  # another process may work beside this one
                    continue
                began = time.monotonic()
                try:
                    one = proof.try_out(fault)
                except Exception as error:  # in what is done here: the others need not wait
                    print(f"FAILED: {fault.name}: {error!r}", flush=True)
                    continue
                file.write(json.dumps(vars(one)) + "\n")
                mark = "ok" if one.good else "NOT AS EXPECTED"
                took = time.monotonic() - began
                print(f"{mark}: {fault.name} ({took:.0f} s): {one.verdict}, then {one.again}")
                print(f"    {one.codes} {one.ranks} {one.said}", flush=True)
            if len(restarted) < chosen.restarts:
                for came in restarts(proof, chosen.restarts, len(restarted)):
                    file.write(json.dumps({"restart": came}) + "\n")
        driver.close()
        seen, restarted = read_seen(path)
    if not chosen.only:
        PAGE.write_text(page(seen, restarted), encoding="utf-8")
    good = all(one.good for one in seen.values()) and all(came == "equal" for came in restarted)
    return int(not good)


def read_seen(path: Path) -> tuple[dict[str, Seen], list[str]]:
    """What faults came to, by name, and restarts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    faults = {record["name"]: Seen(**record) for record in records if "name" in record}
    return faults, [record["restart"] for record in records if "restart" in record]


if __name__ == "__main__":
    sys.exit(main())
