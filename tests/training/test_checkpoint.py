"""Checkpoints: those that are written while training goes on, as on a GPU, here with a thread on a
CPU; which rank writes and reads what; and what becomes of damaged ones.
"""

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from ldalign.system import distributed, exits
from ldalign.system.errors import EnvironmentProblem, InputError, NumericsError
from ldalign.system.files import hash_file, save_tensors
from ldalign.training import checkpoint, loop, policy, validation
from ldalign.training.checkpoint import CheckpointPlan, Checkpoints
from ldalign.training.optim import make_optimizer


class Door:
    """Stands in for `save_tensors`: a write waits before it until the door is open."""

    def __init__(self) -> None:
        self.open, self.came = threading.Event(), threading.Event()

    def __call__(self, tensors: dict[str, torch.Tensor], path: Path) -> None:
        self.came.set()
        assert self.open.wait(60)
        save_tensors(tensors, path)


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch) -> Iterator[Door]:
    made = Door()
    monkeypatch.setattr(checkpoint, "save_tensors", made)
    yield made
    made.open.set()  # no writer is left waiting


def training(folder: Path, **more: Any) -> tuple[nn.Module, Checkpoints, dict[str, Any]]:
    """A model after one step, what keeps its checkpoints, one every step, and the loop's state."""
    distributed.start("cpu")
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, "adamw", 0.1)
    plan = CheckpointPlan(folder / "checkpoint", minutes=None, steps=1, keep=2)
    keeper = Checkpoints(plan, model, optimizer, folder / "metrics.jsonl", **more)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    step(model, keeper)
    return model, keeper, {"step": 1, "sums": {"loss": 1.0}}


