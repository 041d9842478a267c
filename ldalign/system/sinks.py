"""Where else a run's figures go, by the key `log`: TensorBoard, Weights & Biases, trackio.

Each through its own library, an extra, which is imported when it is asked for. A library may be
slow, hang, or fail in any way: it is called in a thread of its own, which takes what it is to do
out of a queue, and what it raises is said once and ends it. The run never waits for it, but for
`FINISH_SECONDS` at the end, or `STOPPED_SECONDS`.
"""

import functools
import importlib.util
import inspect
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ldalign.system.errors import EnvironmentProblem
from ldalign.system.listeners import switched_off
from ldalign.system.logs import line

SinkName = Literal["tensorboard", "wandb", "trackio"]
PROJECT = "ldalign"  # where the library's own variable (WANDB_PROJECT) does not name another
AHEAD = 10_000  # records that may wait for a sink
FINISH_SECONDS = 20.0  # that the run waits for a sink at its end
STOPPED_SECONDS = 5.0  # where it does not end well: who stops it may not wait long


def check_sinks(names: Sequence[SinkName]) -> None:
    """Raises EnvironmentProblem for a sink whose library is not installed."""
    for name in names:
        if not _is_installed(name):
            raise EnvironmentProblem(
                f"log: {name} is not installed; pip install '{name}', or leave it out of log"
            )


def _is_installed(name: str) -> bool:
    """Whether a library is there; a folder of its name, as wandb's own beside a script, is none."""
    spec = importlib.util.find_spec(name)
    return spec is not None and bool(spec.origin or spec.submodule_search_locations is None)


def open_sinks(names: Sequence[SinkName], run: Path, config: Mapping[str, Any]) -> list["Sink"]:
    """Opens the named sinks for the run folder `run`; config: the settings, as plain values."""
    return [Sink(name, functools.partial(WRITERS[name], run, config)) for name in names]


# ------------------------------------------------------------------------------------- one of them


class Writer(Protocol):
    """What is asked of a library. All of it is called in one thread; any of it may raise."""

    def record(self, stage: str, step: int | None, values: Mapping[str, float]) -> None:
        """Takes the numbers of one step, or those of a whole stage (step None)."""

    def report(self, text: str, policies: Sequence[Mapping[str, Any]]) -> None:
        """Takes the run's table: as Markdown, and the numbers of each policy by name."""

    def close(self, failed: bool) -> None:
        """Ends the run there."""


class Sink:
    """A listener (`ldalign.system.listeners`) that hands everything on to a writer's thread."""

    def __init__(self, name: str, new_writer: Callable[[], Writer]) -> None:
        self.name = f"log={name}"
        self._work: queue.Queue[Callable[[Writer], None] | None] = queue.Queue(AHEAD)
        self._off = False
        self._thread = threading.Thread(
            target=self._serve, args=(new_writer,), name=f"sink {name}", daemon=True
        )
        self._thread.start()

    def begins(self, stage: str) -> None:
        """A sink shows what a stage found, not that it began."""

    def record(self, stage: str, record: Mapping[str, Any], line: str) -> None:
        """Hands on a step's numbers."""
        values, step = _numbers(record), record.get("global_step")
        values.pop("global_step", None)
        self._hand(lambda writer: writer.record(stage, step, values))

    def ends(self, stage: str, summary: Mapping[str, float], made: bool) -> None:
        """Hands on a stage's summary, where it was made now."""
        if made:
            values = _numbers(summary)
            self._hand(lambda writer: writer.record(stage, None, values))

    def close(self, failed: bool, text: str, policies: Sequence[Mapping[str, Any]]) -> None:
        """Hands on the last things to do; `wait` waits until they are done."""

        def close(writer: Writer) -> None:
            if policies:
                writer.report(text, policies)
            writer.close(failed)

        self._hand(close)
        self._hand(None)

    def wait(self, until: float, seconds: float) -> None:
        """Waits until all is written, at most until that time of the monotonic clock; seconds: how
        long that was, for the line that says so.
        """
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._fail(TimeoutError(f"it has not taken everything in {seconds:g} s"))

    def _hand(self, work: Callable[[Writer], None] | None) -> None:
        if self._off:
            return
        try:
            self._work.put_nowait(work)
        except queue.Full:
            self._fail(TimeoutError(f"{AHEAD} records wait for it"))

    def _serve(self, new_writer: Callable[[], Writer]) -> None:
        try:
            writer = new_writer()
            while (work := self._work.get()) is not None and not self._off:
                work(writer)
        except BaseException as error:  # a library's SystemExit, too
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._off:
            self._off = True
            switched_off(self.name, error)


