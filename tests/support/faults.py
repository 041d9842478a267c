"""Runs that are killed, stopped or denied a write; is the result the same all the same?

`Driver` is a process that has imported everything and forks once a trial, so that a trial takes a
second, not ten. Its file layer is failing_files.c. Run as a script this file is that process.
"""

import ctypes
import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldalign.system import exits

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT_S, LATE = 60, 999
MODES = {"count": 0, "kill": 1, "torn": 2, "full": 3, "broken": 4, "stop": 5, "unsynced": 6}
# The toy run with all its stages and two iterations, on as little as shows everything: a checkpoint
# after every step.
SMALL = (
    "--config",
    str(ROOT / "configs/toy.yaml"),
    "max_rows=12",
    "sft.rows=12",
    "sft.epochs=2",
    "sft.global_batch=5",
    "continual_sft.epochs=0",
    "global_batch=5",
    "max_new_tokens=6",
    "evaluation.rows=2",
    "evaluation.samples=1",
    "guide.global_batch=4",
    "guide.vocabulary=300",
    "guide.heldout_fraction=0.2",
    "checkpoint.steps=1",
)
# What differs between two runs by nature: times, and memory.
TIMES = {"seconds", "eval_seconds", "time/step", "tokens_per_second", "memory/peak_gib"}
# of each start, or of the day
EACH_START = {"config.yaml", "environment.json", "lock", "started.json"}


@dataclass
class Trial:
    """How one forked run ended: exit code (negative: a signal) and write points by rank, words."""

    codes: list[int]
    points: list[int]
    said: str


