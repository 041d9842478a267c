"""Stages and run folders: what is finished stays, what is not is redone, what
changed is refused.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ldalign.run.folder import RunFolder
from ldalign.run.manifest import check_stage, hash_model_folder, hash_settings, run_stage
from ldalign.system import files
from ldalign.system.errors import EnvironmentProblem, InputError

PARENTS = {"data": "d1", "settings": "s1", "beta": 0.1, "seed": 3}


def writer(text: str = "hello") -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.txt").write_text(text)
        (folder / "b.bin").write_bytes(b"\x00" * 1000)

    return make


def must_not_run(folder: Path) -> None:
    raise AssertionError("the stage is done already")


def test_stage_is_made_once(tmp_path: Path) -> None:
    stage = tmp_path / "iteration_0" / "policy"
    assert run_stage(stage, PARENTS, writer())
    assert (stage / "inner" / "a.txt").read_text() == "hello"
    manifest = json.loads((stage / "manifest.json").read_text())
    assert manifest["parents"] == PARENTS
    assert set(manifest["files"]) == {"inner/a.txt", "b.bin"}
    assert manifest["files"]["b.bin"] == {
        "size": 1000,
        # sha256sum of 1000 zero bytes
        "sha256": "541b3e9daa09b20bf85fa273e5cbd3e80185aa4ec298e765db87742b70138a53",
    }
    assert not run_stage(stage, dict(reversed(PARENTS.items())), must_not_run)
    assert [path.name for path in stage.parent.iterdir()] == ["policy"]


def test_error_in_the_middle_leaves_no_stage(tmp_path: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        run_stage(tmp_path / "guide", PARENTS, fails)
    assert not (tmp_path / "guide").exists()
    assert run_stage(tmp_path / "guide", PARENTS, writer())
    assert not (tmp_path / "guide" / "half").exists()


@pytest.mark.parametrize("moment", ["make", "manifest", "rename"])
def test_killed_at_any_point_is_redone(tmp_path: Path, moment: str) -> None:
    stage = tmp_path / "guide"
    script = f"""
import os, signal
from pathlib import Path
from ldalign.run import manifest
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
def make(folder):
    (folder / "half").write_text("half")
    if {moment!r} == "make": die()
if {moment!r} == "manifest": manifest.write_text = die
if {moment!r} == "rename": Path.rename = die
manifest.run_stage(Path({str(stage)!r}), {PARENTS!r}, make)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert not stage.exists()
    assert (tmp_path / "guide.partial" / "half").exists()  # so the kill did come in the middle
    whole = moment == "rename"  # it has its manifest, and lacks the name alone
    assert run_stage(stage, PARENTS, must_not_run if whole else writer()) != whole
    assert [path.name for path in tmp_path.iterdir()] == ["guide"] and (
        stage / "half"
    ).exists() == whole
    check_stage(stage, PARENTS)


def test_a_begun_stage_is_not_gone_on_with_under_other_parents(tmp_path: Path) -> None:
    stage = tmp_path / "guide"

    def fails(folder: Path) -> None:
        (folder / "rows").write_text("1")
        raise ValueError("boom")

    def goes_on(folder: Path) -> None:
        assert (folder / "rows").read_text() == "1" and not (folder / ".tmpX1").exists()

    with pytest.raises(ValueError, match="boom"):
        run_stage(stage, PARENTS, fails, resume=True)
    (tmp_path / "guide.partial/.tmpX1").write_text("half a file of safetensors")
    with pytest.raises(
        InputError, match="guide.partial/parents.json: made from .*: beta was 0.1, now 0.2"
    ):
        run_stage(stage, {**PARENTS, "beta": 0.2}, must_not_run, resume=True)
    assert run_stage(stage, PARENTS, goes_on, resume=True)
    assert sorted(path.name for path in stage.iterdir()) == ["manifest.json", "rows"]