def step(model: nn.Module, keeper: Checkpoints) -> None:
    model(torch.ones(1, 3)).sum().backward()
    keeper.optimizer.step()
    keeper.optimizer.zero_grad()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def copy(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps something else: the checkpoint gets no name, and the one before stays."""
    model, keeper, state = training(tmp_path)
    keeper.write(1, state)

    def altered(tensors: dict[str, torch.Tensor], path: Path) -> None:
        save_tensors({**tensors, "weight/bias": tensors["weight/bias"] + 1e-6}, path)

    monkeypatch.setattr(checkpoint, "save_tensors", altered)
    step(model, keeper)
    with pytest.raises(EnvironmentProblem, match="what is read back is not what was written"):
        keeper.write(2, {**state, "step": 2})
    assert [name for name in names(tmp_path) if not name.endswith(".partial")] == ["step_00000001"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, door: Door) -> None:
    """What is written is what was there at its step: weights, averages, state and metrics."""
    model, keeper, state = training(tmp_path, behind=True)
    at_step_1 = copy(model)
    mean_at_1 = next(iter(keeper.optimizer.state.values()))["mean"].clone()
    keeper.after_step(1, False, state)
    assert door.came.wait(60) and names(tmp_path) == ["step_00000001.partial"]
    step(model, keeper)
    state["sums"]["loss"] = 2.0
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    keeper.plan = CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=None, keep=2)
    keeper.after_step(2, False, state)  # it is not there yet: nothing is waited for
    assert names(tmp_path) == ["step_00000001.partial"]
    door.open.set()
    assert keeper.pending is not None
    keeper.pending.share.result(60)
    keeper.after_step(3, False, state)
    assert names(tmp_path) == ["step_00000001"] and keeper.pending is None

    model, keeper, _ = training(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert keeper.resume() == {"step": 1, "sums": {"loss": 1.0}}
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    for name, value in copy(model).items():
        assert torch.equal(value, at_step_1[name])
    mean = next(iter(keeper.optimizer.state.values()))["mean"]
    assert torch.equal(mean, mean_at_1)


def test_at_most_one_is_on_its_way(tmp_path: Path, door: Door) -> None:
    _, keeper, state = training(tmp_path, behind=True)
    keeper.after_step(1, False, state)
    assert door.came.wait(60)
    waits = threading.Thread(target=keeper.after_step, args=(2, False, state))
    waits.start()
    waits.join(0.3)
    assert waits.is_alive() and names(tmp_path) == ["step_00000001.partial"]
    door.open.set()
    waits.join(60)
    keeper.finish()
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_the_best_weights_that_it_refers_to_stay_meanwhile(tmp_path: Path, door: Door) -> None:
    _, keeper, state = training(tmp_path, behind=True)
    keeper.begin(1, state | {validation.STATE: {"best": {"step": 1}}})
    assert door.came.wait(60)
    assert validation._referred(tmp_path / "checkpoint") == {1}


def test_the_end_of_training_waits_for_it(tmp_path: Path, door: Door) -> None:
    _, keeper, state = training(tmp_path, behind=True)
    keeper.after_step(1, False, state)
    threading.Timer(0.2, door.open.set).start()
    keeper.after_step(2, True, state)
    assert names(tmp_path) == ["step_00000001"]  # and what was due at the last step is not made


def test_an_error_in_the_next_step_does_not_lose_it(
    tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Checkpoints", partial(Checkpoints, behind=True))
    accumulate, steps = policy.accumulate_gradients, [0]

    def failing(*given: Any) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 2:
            threading.Timer(0.2, door.open.set).start()
            raise RuntimeError("shapes differ")
        return accumulate(*given)

    monkeypatch.setattr(policy, "accumulate_gradients", failing)
    distributed.start("cpu")
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        policy.train(
            tiny.mistral(),
            tiny.pairs(6),
            policy.TrainSettings(epochs=1, global_batch=2, micro_tokens=99, learning_rate=1e-3),
            compute_dtype=torch.float32,
            device=torch.device("cpu"),
            seed=0,
            stage="policy",
            step0_is_reference=False,
            checkpoints=CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=1),
        )
    assert names(tmp_path) == ["step_00000001"]


def test_of_several_ranks_an_error_finishes_it_if_all_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And what goes wrong in finishing does not hide the error."""
    _, keeper, _ = training(tmp_path, behind=True)
    finished = []

    def finish() -> None:
        finished.append(True)
        raise EnvironmentProblem("no space left on device")

    monkeypatch.setattr(keeper, "finish", finish)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="of one"), keeper.finished():
        raise RuntimeError("of one")
    assert not finished
    with pytest.raises(NumericsError, match="of all"), keeper.finished():
        raise exits.of_rank(NumericsError("of all"), 1)
    assert finished and "checkpoint: not finished: no space left on device" in caplog.text


