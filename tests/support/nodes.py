"""Two nodes on one machine: a torchrun each, with a view of its own of files and environment.

`Nodes` is a process that has imported everything. It forks a torchrun a node, and what these start
as ranks (forked_rank.py) has the ranks forked from it too, so that a run takes seconds, not half a
minute. torchrun itself, its rendezvous, its restarts and what it does to ranks are torch's own. The
file layer of a rank is failing_files.c. Run as a script this file is that process.
"""

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import HERE, MODES, build_failing_files

from ldalign.system import exits

# What outlives the first torchrun's end by so long is killed, and what lasts LONGEST_S in all.
LIMIT_S, LONGEST_S, LATE = 60, 400, 999
CUT = "cut"  # in a node's folder: once it is there, every TCP connection of its rank is cut
FAULT = "NODE_FAULT"  # in a rank's environment: what is wrong inside its process


@dataclass(frozen=True)
class Node:
    """One torchrun: its own arguments, those of align.py, where it runs, and in what environment.

    inside: what is wrong in the processes of its ranks (`_spoil`). late: seconds after which it is
    started.
    """

    folder: Path
    torchrun: Sequence[str]
    arguments: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    inside: Mapping[str, Any] = field(default_factory=dict)
    late: float = 0.0


@dataclass(frozen=True)
class Act:
    """Sends a signal to the rank or the torchrun of a node, or cuts the connections of its rank
    (to="cut"), once: `after` seconds after a line that holds `line` was said, by whichever node, or
    the trial began (""). rank: of that node, where not all of them are meant.
    """

    line: str
    node: int
    number: int = 0
    to: str = "rank"
    after: float = 0.0
    rank: int | None = None


@dataclass
class Ended:
    """How a trial ended, by node: torchrun's exit code, those of its ranks in the order in which
    they ended (negative: a signal), and what was said.
    """

    codes: list[int]
    ranks: list[list[int]]
    said: list[str]


@dataclass
class Nodes:
    """The process that forks, and how to talk to it."""

    process: subprocess.Popen[str]
    folder: Path
    trials: int = 0

    def run(self, nodes: Sequence[Node], acts: Sequence[Act] = ()) -> Ended:
        """Starts the nodes, and waits until nothing of them is left."""
        self.trials += 1
        said = [self.folder / f"said_{self.trials}_{n}.txt" for n in range(len(nodes))]
        order = {
            "nodes": [vars(node) | {"said": path} for node, path in zip(nodes, said, strict=True)],
            "acts": [vars(act) for act in acts],
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order, default=str) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in said]
        return Ended(answer["codes"], answer["ranks"], texts)

    def close(self) -> None:
        self.process.communicate()