def test_a_stage_that_has_done_nothing_is_begun_anew_under_other_parents(tmp_path: Path) -> None:
    """What it was begun from may be what was wrong."""

    def fails(folder: Path) -> None:
        (folder / "parts").mkdir()
        (folder / "parts/x.kept").touch()
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        run_stage(tmp_path / "guide", PARENTS, fails, resume=True)
    other = {**PARENTS, "beta": 0.2}
    assert run_stage(tmp_path / "guide", other, writer(), resume=True)
    check_stage(tmp_path / "guide", other)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """Where an unfinished stage is cleared: of a link to a folder, rmtree makes an error."""
    other, stage, partial = tmp_path / "data", tmp_path / "policy", tmp_path / "policy.partial"
    run_stage(other, {}, writer())
    (partial / "checkpoint").mkdir(parents=True)
    (partial / "parents.json").write_text(json.dumps(PARENTS))
    (partial / "rows").write_text("1")
    for name in ("a.partial", "parts"):
        (partial / name).symlink_to("../data")
    assert run_stage(stage, PARENTS, lambda folder: None, resume=True)
    assert sorted(path.name for path in stage.iterdir()) == ["manifest.json", "rows"]
    partial.symlink_to("data")
    assert not run_stage(stage, PARENTS, must_not_run)
    assert not os.path.lexists(partial)
    check_stage(other)


def test_a_begun_stages_parents_may_be_no_json(tmp_path: Path) -> None:
    partial = tmp_path / "policy.partial"
    partial.mkdir()
    (partial / "rows").write_text("1")
    (partial / "parents.json").write_text("[" * 10**5)
    with pytest.raises(InputError, match=r"parents\.json: not readable; delete .*partial to begin"):
        run_stage(tmp_path / "policy", PARENTS, must_not_run, resume=True)


def test_checkpoints_without_parents_are_no_reason_to_begin_again(tmp_path: Path) -> None:
    (tmp_path / "guide.partial/checkpoint/step_00000001").mkdir(parents=True)
    with pytest.raises(InputError, match="guide.partial: holds checkpoints, but parents.json"):
        run_stage(tmp_path / "guide", PARENTS, must_not_run, resume=True)