def test_what_goes_wrong_behind_is_raised_in_a_later_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older one stays, and nothing half done can be taken for a checkpoint."""
    _, keeper, state = training(tmp_path, behind=True)
    keeper.write(1, state)

    def full(tensors: object, path: Path) -> None:
        raise EnvironmentProblem(f"{path}: no space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    keeper.after_step(2, False, state)
    assert keeper.pending is not None
    with pytest.raises(EnvironmentProblem):
        keeper.pending.share.result(60)
    with pytest.raises(EnvironmentProblem, match="no space left"):
        keeper.after_step(3, False, state)
    assert names(tmp_path) == ["step_00000001", "step_00000002.partial"]


@pytest.mark.parametrize("behind", [True, False])
def test_weights_that_are_not_finite_are_never_written(tmp_path: Path, behind: bool) -> None:
    model, keeper, state = training(tmp_path, behind=behind)
    with torch.no_grad():
        next(model.parameters())[0, 1] = torch.nan
    with pytest.raises(NumericsError, match="weight/weight holds NaN or Inf"):
        keeper.write(1, state)
    assert names(tmp_path) == ["step_00000001.partial"]


def test_without_memory_for_copies_it_is_written_at_once(
    tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, keeper, state = training(tmp_path, behind=True)

    def none_left(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty_like", none_left)
    door.open.set()
    keeper.begin(1, state)
    assert keeper.pending is not None and keeper.pending.share.done()
    keeper.finish()
    assert names(tmp_path) == ["step_00000001"]


def test_a_host_without_room_for_copies_is_asked_before(
    tmp_path: Path, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page-locked memory that is too much ends the process, and raises nothing."""
    _, keeper, state = training(tmp_path, behind=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(checkpoint, "available_bytes", lambda device: 8 * 3 * (3 * 2 + 2) * 4)
    door.open.set()
    keeper.begin(1, state)
    assert keeper.pending is not None and keeper.pending.share.done() and not keeper.copies
    keeper.finish()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    keeper.write(2, state)
    assert keeper.copies and names(tmp_path) == ["step_00000001", "step_00000002"]


def test_a_rank_checks_the_files_that_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fewer ranks than go on, on hosts of which one sees a file as the others do not."""
    _, keeper, state = training(tmp_path)
    keeper.write(1, state)
    path = tmp_path / "checkpoint/step_00000001"
    (file,) = path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        problem = keeper._problem(path)
        assert problem is not None and "damaged" in problem
    monkeypatch.setattr(keeper, "_tensors", lambda: iter(()))
    assert keeper._problem(path) is None  # the other rank's matter


def test_a_checkpoint_every_ten_minutes_and_two_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default; the minutes count from the one before, or from the start."""
    assert CheckpointPlan(tmp_path) == CheckpointPlan(tmp_path, minutes=10.0, steps=None, keep=2)
    clock = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    _, keeper, state = training(tmp_path)
    keeper.plan = CheckpointPlan(tmp_path / "checkpoint")
    keeper.plan.folder.mkdir()
    for step, (seconds, expected) in enumerate(
        ((599.9, []), (0.1, [2]), (599.9, [2]), (0.1, [2, 4])), start=1
    ):
        clock[0] += seconds
        keeper.after_step(step, False, state)
        assert names(tmp_path) == [f"step_{n:08d}" for n in expected]


def test_on_a_gpu_it_is_written_behind(tmp_path: Path) -> None:
    """Unless it is said otherwise; on a CPU it is not."""
    plan = CheckpointPlan(tmp_path)
    for kind, behind, expected in (
        ("cuda", None, True),
        ("cpu", None, False),
        ("cuda", False, False),
        ("cpu", True, True),
    ):
        weight = SimpleNamespace(device=SimpleNamespace(type=kind))
        model: Any = SimpleNamespace(parameters=lambda weight=weight: iter([weight]))
        optimizer: Any = None
        keeper = Checkpoints(plan, model, optimizer, None, behind)
        assert (keeper.writer is not None) == expected


def test_the_metrics_are_on_the_disk_before_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a host that goes down could leave one that says more of them than there is."""
    _, keeper, state = training(tmp_path)
    synced: list[Path] = []
    sync, save = checkpoint.sync, checkpoint.save_tensors
    monkeypatch.setattr(checkpoint, "sync", lambda path: synced.append(path) or sync(path))
    monkeypatch.setattr(
        checkpoint, "save_tensors", lambda tensors, path: synced.append(path) or save(tensors, path)
    )
    keeper.write(1, state)
    assert synced[0] == tmp_path / "metrics.jsonl" and synced[1].suffix == ".safetensors"
    assert synced[-1] == tmp_path / "checkpoint"  # with the name that it has been given


def test_which_ranks_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 alone of what is whole on each; each rank of a model that is cut, and where there are
    copies of it those of the first copy.
    """
    _, keeper, _ = training(tmp_path)
    (tmp_path / "parts").mkdir()
    cut = SimpleNamespace(ndim=1)

    def copies(*place: int) -> SimpleNamespace:
        """A mesh of (copies, shards), as its rank at `place` sees it."""
        return SimpleNamespace(ndim=2, get_local_rank=lambda axis: place[axis])

    for rank, mesh, writes in (
        (0, None, True),
        (1, None, False),
        (0, cut, True),
        (1, cut, True),
        (0, copies(0, 0), True),
        (1, copies(0, 1), True),
        (2, copies(1, 0), False),
        (3, copies(1, 1), False),
    ):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "mesh_of", lambda tensors, mesh=mesh: mesh)
        entry = keeper._begin_share(tmp_path / "parts").result()
        assert (entry is not None) == writes
        assert entry is None or entry["name"] == f"rank_{rank:05d}.safetensors"