def start_nodes(folder: Path) -> Nodes:
    """The process, whose trials leave what they say in `folder`."""
    library = build_failing_files(folder)
    variables = {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    variables |= {"PYTHONPATH": str(HERE), "PYTHONSAFEPATH": "1", "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, __file__, str(library), str(folder / "ranks")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
    )
    return Nodes(process, folder)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port: int = found.getsockname()[1]
        return port


# ------------------------------------------------------------------------------ that process's side


@dataclass
class _Rank:
    node: int
    process: int
    connection: socket.socket


class _Trial:
    """One trial under way, in the process that forks."""

    def __init__(self, order: dict[str, Any], layer: Any, listener: socket.socket, path: str):
        self.nodes, self.acts = order["nodes"], [*order["acts"]]
        self.layer, self.listener, self.path = layer, listener, path
        self.began = time.monotonic()
        self.agents: dict[int, int] = {}  # process: node
        self.codes = [LATE] * len(self.nodes)
        self.ranks: list[_Rank] = []
        self.rank_codes: list[list[int]] = [[] for _ in self.nodes]
        self.due: list[tuple[float, dict[str, Any]]] = []
        self.waits = selectors.DefaultSelector()
        self.waits.register(listener, selectors.EVENT_READ)

    def run(self) -> dict[str, Any]:
        waiting = sorted(range(len(self.nodes)), key=lambda n: self.nodes[n]["late"])
        deadline, late = self.began + LONGEST_S, set[int]()
        while waiting or self.agents or self.ranks:
            now = time.monotonic()
            while waiting and now - self.began >= self.nodes[waiting[0]]["late"]:
                self._start(waiting.pop(0))
            for key, _ in self.waits.select(0.004):
                self._hear(key.fileobj)
            self._act(now)
            if self._reap():
                deadline = min(deadline, time.monotonic() + LIMIT_S)
            if now > deadline:
                late.update(self.agents.values(), (rank.node for rank in self.ranks))
                waiting.clear()
                for process in [*self.agents, *(rank.process for rank in self.ranks)]:
                    os.kill(process, signal.SIGKILL)
        self.waits.close()
        codes = [LATE if n in late else code for n, code in enumerate(self.codes)]
        return {"codes": codes, "ranks": self.rank_codes}

    def _start(self, number: int) -> None:
        """Forks a node's torchrun."""
        node = self.nodes[number]
        process = os.fork()
        if process:
            self.agents[process] = number
            return
        said = os.open(node["said"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor in (1, 2):
            os.dup2(said, descriptor)
        self._forget()
        os.setsid()
        os.chdir(node["folder"])
        os.environ.update(node["environment"])
        os.environ[FAULT] = json.dumps({**node["inside"], "node": number})
        own = [str(HERE / "forked_rank.py"), self.path, *node["arguments"]]
        sys.argv = ["torchrun", *node["torchrun"], "--no-python", sys.executable, "-I", "-S", *own]
        _leave_with(_torchrun)

    def _hear(self, connection: Any) -> None:
        """What a rank's stand-in says: that it is there, a signal, or no more, as it is gone."""
        if connection is self.listener:
            new, _ = self.listener.accept()
            text, streams = b"", []
            while not text.endswith(b"\n"):
                part, found, _, _ = socket.recv_fds(new, 1 << 16, 2)
                text, streams = text + part, streams + list(found)
            self._fork_rank(json.loads(text), streams, new)
            return
        rank = next(rank for rank in self.ranks if rank.connection is connection)
        said = connection.recv(20)
        for number in said.split():
            os.kill(rank.process, int(number))
        if not said:
            self.waits.unregister(connection)
            os.kill(rank.process, signal.SIGKILL)

    def _fork_rank(self, order: dict[str, Any], streams: list[int], new: socket.socket) -> None:
        fault = json.loads(order["environment"].pop(FAULT))
        process = os.fork()
        if process:
            for stream in streams:
                os.close(stream)
            self.ranks.append(_Rank(fault["node"], process, new))
            self.waits.register(new, selectors.EVENT_READ)
            return
        for stream, descriptor in zip(streams, (1, 2), strict=True):
            os.dup2(stream, descriptor)
            os.close(stream)
        new.close()
        self._forget()
        os.setsid()
        os.chdir(order["folder"])
        os.environ.clear()
        os.environ.update(order["environment"])
        sys.argv = ["align.py", *order["argv"]]
        _spoil(fault, self.layer)
        from ldalign.train import align

        exits.run(align.main)

    def _forget(self) -> None:
        """Lets go, in a fork, of what is this process's alone."""
        self.waits.close()
        self.listener.close()
        for rank in self.ranks:
            rank.connection.close()

    def _act(self, now: float) -> None:
        if self.acts:
            said = "".join(
                Path(node["said"]).read_text(errors="replace")
                for node in self.nodes
                if Path(node["said"]).exists()
            )
            for act in [act for act in self.acts if act["line"] in said]:
                self.acts.remove(act)
                self.due.append((now + act["after"], act))
        for at, act in [*self.due]:
            agents = [process for process, n in self.agents.items() if n == act["node"]]
            ranks = [rank.process for rank in self.ranks if rank.node == act["node"]]
            if now >= at and (ranks or act["to"] != "rank"):
                self.due.remove((at, act))
                if act["rank"] is not None:
                    ranks = ranks[act["rank"] : act["rank"] + 1]
                if act["to"] == "cut":
                    (Path(self.nodes[act["node"]]["folder"]) / CUT).touch()
                for process in {"rank": ranks, "torchrun": agents}.get(act["to"], ()):
                    os.kill(process, act["number"])

    def _reap(self) -> bool:
        """Takes note of what has ended; whether a torchrun has."""
        ended = False
        while self.agents or self.ranks:
            process, status = os.waitpid(-1, os.WNOHANG)
            if not process:
                break
            code = os.waitstatus_to_exitcode(status)
            if process in self.agents:
                self.codes[self.agents.pop(process)] = code
                ended = True
                continue
            rank = next(rank for rank in self.ranks if rank.process == process)
            self.ranks.remove(rank)
            self.rank_codes[rank.node].append(code)
            if rank.connection in (key.fileobj for key in self.waits.get_map().values()):
                self.waits.unregister(rank.connection)
                try:
                    rank.connection.sendall(b"%d\n" % code)
                except OSError:  # its stand-in has just been killed
                    pass
            rank.connection.close()
        return ended


def _torchrun() -> None:
    from torch.distributed.run import main

    main()


def _leave_with(main: Any) -> None:
    """Runs a command in a fork, and ends that as Python would."""
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _spoil(fault: dict[str, Any], layer: Any) -> None:
    """Does to this rank's process what is asked for, before the command begins.

    ldalign, torch: the version it has. dtype: what dtype=auto finds. clock: seconds by which its
    time of day is off. at, mode, under: of the file layer. show: (path, other): the file at the
    path has the other's content.
    """
    import torch

    import ldalign
    from ldalign.system import distributed

    if "ldalign" in fault:
        ldalign.__version__ = fault["ldalign"]
    if "torch" in fault:
        torch.__version__ = fault["torch"]
    if "dtype" in fault:
        distributed.auto_dtype = lambda device: getattr(torch, fault["dtype"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    layer.failing_files_set_clock(ctypes.c_long(fault.get("clock", 0)))
    if "mode" in fault:
        mode = MODES[fault["mode"]]
        layer.failing_files_arm(fault["under"].encode(), ctypes.c_long(fault["at"]), mode)
    if "show" in fault:
        layer.failing_files_show(*(os.path.realpath(path).encode() for path in fault["show"]))
    threading.Thread(target=_cut_when, args=(Path.cwd() / CUT,), daemon=True).start()


def _cut_when(path: Path) -> None:
    while not path.exists():
        time.sleep(0.002)
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6):
                    connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # no socket, or closed meanwhile
            pass


def _serve(library: str, path: str) -> None:
    import torch.distributed.run  # noqa: F401 (as the next)

    from ldalign.train import align  # noqa: F401 (imported once, for all trials)

    layer = ctypes.CDLL(library)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        for line in sys.stdin:
            answer = _Trial(json.loads(line), layer, listener, path).run()
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