def flip(path: Path) -> None:
    path.write_bytes(b"\x01" + path.read_bytes()[1:])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda stage: flip(stage / "b.bin"), r"guide/b.bin: damaged"),
        (
            lambda stage: (stage / "b.bin").write_bytes(b"\x00" * 999),
            r"guide/b.bin: 999 bytes, "
            r"but .* says 1000",
        ),
        (lambda stage: (stage / "inner" / "a.txt").unlink(), r"guide/inner/a.txt: missing"),
        (lambda stage: (stage / "manifest.json").unlink(), r"guide: has no manifest.json"),
        (
            lambda stage: (stage / "manifest.json").write_text(""),
            r"guide/manifest.json: damaged: Expecting value",
        ),
        (
            lambda stage: (stage / "manifest.json").write_text("[1]"),
            r"guide/manifest.json: damaged: list in place of an object",
        ),
    ],
)
def test_damage_is_noticed(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    run_stage(tmp_path / "guide", PARENTS, writer())
    damage(tmp_path / "guide")
    with pytest.raises(InputError, match=message):
        run_stage(tmp_path / "guide", PARENTS, must_not_run)


def test_manifest_cannot_point_outside(tmp_path: Path) -> None:
    run_stage(tmp_path / "guide", PARENTS, writer())
    entry = {"size": 0, "sha256": ""}
    for name in ("../secret", "/etc/passwd"):
        (tmp_path / "guide" / "manifest.json").write_text(
            json.dumps({"parents": PARENTS, "files": {name: entry}})
        )
        with pytest.raises(InputError, match="manifest.json: damaged: not a manifest"):
            check_stage(tmp_path / "guide")


OPTIMISED = """
import os, sys
from pathlib import Path
from ldalign.run.manifest import run_stage
assert False, "not under -O"
try:
    run_stage(Path(sys.argv[1]), {}, lambda folder: os.symlink(sys.argv[2], folder / "link"))
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_link_is_refused_without_assertions_too(tmp_path: Path) -> None:
    """A stage that holds a link is not finished, under python -O as well."""
    command = [sys.executable, "-O", "-c", OPTIMISED, str(tmp_path / "guide"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.startswith(f"InputError {tmp_path}/guide.partial/link: is no plain file")
    assert not (tmp_path / "guide").exists()


def test_changed_parents_are_named(tmp_path: Path) -> None:
    run_stage(tmp_path / "guide", PARENTS, writer())
    changed = {"data": "d2", "settings": "s1", "beta": 0.2, "template": "t"}
    with pytest.raises(InputError) as caught:
        run_stage(tmp_path / "guide", changed, must_not_run)
    message = str(caught.value)
    for part in (
        "beta was 0.1, now 0.2",
        "data was 'd1', now 'd2'",
        "seed was 3, now 'absent'",
        "template was 'absent'",
    ):
        assert part in message
    assert "settings" not in message
    assert f"delete {tmp_path / 'guide'}" in message and "run=NAME" in message


def test_hash_settings() -> None:
    @dataclass
    class Settings:
        rate: float
        path: Path

    first = hash_settings(Settings(0.1, Path("x")))
    assert first == hash_settings({"path": "x", "rate": 0.1})
    assert first != hash_settings({"path": "x", "rate": 0.1000000001})
    assert hash_settings([1, 2]) != hash_settings([2, 1])
    assert hash_settings([1]) != hash_settings(["1"])
    with pytest.raises(ValueError):
        hash_settings({"rate": float("nan")})
    for wrong in ({1, 2}, {1: 2}, object()):
        with pytest.raises(TypeError):
            hash_settings(wrong)


def test_hash_model_folder(tmp_path: Path) -> None:
    def hashed() -> str:
        return hash_model_folder(tmp_path)

    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"no \.safetensors"):
        hashed()
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    (tmp_path / "tokenizer.json").write_text("{}")
    seen = [hashed()]
    assert hashed() == seen[0]
    (tmp_path / "README.md").write_text("not part of the model")
    assert hashed() == seen[0]
    (tmp_path / "chat_template.jinja").write_text("x")
    seen.append(hashed())
    (tmp_path / "model.safetensors").write_bytes(b"12345679")
    # a coarse clock could give the rewrite the old time
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    seen.append(hashed())
    (tmp_path / "chat_template.jinja").rename(tmp_path / "chat_template.json")
    seen.append(hashed())
    assert len(set(seen)) == 4


def test_run_folder_records_config_and_machine(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "a" / "b", "seed: 1\n") as run:
        made = run.stage("guide", PARENTS, lambda folder: writer()(folder) or {"loss": 2.5})
        assert made["loss"] == 2.5 and made["seconds"] >= 0
        signed = (run.path / "lock").read_text()
        assert re.fullmatch(rf"host \S+ pid {os.getpid()}\n[0-9a-f]{{16}}\n", signed)
    assert (run.path / "config.yaml").read_text() == "seed: 1\n"
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.") and environment["cores"] >= 1
    with RunFolder(run.path, "seed: 2\n") as again:  # the second time it continues
        # a copy on another host's disk, of a start with this host and number, is none of this one
        assert (run.path / "lock").read_text() != signed
        assert again.stage("guide", PARENTS, must_not_run) == made
    assert (run.path / "config.yaml").read_text() == "seed: 2\n"


def test_run_folder_is_recorded_before_a_stage_is_made(tmp_path: Path) -> None:
    def make(folder: Path) -> dict[str, float]:
        names = {"config.yaml", "environment.json", "started.json", "lock", "guide.partial"}
        assert {path.name for path in tmp_path.iterdir()} == names
        return {}

    with RunFolder(tmp_path, "seed: 1\n") as run:
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        assert run.stage("guide", PARENTS, make)["seconds"] >= 0


def test_names_of_new_folders_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every folder that gets a new one is synced, from the first that was there on."""
    synced: list[str] = []
    monkeypatch.setattr(files, "sync", lambda path: synced.append(os.path.relpath(path, tmp_path)))
    files.make_folder(tmp_path / "a/b/c")
    assert synced == [".", "a", "a/b"]
    files.make_folder(tmp_path / "a/b/c")
    assert len(synced) == 3
    (tmp_path / "a/file").write_text("")
    with pytest.raises(NotADirectoryError, match="a/file/c"):
        files.make_folder(tmp_path / "a/file/c")


def test_a_stage_in_new_folders_has_their_names_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    run_stage(tmp_path / "run/iteration_0/policy", PARENTS, writer())
    for folder in (
        tmp_path,
        tmp_path / "run",
        tmp_path / "run/iteration_0",
        tmp_path / "run/iteration_0/policy",
    ):
        assert folder.stat().st_ino in synced, folder


def test_run_folder_refusals(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="file: is a file"),
        RunFolder(tmp_path / "file", ""),
    ):
        pass
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with (
        pytest.raises(InputError, match="holds something that is no run"),
        RunFolder(tmp_path / "home", ""),
    ):
        pass
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


