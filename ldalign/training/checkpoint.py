"""Checkpoints inside a training stage: a run that was cut short goes on from one,
and ends in the same bits.

`checkpoint/step_00000012/` in the stage's temporary folder: a safetensors file from every rank that
holds a part of the model (its own rows of the master weights and of the optimizer's averages), and
manifest.json, which lists size, sha256 and rows of each file, the state of the loop, and how much
of metrics.jsonl belongs to it. Everything else a step depends on (row order, learning rate,
dropout, rounding) is a function of the seed and the step. Rows are put together by their numbers,
so any number of ranks can read what any other number wrote.

A checkpoint is filled as NAME.partial, read back and compared with memory, synced and renamed by
rank 0; only then the oldest goes. Weights that are not finite are never written.

On a GPU it is filled while training goes on: the step after it waits for a copy into pinned host
memory alone, a thread writes, reads back and hashes, and a later step, when all ranks have done so,
renames it. At most one is on its way: a next one that is due, a request to stop, the end of
training and an error that all ranks have wait for it. What is lost with a process that dies
meanwhile, or with an error that one of several ranks has alone, is that one checkpoint.
"""

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldalign.system import distributed, exits, interrupt
from ldalign.system.distributed import on_all, on_rank0
from ldalign.system.errors import InputError, NumericsError
from ldalign.system.files import (
    PARTIAL,
    hash_file,
    make_folder,
    read_json,
    reading,
    remove,
    save_tensors,
    sync,
    write_text,
    writing,
)
from ldalign.system.interrupt import Stopped
from ldalign.system.memory import available_bytes, is_out_of_memory
from ldalign.training.optim import AVERAGES, Optimizer

MANIFEST = "manifest.json"
MAX_BYTES = 10**9  # of it: ten thousand ranks' rows of a large model
DAMAGED = ".damaged"  # what cannot be used is set aside under this name
State = dict[str, Any]
# What a rank holds: (the rows of a tensor, the number of the first), by its name in the file.
Held = Mapping[str, tuple[Tensor, int]]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointPlan:
    """Where a stage keeps its checkpoints, and how often it makes one. None
    of it changes the result.
    """

    folder: Path
    minutes: float | None = 10.0  # None: not by time
    steps: int | None = None  # None: not by steps
    keep: int = 2  # the newest ones


@dataclass(frozen=True)
class _Pending:
    """A checkpoint on its way to the disk; the same on all ranks but for its share."""

    path: Path
    filled: Path  # its name until it is whole
    manifest: dict[str, Any]  # as far as it is known
    share: Future[dict[str, Any] | None]  # this rank's entry of the manifest