@pytest.mark.parametrize(
    ("rows", "reads"), [([0, 2], False), ([0, 3], True), ([3, 4], True), ([4, 6], False)]
)
def test_a_rank_reads_the_files_with_rows_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[int], reads: bool
) -> None:
    _, keeper, _ = training(tmp_path)
    mine = ("weight/a", torch.zeros(2, 5), 2)  # rows 2 and 3
    monkeypatch.setattr(keeper, "_tensors", lambda: iter([mine]))
    assert keeper._reads({"rows": {"weight/b": [0, 9], "weight/a": rows}}) == reads


def test_what_is_damaged_is_set_aside_and_older_ones_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where one of that name was set aside by an earlier start."""
    _, keeper, state = training(tmp_path)
    keeper.plan = CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=1, keep=3)
    for number in (1, 2, 3):
        keeper.write(number, state)
    kept = tmp_path / "checkpoint"
    (kept / "step_00000003/manifest.json").write_text("{}")
    (kept / "step_00000003.damaged").mkdir()
    (kept / "step_00000003.damaged/old").touch()
    caplog.set_level(logging.WARNING)
    assert keeper.resume() == {"step": 2, "sums": {"loss": 1.0}}
    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000003.damaged"]
    assert not (kept / "step_00000003.damaged/old").exists()
    (said,) = caplog.messages
    assert said.startswith(f"{kept / 'step_00000003/manifest.json'}: not a readable manifest")
    assert said.endswith(f"; going on from {kept / 'step_00000002'}")


def resealed(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a checkpoint under sums that fit, as a stranger can."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    for entry in manifest["files"]:
        file = path / entry["name"]
        entry |= {"size": file.stat().st_size, "sha256": hash_file(file)}
    manifest["sha256"] = checkpoint._digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_manifest_that_is_a_strangers(tmp_path: Path) -> None:
    """JSON too deep to be read, steps that are none, more than a checkpoint's bytes."""
    _, keeper, state = training(tmp_path)
    keeper.write(1, state)
    path = tmp_path / "checkpoint/step_00000001"
    whole = (path / "manifest.json").read_text()
    refused = r"no checkpoint can be used: .*manifest\.json: not a readable manifest"

    def elsewhere() -> None:
        """A file that is there, with fitting sums, but not in the folder."""
        (file,) = path.glob("*.safetensors")
        file.rename(path.parent / file.name)
        resealed(path, lambda manifest: manifest["files"][0].update(name=f"../{file.name}"))

    for change in (
        lambda: (path / "manifest.json").write_text("[" * 10**5),
        lambda: os.truncate(path / "manifest.json", 10**12),
        lambda: resealed(path, lambda manifest: manifest["state"].update(step="one")),
        lambda: resealed(path, lambda manifest: manifest["state"].update(step=-1)),
        elsewhere,
    ):
        (path / "manifest.json").write_text(whole)
        change()
        with pytest.raises(InputError, match=refused):
            keeper.resume()


@pytest.mark.parametrize("rows", [None, 4])
def test_weights_that_are_a_strangers(tmp_path: Path, rows: int | None) -> None:
    """No safetensors, or tensors of another shape, under fitting sums."""
    _, keeper, state = training(tmp_path)
    keeper.write(1, state)
    path = tmp_path / "checkpoint/step_00000001"
    (file,) = path.glob("*.safetensors")
    if rows is None:
        file.write_bytes(b"\xff" * 64)
    else:
        save_tensors({name: torch.zeros(rows, 7) for name in load_file(file)}, file)
    resealed(path, lambda manifest: None)
    with pytest.raises(InputError, match="step_00000001: damaged: .*; delete .* to use an older"):
        keeper.resume()