def test_lock_names_the_live_holder_and_dies_with_it(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from ldalign.run.folder import RunFolder
with RunFolder(Path({str(tmp_path / "run")!r}), ""):
    print("ready", flush=True)
    time.sleep(20)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        with (
            pytest.raises(EnvironmentProblem, match=rf"in use by host \S+ pid {holder.pid};"),
            RunFolder(tmp_path / "run", ""),
        ):
            pass
        holder.kill()
    # the text in the file is stale now, and does not matter
    with RunFolder(tmp_path / "run", ""):
        pass


def test_full_disk_is_an_environment_problem(tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder / "big"))

    with pytest.raises(EnvironmentProblem, match="big: cannot be written: No space left on device"):
        run_stage(tmp_path / "guide", PARENTS, make)


TWO_RANKS = """
import sys, datetime, time
from pathlib import Path
import torch.distributed as dist
from ldalign.run.folder import RunFolder
from ldalign.run.manifest import run_stage
from ldalign.system.errors import LdalignError
from ldalign.system.exits import leave

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=30))

def make(partial):
    time.sleep(rank)  # rank 0 must wait for the slower one
    (partial / f"part{rank}").write_text(str(rank))

def attempt(name, work):
    try:
        print(name, work(), flush=True)
    except LdalignError as error:
        print(name, type(error).__name__, str(error).replace(str(folder), ""), flush=True)

with RunFolder(folder / "run", "seed: 1") as run:
    attempt("first", lambda: run_stage(run.path / "guide", {"data": "a"}, make))
    attempt("again", lambda: run_stage(run.path / "guide", {"data": "a"}, make))
    attempt("changed", lambda: run_stage(run.path / "guide", {"data": "b"}, make))
    dist.barrier()
    if rank == 0:
        (run.path / "guide" / "part1").write_text("2")
    attempt("damaged", lambda: run_stage(run.path / "guide", {"data": "a"}, make))
dist.destroy_process_group()
leave(0)
"""


def test_two_ranks_make_one_stage_and_fail_together(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=300)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert outputs[0] == outputs[1]
    first, again, changed, damaged = outputs[0]
    assert (first, again) == ("first True", "again False")
    assert changed.startswith(
        "changed InputError /run/guide/manifest.json: made from something else: data was 'a'"
    )
    assert damaged.startswith("damaged InputError /run/guide/part1: damaged")
    manifest = json.loads((tmp_path / "run" / "guide" / "manifest.json").read_text())
    assert set(manifest["files"]) == {"part0", "part1"}