class Checkpoints:
    """The checkpoints of one model in training. Every method is called by all
    ranks, between two steps.

    plan None: none are made; requests to stop are honoured all the same. metrics: the stage's
    metrics.jsonl. behind: they are written while training goes on; None: where it is on a GPU.
    """

    def __init__(
        self,
        plan: CheckpointPlan | None,
        model: nn.Module,
        optimizer: Optimizer,
        metrics: Path | None,
        behind: bool | None = None,
    ) -> None:
        self.plan, self.model, self.optimizer, self.metrics = plan, model, optimizer, metrics
        on_gpu = next(model.parameters()).device.type == "cuda"
        behind = on_gpu if behind is None else behind
        self.writer = ThreadPoolExecutor(1, "checkpoint") if behind else None
        self.pending: _Pending | None = None
        self.copies: dict[str, Tensor] = {}  # host memory that the writer reads of
        self.written = time.monotonic()  # the wall clock may be set back

    def resume(self) -> State | None:
        """Loads the newest sound checkpoint into model and optimizer; returns its state, with
        "step" (steps done).

        None: there is none, and the stage begins. metrics.jsonl is cut to what belongs to it. A
        damaged checkpoint is set aside with its reason; raises InputError if all are.
        """
        if self.plan is None:
            return None
        folder = self.plan.folder
        names = on_rank0(
            lambda: sorted(path.name for path in folder.glob("step_*") if _is_whole_name(path.name))
        )
        reasons: list[str] = []
        for name in reversed(names):
            path = folder / name
            problems = [p for p in on_all(partial(self._problem, path)) if p]
            if not problems:
                for reason in reasons if distributed.rank() == 0 else []:
                    log.warning("%s; going on from %s", reason, path)
                on_rank0(partial(self._settle, path, names))
                return self._load(path)
            reasons.append(problems[0])
        aside: bool = on_rank0(lambda: any(folder.glob(f"*{DAMAGED}")))
        if reasons or aside:
            raise InputError(
                f"{folder}: no checkpoint can be used: "
                f"{'; '.join(reasons) or 'all are set aside as damaged'}; bring back a copy, or "
                f"delete {folder} to begin this stage again"
            )
        on_rank0(lambda: self._cut_metrics(0))
        return None

    def after_step(self, step: int, last: bool, state: State) -> None:
        """Writes a checkpoint if one is due after `step` steps, or if any rank was asked to stop:
        then raises Stopped. Finishes the one that is on its way where all ranks have written it.

        last: no step follows, so what is due is not written: the result itself will be.
        """
        due = (
            self.plan is not None
            and not last
            and distributed.rank() == 0
            and self._due(self.plan, step)
        )
        mine = interrupt.requested()
        done = self.pending is not None and self.pending.share.done()
        asked = [mine == number for number in interrupt.SIGNALS]
        flags = torch.tensor([due, done, *asked], dtype=torch.int64)
        due, done, *asked = distributed.total(flags).tolist()
        stop = any(asked)
        if last or stop or done == distributed.world_size():
            self.finish()
        if self.plan is not None and (due or stop):
            self.begin(step, state)
        if stop:
            self.finish()
            kept = (
                (f"step {step} is finished")
                if self.plan is None
                else (f"step {step} is kept in {self.plan.folder}")
            )
            raise Stopped(next(itertools.compress(interrupt.SIGNALS, asked)), kept)

    def _due(self, plan: CheckpointPlan, step: int) -> bool:
        by_time = plan.minutes is not None and time.monotonic() - self.written >= 60 * plan.minutes
        return by_time or (plan.steps is not None and step % plan.steps == 0)

    def write(self, step: int, state: State) -> None:
        """Writes the checkpoint of `step` steps done, then lets the oldest go. Raises NumericsError
        for NaN and Inf.

        Raises EnvironmentProblem, on all ranks, where one of them cannot write; the older
        checkpoints stay.
        """
        self.begin(step, state)
        self.finish()

    def begin(self, step: int, state: State) -> None:
        """Begins to write the checkpoint of `step` steps done; the one before is finished first.
        What goes wrong is raised by `finish`: here, where there is no writer.
        """
        if self.plan is None:
            return
        self.finish()
        path = self.plan.folder / f"step_{step:08d}"
        filled = path.with_name(path.name + PARTIAL)
        if on_rank0(path.exists):  # the one that this run went on from
            return
        on_rank0(lambda: _empty(filled))
        distributed.reshard(self.model)
        # The state goes on changing; what is written is what JSON has of it anyway.
        now = json.loads(json.dumps({**state, "step": step}))
        manifest = on_rank0(lambda: self._manifest(path, now))
        if self.writer is not None:  # meanwhile the best weights that it refers to may not go
            on_rank0(lambda: write_text(filled / MANIFEST, json.dumps(manifest)))
        self.pending = _Pending(path, filled, manifest, self._begin_share(filled))
        self.written = time.monotonic()
        if self.writer is None:
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is on its way, if there is one, and gives it its name.
        Raises as `write` does.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        shares = on_all(pending.share.result)
        on_rank0(lambda: self._finish(pending, [share for share in shares if share]))

    @contextmanager
    def finished(self) -> Iterator[None]:
        """Finishes the checkpoint that is on its way where an error leaves the block, too.

        Not one that a rank of several has alone: the others would not come. What goes wrong in
        finishing is logged, and the error goes on.
        """
        try:
            yield
        except Exception as error:
            if distributed.world_size() == 1 or exits.is_of_all(error):
                try:
                    self.finish()
                except Exception as second:
                    log.warning("%s: not finished: %s", self.plan and self.plan.folder, second)
            raise

    # -------------------------------------------------------------------------------------- writing

    def _tensors(self) -> Iterator[tuple[str, Tensor, int]]:
        """(name, the rows of it that this rank holds, the number of the first) of
        every weight that is trained, and of its averages.
        """
        for name, p in self.model.named_parameters():
            if not p.requires_grad:  # as it is in the folder that it was loaded from
                continue
            first = distributed.local_rows(p)[0]
            yield f"weight/{name}", distributed.local(p).detach(), first
            for kind in AVERAGES:
                if kind in self.optimizer.state[p]:
                    yield f"{kind}/{name}", self.optimizer.state[p][kind], first

    def _manifest(self, path: Path, state: State) -> dict[str, Any]:
        """The manifest as far as it is known before anything is written; rank 0 makes it."""
        manifest: dict[str, Any] = {"state": state, "world_size": distributed.world_size()}
        if self.metrics is not None:
            with writing(path):
                self.metrics.touch()
                sync(self.metrics)
                size = self.metrics.stat().st_size
                manifest["metrics"] = {"size": size, "sha256": _hash_beginning(self.metrics, size)}
        return manifest

    def _begin_share(self, folder: Path) -> Future[dict[str, Any] | None]:
        """Writes this rank's rows, or has the writer do it from a copy of them.

        Of a model that is not sharded, rank 0 has them all; of one with copies (hybrid sharding),
        the first copy: of the other ranks the result is None.
        """
        mesh = distributed.mesh_of(self.model.parameters())
        if distributed.rank() and (mesh is None or (mesh.ndim == 2 and mesh.get_local_rank(0))):
            return _done(lambda: None)
        held = {name: (local, first) for name, local, first in self._tensors() if len(local)}
        copies = None if self.writer is None else self._copied(held)
        if self.writer is None or copies is None:
            return _done(lambda: _write_share(folder, held))
        copied = torch.cuda.Event() if torch.cuda.is_available() else None
        if copied is not None:
            copied.record()

        def work() -> dict[str, Any]:
            if copied is not None:
                copied.synchronize()
            return _write_share(folder, copies)

        return self.writer.submit(work)

    def _copied(self, held: Held) -> Held | None:
        """Copies in host memory, which a GPU may still be filling; None: there is no memory."""
        # Page-locked memory is taken at once, in powers of two, and by every process of this host.
        needed = 1.5 * sum(local.nbytes for local, _ in held.values())
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if not self.copies and processes * needed > available_bytes(torch.device("cpu")):
            return None
        try:
            for name, (local, _) in held.items():
                if name not in self.copies:
                    pinned = local.device.type == "cuda"
                    self.copies[name] = torch.empty_like(local, device="cpu", pin_memory=pinned)
                self.copies[name].copy_(local, non_blocking=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self.copies.clear()
            return None
        return {name: (self.copies[name], first) for name, (_, first) in held.items()}

    def _finish(self, pending: _Pending, shares: list[dict[str, Any]]) -> None:
        assert self.plan is not None
        path = pending.path
        with writing(path):
            manifest = {**pending.manifest, "files": shares}
            manifest["sha256"] = _digest(manifest)
            write_text(pending.filled / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            pending.filled.rename(path)
            sync(path.parent)
        whole = sorted(p for p in path.parent.glob("step_*") if _is_whole_name(p.name))
        for old in whole[: -self.plan.keep]:
            try:
                gone = old.with_name(old.name + PARTIAL)
                old.rename(gone)  # so that no half of it can be taken for a checkpoint
                shutil.rmtree(gone)
            except OSError as error:
                log.warning("%s: an old checkpoint cannot be deleted (%s)", old, error.strerror)

    # -------------------------------------------------------------------------------------- reading

    def _problem(self, path: Path) -> str | None:
        """Why the checkpoint `path` cannot be used, of what this rank looks at; None if it can."""
        try:
            manifest = _read_manifest(path)
            for number, entry in enumerate(manifest["files"]):
                file = path / entry["name"]
                size = file.stat().st_size
                if size != entry["size"]:
                    return f"{file}: {size} bytes, but {MANIFEST} says {entry['size']}"
                mine = number % distributed.world_size() == distributed.rank()
                if (mine or self._reads(entry)) and hash_file(file) != entry["sha256"]:
                    return f"{file}: damaged: its content is not what {MANIFEST} says"
            part = manifest.get("metrics")
            if self.metrics is not None and part and distributed.rank() == 0:
                if _hash_beginning(self.metrics, part["size"]) != part["sha256"]:
                    return (
                        f"{self.metrics}: its first {part['size']} bytes are not those of "
                        f"{path.name}"
                    )
        except FileNotFoundError as error:
            return f"{error.filename}: missing"
        except (
            OSError,
            ValueError,
            TypeError,
            AttributeError,
            KeyError,
            OverflowError,
            RecursionError,
        ) as error:
            return f"{path / MANIFEST}: not a readable manifest ({error})"
        return None

    def _reads(self, entry: Mapping[str, Any]) -> bool:
        """Whether this rank takes rows from a file: where there were as many ranks, of its own
        alone.
        """
        ours = ((name, first, first + len(local)) for name, local, first in self._tensors())
        rows = ((*entry["rows"].get(name, (0, 0)), low, high) for name, low, high in ours)
        return any(max(start, low) < min(stop, high) for start, stop, low, high in rows)

    def _settle(self, path: Path, names: list[str]) -> None:
        """Before going on from `path`: newer ones, which are damaged, are set aside, and their
        metrics lines go.
        """
        for newer in (path.parent / name for name in names if name > path.name):
            aside = newer.with_name(newer.name + DAMAGED)
            with suppress(OSError):
                remove(aside)
            newer.rename(aside)
        part = _read_manifest(path).get("metrics")
        self._cut_metrics(part["size"] if part else 0)

    def _cut_metrics(self, size: int) -> None:
        if self.metrics is not None and self.metrics.exists():
            with writing(self.metrics), self.metrics.open("r+b") as file:
                file.truncate(size)

    @torch.no_grad()
    def _load(self, path: Path) -> State:
        """Weights and averages from any number of files: each tensor's rows are
        where the manifest says. Raises InputError where they are not.
        """
        with reading(path, f"delete {path} to use an older one"):
            return self._read(path)

    def _read(self, path: Path) -> State:
        manifest = _read_manifest(path)
        stored = {name for entry in manifest["files"] for name in entry["rows"]}
        for name, p in self.model.named_parameters():
            local = distributed.local(p)
            for kind in AVERAGES:
                if f"{kind}/{name}" in stored:
                    self.optimizer.state[p][kind] = torch.empty_like(
                        local, dtype=self.optimizer.state_dtype
                    )
        with ExitStack() as stack:
            files = [
                (
                    entry["rows"],
                    stack.enter_context(safe_open(path / entry["name"], framework="pt")),
                )
                for entry in manifest["files"]
            ]
            for name, local, first in self._tensors():
                missing = len(local)
                for rows, file in files:
                    start, stop = rows.get(name, (0, 0))
                    low, high = max(start, first), min(stop, first + len(local))
                    if low < high:
                        local[low - first : high - first].copy_(
                            file.get_slice(name)[low - start : high - start]
                        )
                        missing -= high - low
                if missing:
                    raise InputError(
                        f"{path}: {missing} rows of {name} are missing; delete {path} to use an "
                        "older one"
                    )
        state: State = manifest["state"]
        self.optimizer.steps = state["step"]
        log.info("%s: gone on from", path)
        return state


def _done(work: Callable[[], dict[str, Any] | None]) -> Future[dict[str, Any] | None]:
    """What `work` gives or raises, as of a thread that has ended."""
    future: Future[dict[str, Any] | None] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future


def _write_share(folder: Path, held: Held) -> dict[str, Any]:
    """Writes this rank's rows and reads them back; returns the manifest's entry."""
    for name, (local, _) in held.items():
        if not bool(local.isfinite().all()):
            raise NumericsError(
                f"{folder}: {name} holds NaN or Inf; the checkpoint was not written"
            )
    path = folder / f"rank_{distributed.rank():05d}.safetensors"
    tensors = {name: local.to("cpu").contiguous() for name, (local, _) in held.items()}
    save_tensors(tensors, path)
    with safe_open(path, framework="pt") as file, writing(path):
        if any(not _same(file.get_tensor(name), tensor) for name, tensor in tensors.items()):
            raise OSError(errno.EIO, "what is read back is not what was written", str(path))
    rows = {name: [first, first + len(local)] for name, (local, first) in held.items()}
    return {
        "name": path.name,
        "size": path.stat().st_size,
        "sha256": hash_file(path),
        "rows": rows,
    }


def _is_whole_name(name: str) -> bool:
    return not name.endswith((PARTIAL, DAMAGED))


def _empty(folder: Path) -> None:
    with writing(folder):
        remove(folder)
        make_folder(folder)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit by bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    )


def _digest(manifest: dict[str, Any]) -> str:
    """sha256 of a manifest but for its own `sha256`, the same before writing and after reading."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """Raises OSError, ValueError and what else of its kind JSON that is not ours ends in."""
    manifest: dict[str, Any] = read_json(path / MANIFEST, MAX_BYTES)
    if not isinstance(manifest, dict) or manifest.get("sha256") != _digest(manifest):
        raise ValueError("its sha256 is not that of its content")
    if any(Path(entry["name"]).name != entry["name"] for entry in manifest["files"]):
        raise ValueError("a file outside the folder")
    step = manifest["state"]["step"]
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{step!r:.80} steps done")
    return manifest


def _hash_beginning(path: Path, size: int) -> str:
    """sha256 of a file's first `size` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (piece := file.read(min(size, 2**20))):
            digest.update(piece)
            size -= len(piece)
    return digest.hexdigest()