def finish_sinks(
    sinks: Sequence[Sink],
    failed: bool,
    text: str = "",
    policies: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Hands the run's table, where there is one, to all sinks, and waits until they have written
    everything: for all of them together not longer than for one.
    """
    seconds = STOPPED_SECONDS if failed else FINISH_SECONDS
    until = time.monotonic() + seconds
    for sink in sinks:
        sink.close(failed, text, policies)
    for sink in sinks:
        sink.wait(until, seconds)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


# ---------------------------------------------------------------------------------- the libraries


class TensorBoard:
    """Event files in RUN/tensorboard, a folder a stage, so that iterations lie over each other."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.new = run / "tensorboard", SummaryWriter
        self.whole = SummaryWriter(str(self.folder))
        self.whole.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))
        self.stages: dict[str, Any] = {}
        line(f"log=tensorboard: tensorboard --logdir {self.folder}")

    def record(self, stage: str, step: int | None, values: Mapping[str, float]) -> None:
        """As `Writer.record`."""
        if stage not in self.stages:
            # A stage that goes on replaces what an earlier start wrote from this step on.
            self.stages[stage] = self.new(str(self.folder / stage), purge_step=step)
        writer = self.stages[stage]
        for name, value in values.items():
            writer.add_scalar(name if step is not None else f"stage/{name}", value, step or 0)
        if step is None:
            self.stages.pop(stage).close()

    def report(self, text: str, policies: Sequence[Mapping[str, Any]]) -> None:
        """As `Writer.report`."""
        self.whole.add_text("report", text)

    def close(self, failed: bool) -> None:
        """As `Writer.close`."""
        for writer in (*self.stages.values(), self.whole):
            writer.close()


class WandB:
    """A run of Weights & Biases in the project WANDB_PROJECT, else `ldalign`; its own files lie in
    RUN/wandb.
    """

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import wandb

        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and not _has_key(wandb):  # or it would ask at the terminal
            raise RuntimeError(
                "no API key; run `wandb login`, set WANDB_API_KEY, or WANDB_MODE=offline"
            )
        self.wandb: Any = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.resolve().name),
            config=dict(config),
            dir=str(run),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.stages: set[str] = set()
        line(f"log=wandb: {self.run.url if online else run / 'wandb'}")

    def record(self, stage: str, step: int | None, values: Mapping[str, float]) -> None:
        """As `Writer.record`."""
        if step is None:
            self.run.summary.update({f"{stage}/{name}": v for name, v in values.items()})
            return
        axis = f"{stage}/global_step"
        if stage not in self.stages:  # every stage counts its own steps
            self.stages.add(stage)
            self.run.define_metric(axis)
            self.run.define_metric(f"{stage}/*", step_metric=axis)
        self.run.log({axis: step, **{f"{stage}/{name}": v for name, v in values.items()}})

    def report(self, text: str, policies: Sequence[Mapping[str, Any]]) -> None:
        """As `Writer.report`."""
        columns, rows = _table(policies)
        self.run.log({"report": self.wandb.Table(columns=columns, data=rows)})

    def close(self, failed: bool) -> None:
        """As `Writer.close`."""
        self.run.finish(exit_code=int(failed))
        self.wandb.teardown(exit_code=int(failed))  # its own process has written all


def _has_key(wandb: Any) -> bool:
    """Whether wandb has a key, which newer versions tell by `login` and older ones by `api`."""
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


class Trackio:
    """A run of trackio in the project TRACKIO_PROJECT, else `ldalign`."""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self.run = trackio.init(project=project, name=run.resolve().name, config=dict(config))
        line(f"log=trackio: trackio show --project {project}")

    def record(self, stage: str, step: int | None, values: Mapping[str, float]) -> None:
        """As `Writer.record`."""
        begin = stage if step is not None else f"stage/{stage}"
        self.run.log({f"{begin}/{name}": v for name, v in values.items()}, step=step or 0)

    def report(self, text: str, policies: Sequence[Mapping[str, Any]]) -> None:
        """As `Writer.report`."""
        found = {
            f"report/{policy['policy']}/{name}": value
            for policy in policies
            for name, value in _numbers(policy).items()
        }
        self.run.log(found, step=0)

    def close(self, failed: bool) -> None:
        """As `Writer.close`."""
        self.run.finish()


WRITERS: dict[str, Callable[[Path, Mapping[str, Any]], Writer]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


def _table(policies: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the run's policies: name, and every number that one of them has."""
    names = list(dict.fromkeys(name for policy in policies for name in _numbers(policy)))
    rows = [[p["policy"], *(p.get(name, math.nan) for name in names)] for p in policies]
    return ["policy", *names], rows
