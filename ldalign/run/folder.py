"""The folder of a run: its lock, its stages with their summaries, and the run's metrics.jsonl."""

import contextlib
import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ldalign.run import environment
from ldalign.run.lock import LOCK, Lock, lock, waiting_lock
from ldalign.run.manifest import MANIFEST, Parents, run_stage
from ldalign.run.plan import FIRST, LAST, PER_POLICY, stage_of
from ldalign.run.stage import Stage
from ldalign.run.stages.benchmarks import BENCHMARKS_STAGE
from ldalign.run.stages.evaluation import EVALUATION_STAGE
from ldalign.run.stranger import MAX_BYTES, read_if_there, read_object, refuse_outside
from ldalign.system import distributed
from ldalign.system.distributed import on_rank0
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.system.files import (
    PARTIAL,
    holds,
    make_folder,
    read_bounded,
    read_json,
    write_bytes,
    write_json,
    write_text,
    writing,
)
from ldalign.system.listeners import tell
from ldalign.system.memory import naming
from ldalign.system.metrics import Metrics, say

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"  # machine, commit and versions of a run
STARTED = "started.json"  # in the run folder: the day it was begun
# What helps where memory does not suffice and nothing within the stage knows better.
LOWER_IN_A_STAGE = (
    "lower training.micro_tokens, sampling.batch_rows or max_length, or use more ranks or a "
    "smaller model"
)
# What a report reads of ENVIRONMENT.
_MACHINE: dict[str, Any] = {
    "ldalign": str | None,
    "git_commit": str | None,
    "python": str,
    "packages": dict,
    "system": str,
    "cpu": str,
    "cores": int,
    "gpus": list,
    "world_size": int,
}
MAX_METRICS = 2**31  # bytes of a stage's metrics.jsonl: millions of steps
SUMMARY = "summary.json"  # in every stage folder: what a report shows of it, and its wall time


class RunFolder:
    """The folder of one run: made if absent, locked while in use, holding config.yaml and
    environment.json.

    Used as `with RunFolder(path, to_yaml(config)) as run:` by all ranks; rank 0 does the
    writing. The other files are written right before the first stage that is made, or at the
    end where all were made before: a command that is refused leaves them as they are.

    wait: until another process that has it lets go, instead of refusing. Raises InputError if
    `path` is a file, or a folder with something else in it; EnvironmentProblem if it cannot be
    written, another live process has it, or a rank on another host does not see it.
    """

    def __init__(self, path: Path, config_yaml: str, wait: bool = False) -> None:
        self.path = path
        self._config_yaml, self._wait = config_yaml, wait
        self._lock: Lock | None = None
        self._recorded = False

    def __enter__(self) -> Self:
        try:
            signature = on_rank0(self._open)
            if distributed.world_size() > 1:
                distributed.on_all(lambda: self._check_shared(signature))
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.record()
        finally:
            self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def stage(
        self, name: str, parents: Parents, make: Callable[[Path], Metrics], resume: bool = False
    ) -> Metrics:
        """Makes the stage in the folder `name` ("guide", "iteration_0/policy") of this run by
        `manifest.run_stage`.

        What `make` returns (on rank 0) and the wall time go into the stage's summary.json,
        and are returned. The run's metrics.jsonl is put together again from all stages,
        where it is not up to date.
        """

        def timed(folder: Path) -> None:
            self.record()
            tell(lambda listener: listener.begins(name))
            began = time.perf_counter()
            with naming(lambda: name, LOWER_IN_A_STAGE):
                summary = make(folder)
            seconds = round(time.perf_counter() - began, 2)
            if distributed.rank() == 0:
                write_json(folder / SUMMARY, {**summary, "seconds": seconds})

        made = run_stage(self.path / name, parents, timed, resume)
        summary = read_summary(self.path / name)
        if made:
            say(f"{name}: done ({summary['seconds']:.0f} s)")
        else:
            say(f"{name}: already done{_since(self.path / name / MANIFEST)}")
        # Also if it was done before: the run may have been killed right then.
        on_rank0(lambda: _join_metrics(self.path))
        tell(lambda listener: listener.ends(name, summary, made))
        return summary

    def settle(self, config_yaml: str) -> None:
        """Takes the settings as the data have completed them, in place of those it was made with:
        before anything is written.
        """
        self._config_yaml = config_yaml

    def record(self) -> None:
        """Writes settings, machine and date down, once; for when nothing can refuse the command any
        more. All ranks.
        """
        began = self.began
        if not self._recorded:
            on_rank0(lambda: self._write(began))
            self._recorded = True

    @functools.cached_property
    def began(self) -> date:
        """The day this run was begun, for chat templates that ask for the date; today's for a new
        run. All ranks.

        Raises InputError where it cannot be read.
        """
        return on_rank0(self._read_date)

    def _open(self) -> str:
        """Makes and locks the folder; returns what the lock says."""
        with writing(self.path):
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{self.path}: is a file; give a folder (run=NAME)")
            if self.path.is_symlink() and not self.path.exists():
                raise InputError(
                    f"{self.path}: is a link to {os.readlink(self.path)}, which is not there; make "
                    "that folder, or give another (run=NAME)"
                )
            make_folder(self.path)
            refuse_outside(self.path)
            if is_foreign(self.path):
                raise InputError(
                    f"{self.path}: holds something that is no run; give a new or empty folder "
                    "(run=NAME)"
                )
            self._lock = waiting_lock(self.path) if self._wait else lock(self.path)
            return self._lock.sign()

    def _check_shared(self, signature: str) -> None:
        """Raises EnvironmentProblem where this rank's host has another folder at the path."""
        try:
            shared = holds(self.path / LOCK, signature.encode("utf-8"))
        except OSError:
            shared = False
        if not shared:
            holder, host = signature.splitlines()[0], socket.gethostname()
            raise EnvironmentProblem(
                f"{self.path}: on {host} this is not the run folder of rank 0 ({holder}); give a "
                "folder that all hosts share (run=PATH)"
            )

    def _read_date(self) -> date:
        path = self.path / STARTED
        try:
            return date.fromisoformat(read_json(path, MAX_BYTES)["date"])
        except (FileNotFoundError, NotADirectoryError):
            return date.today()
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            raise InputError(
                f"{path}: not readable; write the day this run was begun into it again, as "
                f'{{"date": "YYYY-MM-DD"}}'
            ) from None

    def _write(self, began: date) -> None:
        if not (self.path / STARTED).is_file():  # first: prompts depend on it
            write_text(self.path / STARTED, json.dumps({"date": began.isoformat()}) + "\n")
        write_text(self.path / CONFIG, self._config_yaml)
        write_text(
            self.path / ENVIRONMENT,
            json.dumps(environment.describe_machine(), indent=1) + "\n",
        )