def test_where_none_can_be_used_nothing_is_lost(tmp_path: Path) -> None:
    """Said of every one, and of those that an earlier start has set aside: a stage does not begin
    anew over them. Where there was none it does, and with it the metrics.
    """
    _, keeper, state = training(tmp_path)
    for number in (1, 2):
        keeper.write(number, state)
        (tmp_path / f"checkpoint/step_{number:08d}/manifest.json").write_text("{}")
    before = names(tmp_path)
    unreadable = r"step_0000000{}/manifest\.json: not a readable manifest \(.*\)"
    expected = f": no checkpoint can be used: .*{unreadable.format(2)}; .*{unreadable.format(1)}; b"
    with pytest.raises(InputError, match=expected):
        keeper.resume()
    assert names(tmp_path) == before and (tmp_path / "metrics.jsonl").read_text()
    for name in before:
        folder = tmp_path / "checkpoint" / name
        folder.rename(folder.with_name(name + checkpoint.DAMAGED))
    with pytest.raises(InputError, match="can be used: all are set aside as damaged; bring back"):
        keeper.resume()
    for folder in (tmp_path / "checkpoint").iterdir():
        folder.rename(tmp_path / folder.name)
    assert (tmp_path / "metrics.jsonl").read_text()
    assert keeper.resume() is None and (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_averages_keep_their_own_dtype(tmp_path: Path) -> None:
    """Of bfloat16 weights they are float32, and come back to the bit."""
    distributed.start("cpu")
    model = nn.Linear(3, 2).bfloat16()
    optimizer = make_optimizer(model, "adamw", 0.1, state_dtype=torch.float32)
    plan = CheckpointPlan(tmp_path / "checkpoint", minutes=None, steps=1)
    keeper = Checkpoints(plan, model, optimizer, None)
    model(torch.full((1, 3), 0.3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    keeper.write(1, {"step": 1})
    expected = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.state}
    optimizer.state.clear()
    keeper.resume()
    for p, states in expected.items():
        for kind in ("mean", "square"):
            found = optimizer.state[p][kind]
            assert found.dtype == torch.float32 and torch.equal(found, states[kind])


def test_a_tensor_that_not_every_file_has(tmp_path: Path) -> None:
    """Of a tensor with fewer rows than there were ranks, some held none."""
    model, keeper, state = training(tmp_path)
    keeper.write(1, state)
    expected, folder = copy(model), tmp_path / "checkpoint/step_00000001"
    (file,) = folder.glob("*.safetensors")
    tensors, manifest = load_file(file), json.loads((folder / "manifest.json").read_text())
    rows, manifest["files"] = manifest["files"][0]["rows"], []
    for rank, part in enumerate(("weight", "bias")):
        held = {name: (tensors[name], rows[name][0]) for name in tensors if name.endswith(part)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            manifest["files"].append(checkpoint._write_share(folder, held))
    manifest["sha256"] = checkpoint._digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert keeper.resume() == state
    assert all(torch.equal(p, expected[name]) for name, p in copy(model).items())


def test_a_gpus_copy_is_waited_for_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the thread that writes, and by an event after the copies: training does not wait."""
    _, keeper, state = training(tmp_path, behind=True)
    done: list[str] = []
    write = checkpoint._write_share

    class Event:
        def record(self) -> None:
            done.append("recorded" if keeper.copies else "recorded too early")

        def synchronize(self) -> None:
            done.append(threading.current_thread().name.split("_")[0])

    def written(*given: Any) -> Any:
        done.append("written")
        return write(*given)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(checkpoint, "_write_share", written)
    keeper.write(1, state)
    assert done == ["recorded", "checkpoint", "written"]


def test_metrics_that_a_checkpoint_does_not_know_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All of them where it was made without; what it goes on from is said."""
    _, keeper, state = training(tmp_path)
    metrics, keeper.metrics = keeper.metrics, None
    keeper.write(1, state)
    keeper.metrics = metrics
    caplog.set_level(logging.INFO)
    assert keeper.resume() == state
    assert metrics is not None and metrics.read_bytes() == b""
    assert caplog.messages == [f"{tmp_path / 'checkpoint/step_00000001'}: gone on from"]