@dataclass
class Driver:
    """The process that forks, and how to talk to it."""

    process: subprocess.Popen[str]
    folder: Path
    trials: int = field(default=0)

    def run(self, run: Path, *arguments: str, ranks: int = 1, **fault: Any) -> Trial:
        """Makes one small run of align.py on `run`.

        fault: at and mode (of the file layer, on `rank`), or signal, or clock.

        signal: is sent to every rank (or to `rank` alone) right when `on_line` was said, or `after`
        seconds later. clock: seconds by which the time of day is wrong. unread: what is said goes
        into a pipe that nobody reads. list: a file in which the file layer writes what it sees.
        """
        return self.call(
            "ldalign.train.align", run, *SMALL, f"run={run}", *arguments, ranks=ranks, **fault
        )

    def call(
        self, module: str, folder: Path, *arguments: str, ranks: int = 1, **fault: Any
    ) -> Trial:
        """`main(arguments)` of a module, forked once a rank, as a command."""
        self.trials += 1
        said = self.folder / f"said_{self.trials}.txt"
        order = {
            "module": module,
            "argv": arguments,
            "under": str(folder),
            "ranks": ranks,
            "said": str(said),
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps({**order, **fault}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return Trial(
            answer["codes"], answer["points"], said.read_text(encoding="utf-8", errors="replace")
        )


def build_failing_files(folder: Path) -> Path:
    """Compiles failing_files.c into `folder`.

    Raises CalledProcessError, or FileNotFoundError without a compiler.
    """
    library = folder / "failing_files.so"
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-o",
        str(library),
        str(HERE / "failing_files.c"),
        "-ldl",
    ]
    subprocess.run(command, check=True, capture_output=True)
    return library


def start_driver(folder: Path) -> Driver:
    """A driver whose trials leave what they say in `folder`."""
    library = build_failing_files(folder)
    variables = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    variables["PYTHONPATH"] = str(HERE)
    process = subprocess.Popen(
        [sys.executable, __file__, str(library)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    return Driver(process, folder)


def outcome(run: Path) -> dict[str, Any]:
    """Returns all that a run leaves, by file: equal to the bit for undisturbed and other runs."""
    left: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if path.is_dir() or path.name in EACH_START or name.parts[0] == "report":
            continue
        if path.name in ("metrics.jsonl", "summary.json", "manifest.json"):
            text = path.read_text(encoding="utf-8")
            records = [
                json.loads(part)
                for part in (text.splitlines() if path.suffix == ".jsonl" else [text])
            ]
            left[str(name)] = [_timeless(record) for record in records]
        elif path.name == "README.md":  # a model card names the commit, which may move meanwhile
            left[str(name)] = re.sub(rb"commit `[^`]*`", b"", path.read_bytes())
        else:
            left[str(name)] = path.read_bytes()
    return left


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    files = record.get("files", {})
    for name in ("metrics.jsonl", "summary.json"):
        files.pop(name, None)  # they hold times
    return {key: value for key, value in record.items() if key not in TIMES}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The files by which two outcomes differ."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def forget_peak() -> int:
    """Sets the peak of this process's memory back to what it has now, and returns that, in bytes.

    What was freed goes back to the system first, or whatever reuses it would cost nothing.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The most memory that this process had since `forget_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


# -------------------------------------------------------------------------------- the driver's side


def _serve(library: Path) -> None:
    from ldalign.system import errors
    from ldalign.train import align  # noqa: F401 (imported once, for all trials)

    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves are under nohup
    layer = ctypes.CDLL(str(library))
    for line in sys.stdin:
        order = json.loads(line)
        children: list[int] = []
        pipes: list[int] = []
        port = _free_port()
        # rank 0 last, so that it knows the others' numbers
        for rank in reversed(range(order["ranks"])):
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                os.close(reader)
                _trial(order, rank, port, layer, writer, errors, children)
            os.close(writer)
            children.insert(0, child)
            pipes.insert(0, reader)
        if "after" in order:
            _send_after(order, children)
        codes = _wait(children)
        points = [int(os.read(pipe, 20) or 0) for pipe in pipes]
        for pipe in pipes:
            os.close(pipe)
        print(json.dumps({"codes": codes, "points": points}), flush=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _trial(
    order: dict[str, Any],
    rank: int,
    port: int,
    layer: Any,
    writer: int,
    errors: Any,
    others: list[int],
) -> None:
    said = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if order.get("unread"):
        reader, said = os.pipe()
        os.close(reader)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    if order["ranks"] > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(order["ranks"]),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    if rank == 0 and "signal" in order and "after" not in order:
        sys.stderr = _Watched(order, [os.getpid(), *others])  # type: ignore[assignment]
    leave = exits.leave

    def tell(code: int) -> None:
        os.write(writer, str(layer.failing_files_count()).encode())
        leave(code)

    exits.leave = tell
    layer.failing_files_set_clock(ctypes.c_long(order.get("clock", 0)))
    sys.argv = [order["module"], *order["argv"]]
    if rank == order.get("rank", 0):
        at, mode = order.get("at", -1), MODES[order.get("mode", "count")]
        layer.failing_files_arm(order["under"].encode(), ctypes.c_long(at), mode)
        if "list" in order:
            layer.failing_files_list(order["list"].encode())
    exits.run(importlib.import_module(order["module"]).main)


class _Watched:
    """Rank 0's stderr, which sends the signal right after a line was said, always the same."""

    def __init__(self, order: dict[str, Any], ranks: list[int]) -> None:
        self.stream, self.order, self.ranks = sys.stderr, order, ranks

    def write(self, text: str) -> int:
        written = self.stream.write(text)
        if self.order and self.order["on_line"] in text:
            self.stream.flush()
            order, self.order = self.order, {}
            for process in [self.ranks[order["rank"]]] if "rank" in order else reversed(self.ranks):
                os.kill(process, order["signal"])
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _send_after(order: dict[str, Any], children: list[int]) -> None:
    """Sends the signal some time after a line was said, to all ranks."""
    said, deadline = Path(order["said"]), time.monotonic() + 300
    while time.monotonic() < deadline and not (
        said.exists() and order["on_line"] in said.read_text(errors="replace")
    ):
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.002)
    time.sleep(order["after"])
    for child in children:
        # one that has ended is still there: nobody has waited for it
        os.kill(child, order["signal"])


def _wait(children: list[int]) -> list[int]:
    """Returns the exit codes, by rank.

    Ranks that outlive the first dead one by LIMIT_S are killed: their code is LATE.
    """
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(children):
        for child in (c for c in children if c not in codes):
            if _ended(child, codes):
                deadline = deadline or time.monotonic() + LIMIT_S
        if deadline and time.monotonic() > deadline:
            for child in (c for c in children if c not in codes):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = LATE
        time.sleep(0.005)
    return [codes[child] for child in children]


def _ended(child: int, codes: dict[int, int]) -> bool:
    found, status = os.waitpid(child, os.WNOHANG)
    if found:
        codes[child] = os.waitstatus_to_exitcode(status)
    return bool(found)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