def _since(path: Path) -> str:
    """Says when a file was made, or nothing where its time is none of a calendar's."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return f", from {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"
    return ""


def is_foreign(path: Path) -> bool:
    """Whether a folder holds something, and that is no run: neither its lock nor, where that was
    deleted, what a run writes down of itself.
    """
    if not any(path.iterdir()) or (path / LOCK).exists():
        return False
    return not all((path / name).is_file() for name in (CONFIG, STARTED))


def stage_names(run: Path) -> list[str]:
    """The finished stages of a run folder, in the order of the method."""
    # Iteration 0 also where only its guide is there, which lies in the run folder itself.
    policies: list[str | int] = ["start", "sft", *sorted({0, *iterations(run)}), "continual_sft"]
    names = [
        *(stage.folder() for stage in FIRST),
        *(
            name
            for policy in policies
            for stage in PER_POLICY
            for name in _folders(run, stage, policy)
        ),
        *(stage.folder() for stage in LAST),
    ]
    # either: a finished stage that has lost one of them is damaged, and not passed over
    return [
        name
        for name in names
        if os.path.lexists(run / name / SUMMARY) or os.path.lexists(run / name / MANIFEST)
    ]


def _folders(run: Path, stage: Stage, policy: str | int) -> list[str]:
    """The folders that a stage has for one policy: one, or one a task."""
    name = stage.folder(policy)
    if not stage.by_task:
        return [name]
    tasks = sorted(path.name for path in run.glob(f"{name}/*") if path.suffix != PARTIAL)
    return [f"{name}/{task}" for task in tasks]


def read_summary(stage: Path) -> Metrics:
    """Reads the summary of a finished stage's folder. Raises InputError naming a damaged one."""
    again = f"delete {stage} to make it again"
    summary: Metrics = read_object(stage / SUMMARY, again)
    for key, value in summary.items():
        if not isinstance(value, int | float):
            raise InputError(f"{stage / SUMMARY}: damaged: {key} is {value!r:.80}; {again}")
    return summary


def read_machine(run: Path) -> dict[str, Any]:
    """Reads a run's environment.json; {} where it has none.

    Raises InputError naming a damaged one, which may be a stranger's: the commit in it goes into a
    command that the report shows.
    """
    again = "delete it: the run's command writes it again"
    machine = read_if_there(run / ENVIRONMENT, again)
    for key, value in machine.items():
        fits = isinstance(value, _MACHINE.get(key, object))
        if key == "git_commit" and fits:
            fits = not value or re.fullmatch(r"[0-9a-f]+(-dirty)?", value) is not None
        if key == "gpus" and fits:
            fits = all(isinstance(name, str) for name in value)
        if not fits:
            raise InputError(f"{run / ENVIRONMENT}: damaged: {key} is {value!r:.80}; {again}")
    return machine


def benchmark_summaries(run: Path) -> dict[str, Metrics]:
    """The summary of every finished benchmark of a run folder, by stage name
    (POLICY/benchmarks/TASK).
    """
    names = [name for name in stage_names(run) if stage_of(name) is BENCHMARKS_STAGE]
    return {name: read_summary(run / name) for name in names}


def shown_name(policy: str) -> str:
    """The name of a policy's folder as a reader says it: iteration_0 -> iteration 0."""
    said = {"sft": "start (after SFT)", "continual_sft": "continual SFT"}
    return said.get(policy, policy.replace("_", " "))


def iterations(run: Path) -> list[int]:
    """The numbers of the iterations in a run folder."""
    numbers = (path.name.removeprefix("iteration_") for path in run.glob("iteration_*"))
    return sorted(int(n) for n in numbers if n.isdecimal())


def _join_metrics(run: Path) -> None:
    """metrics.jsonl of the run: every stage's own lines, then its summary as one line (evaluation:
    prefix eval_).
    """
    lines: list[str] = []
    for name in stage_names(run):
        path = run / name / "metrics.jsonl"
        lines += [_stage_lines(path)] if path.is_file() else []
        prefix = "eval_" if stage_of(name) is EVALUATION_STAGE else ""
        summary = read_summary(run / name)
        record = {"stage": name, **{f"{prefix}{key}": value for key, value in summary.items()}}
        lines.append(json.dumps(record) + "\n")
    path, content = run / "metrics.jsonl", "".join(lines).encode("utf-8")
    if not holds(path, content):
        write_bytes(path, content)


def _stage_lines(path: Path) -> str:
    try:
        return read_bounded(path, MAX_METRICS).decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {error.start})"
    except ValueError as error:
        problem = str(error)
    raise InputError(f"{path}: damaged: {problem}; delete {path.parent} to make it again")
