"""The matrix's C rows: settings and runs that cannot work, all found before any weights."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from runs import ROOT, run_script
from toy_context import config_of, open_toy

from ldalign.models import toy, weights
from ldalign.run import dry_run, folder
from ldalign.run.folder import RunFolder
from ldalign.run.settings import RunConfig
from ldalign.system.config import load_config
from ldalign.system.errors import EnvironmentProblem, InputError
from ldalign.train import align


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "learning_rat: unknown key; did you mean learning_rate?"),
        (
            "sampling.temprature=1",
            "sampling.temprature: unknown key; did you mean sampling.temperature?",
        ),
        ("learning_rate=fast", "learning_rate: 'fast' is not a number"),
        ("learning_rate=-1", "learning_rate: -1.0 must be greater than 0"),
        ("learning_rate=nan", "learning_rate: "),
        ("beta=-0.1", "beta: -0.1 must be greater than 0"),
        ("beta=.nan", "beta: "),
        ("beta=inf", "beta: "),
        (
            "method=ldalign",
            "method: 'ldalign' is not one of ld_align, spin, dpo, sft, self_reward, rlaif; did you "
            "mean",
        ),
        ("bad_rows=ignore", "bad_rows: 'ignore' is not one of error, skip"),
        ("iterations=two", "iterations: 'two' is not an integer"),
        ("iterations=1__0", "iterations: '1__0' is not an integer"),
        ("iterations=" + "9" * 5000, "is not an integer"),
    ],
)
def test_C1_wrong_key_or_value(override: str, message: str) -> None:
    """A key is unknown or misspelt, a value of the wrong type, negative or NaN.

    Expected: one line with the key, and the nearest name where there is one.
    """
    with pytest.raises(InputError) as caught:
        load_config(RunConfig, None, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]\n",
        "data: " + "[" * 5000,
        "data: &d [*d]\n",
        "beta: !!python/object/apply:os.system [x]\n",
        'run: "\\UFFFFFFFF"\n',
        "x" * 1_100_000,
        "\0",
        "- 1\n",
    ],
    ids=["alias", "brackets", "alias of a key", "object", "escape", "large", "NUL", "list"],
)
def test_C1_hostile_yaml(text: str, tmp_path: Path) -> None:
    """The config file nests without end, asks for Python objects, or is no config at all.

    Expected: one line with the file.
    """
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=r"run\.yaml"):
        load_config(RunConfig, tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["max_new_tokens=64", "max_length=64"],
            "max_length=64; the nearest: max_length=65 or max_new_tokens=63",
        ),
        (["max_length=128"], "the nearest: max_length=257 or max_new_tokens=127"),
        (["guide.width=130", "guide.heads=4"], "guide.heads=4; the nearest: guide.width=128"),
        (
            ["policy=toy", "run=toy"],
            "run=toy: is the policy's name too; give another, run=runs/toy",
        ),
    ],
)
def test_C2_contradictions_name_the_nearest_valid_value(overrides: list[str], message: str) -> None:
    """Two keys contradict each other.

    Expected: one line with both and the nearest value that is valid.
    """
    with pytest.raises(InputError) as caught:
        load_config(RunConfig, None, overrides)
    assert message in str(caught.value)


def test_C2_what_does_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks cannot be split as shard_ranks says (a global batch needs no divisor: ragged ones
    are trained on).

    Expected: one line with the nearest number that can.
    """
    monkeypatch.setattr("ldalign.system.distributed.world_size", lambda: 8)
    from ldalign.system import distributed

    with pytest.raises(
        InputError, match="training.shard_ranks=3: 8 ranks .*training.shard_ranks=2"
    ):
        distributed.copies(3)


@pytest.mark.parametrize(
    "kind", ["file", "below a file", "other things", "name too long", "nowhere"]
)
def test_C3_run_folder_that_cannot_be(kind: str, tmp_path: Path) -> None:
    """The run folder is a file, lies below one, holds something else, has an impossible name, or is
    a link to nowhere.

    Expected: one line with the path.
    """
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    path = {
        "nowhere": "nowhere",
        "file": "file",
        "below a file": "file/run",
        "other things": "home",
        "name too long": "x" * 300,
    }[kind]
    with (
        pytest.raises((InputError, EnvironmentProblem), match=path),
        RunFolder(tmp_path / path, "seed: 1\n"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "" and len(list((tmp_path / "home").iterdir())) == 1


def test_C3_read_only() -> None:
    """The folder above the run folder is read-only.

    Expected: one line, exit code 3.
    """
    # may write anywhere: as somebody else for a moment, in a folder that all may look into
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as above:
        os.chmod(above, 0o555)
        try:
            if root:
                os.seteuid(65534)
            with (
                pytest.raises(EnvironmentProblem, match="cannot be written"),
                RunFolder(Path(above) / "run", ""),
            ):
                pass
        finally:
            if root:
                os.seteuid(0)


def test_C3_another_run_lives_there(
    tmp_path: Path, toy_run: Path, toy_cache: Path, in_process: None
) -> None:
    """The run folder holds a run with other settings.

    Expected: one line with the key, its old and its new value.
    """
    import shutil

    shutil.copytree(toy_run, tmp_path / "run")
    argv = [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        f"run={tmp_path / 'run'}",
        f"cache={toy_cache}",
    ]
    with pytest.raises(InputError, match="sft.learning_rate was 0.003, now 0.001"):
        align.main([*argv, "sft.learning_rate=1e-3"])


def test_C3_two_live_runs(tmp_path: Path) -> None:
    """A second process opens the run folder of a live one, also with --dry-run.

    Expected: one line with host and pid of the first, exit code 3.
    """
    script = f"""
from pathlib import Path
from ldalign.run.folder import RunFolder
with RunFolder(Path({str(tmp_path / "run")!r}), ""):
    print("ready", flush=True)
    input()
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        match = rf"in use by host \S+ pid {holder.pid};"
        with (
            pytest.raises(EnvironmentProblem, match=match),
            folder.RunFolder(tmp_path / "run", ""),
        ):
            pass
        with pytest.raises(EnvironmentProblem, match=match):
            dry_run.dry_run(open_toy(tmp_path), [])
        holder.kill()


def test_C3_the_lock_was_deleted(tmp_path: Path) -> None:
    """The file `lock` of a run folder is deleted; and a folder has a config.yaml, but of no run.

    Expected: the run goes on; the other folder is refused as one that holds something else.
    """
    run, other = tmp_path / "run", tmp_path / "project"
    with RunFolder(run, "seed: 1\n"):
        pass
    (run / "lock").unlink()
    assert dry_run._existing(run) == run
    with RunFolder(run, "seed: 2\n"):
        pass
    assert (run / "config.yaml").read_text() == "seed: 2\n"
    other.mkdir()
    (other / "config.yaml").write_text("mine")
    with pytest.raises(InputError, match="no run"), RunFolder(other, "seed: 1\n"):
        pass
    assert [path.name for path in other.iterdir()] == ["config.yaml"]
    assert (other / "config.yaml").read_text() == "mine"


NO_LOCKS = """
import errno, fcntl, os
def flock(file, how):
    raise OSError(errno.{name}, os.strerror(errno.{name}))
fcntl.flock = flock
"""


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_C3_a_file_system_without_locks(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process opens the run folder of a live one on a file system without locks. Then the
    first is killed; and a process of another host has the folder.

    Expected: one line with host and pid, exit code 3; a dead process's claim is taken over, another
    host's is refused with its last sign of life and the file to delete.
    """
    run, no_locks = tmp_path / "run", NO_LOCKS.format(name=name)
    script = f"""{no_locks}
from pathlib import Path
from ldalign.run.folder import RunFolder
with RunFolder(Path({str(run)!r}), ""):
    print("ready", flush=True)
    input()
"""

    def flock(file: object, how: int) -> None:
        raise OSError(getattr(errno, name), "no locks")

    monkeypatch.setattr("fcntl.flock", flock)
    command = [sys.executable, "-c", script]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
        for look in (lambda: RunFolder(run, "").__enter__(), lambda: dry_run._existing(run)):
            with pytest.raises(
                EnvironmentProblem, match=rf"run/claim: .* in use by host \S+ pid {holder.pid};"
            ):
                look()
        holder.kill()
    assert dry_run._existing(run) == run
    with RunFolder(run, ""):
        assert f"pid {os.getpid()} " in (run / "claim").read_text()
    assert not (run / "claim").exists()
    (run / "claim").write_text("host elsewhere pid 1 start 1\n0\n")
    os.utime(run / "claim", (time.time() - 7200, time.time() - 7200))
    expected = "elsewhere pid 1, which gave a sign of life 2 h 0 min ago, .* delete this file"
    with pytest.raises(EnvironmentProblem, match=expected), RunFolder(run, ""):
        pass
    (run / "claim").unlink()
    with RunFolder(run, ""):
        pass


def test_exit_code_and_one_line(tmp_path: Path) -> None:
    """The command line, in a process of its own: exit code 2, one line, no run
    folder left behind.
    """
    done = run_script(
        ROOT / "train/align.py",
        "policy=toy",
        f"data={tmp_path}/none.jsonl",
        f"run={tmp_path / 'run'}",
        f"cache={tmp_path / 'cache'}",
        "--dry-run",
    )
    assert done.returncode == 2
    assert (
        done.stderr.strip().split("\n")[-1].startswith("ldalign: error: ")
        and "none.jsonl: no such" in done.stderr
    )
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("fault", ["data", "template", "shard", "guide"])
def test_faults_are_found_before_any_weights(
    fault: str,
    dry: list[str],
    tmp_path: Path,
    toy_cache: Path,
    in_process: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bad data, template, shards or guide end a run, and a dry run, before any weights are read or
    a stage is made.
    """

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "fill", no_weights)
    model = toy.write_toy_model(tmp_path / "model")
    options = [f"policy={model}"]
    if fault == "data":
        (tmp_path / "rows.jsonl").write_text("{\n")
        options.append(f"data={tmp_path / 'rows.jsonl'}")
    elif fault == "template":
        (model / "chat_template.jinja").write_text("{{ 'a' * 10**9 }}")
    elif fault == "shard":
        (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    else:
        (tmp_path / "guide").mkdir()
        options.append(f"guide={tmp_path / 'guide'}")
    config = [
        "--config",
        str(ROOT / "configs/toy.yaml"),
        f"run={tmp_path / 'run'}",
        f"cache={toy_cache}",
    ]
    with pytest.raises(
        InputError, match="rows.jsonl:1:2|SecurityError|bytes expected|guide/config.json"
    ):
        align.main([*config, *options, *dry])
    assert not list((tmp_path / "run").glob("*/manifest.json"))


@pytest.mark.parametrize("key", ["--config", "run", "policy", "data", "template", "guide"])
@pytest.mark.parametrize("target", ["loop", "gone"])
def test_C3_a_link_that_leads_nowhere(
    target: str, key: str, tmp_path: Path, toy_cache: Path, in_process: None
) -> None:
    """A name on the command line is a link to itself, or to what is not there, and no UTF-8.

    Expected: one line with the name, exit code 2 (3 where the folder cannot be made).
    """
    link = tmp_path / os.fsdecode(b"caf\xe9")
    link.symlink_to(link.name if target == "loop" else tmp_path / "gone")
    given = {"--config": str(ROOT / "configs/toy.yaml"), "run": str(tmp_path / "run")}
    given |= {"policy": str(toy.write_toy_model(tmp_path / "model")), key: str(link)}
    arguments = [f"{name}={value}" for name, value in given.items()]
    with pytest.raises((InputError, EnvironmentProblem), match="caf") as refused:
        align.main([*arguments, f"cache={toy_cache}", *["--dry-run"] * (key != "run")])
    assert "\n" not in str(refused.value) and not (tmp_path / "gone").exists()


def test_dry_run_knows_a_run_whose_data_changed(tmp_path: Path) -> None:
    """--dry-run in the folder of a run whose data file was changed says so,
    as the run itself would.
    """
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"Say {i}.", "response": f"{i}"}) + "\n" for i in range(200))
    )
    with RunFolder(Path(config_of(tmp_path).run), "") as run:
        ctx = open_toy(tmp_path, f"data={rows}")
        assert run.path == ctx.run.path
        (run.path / "sft").mkdir()  # what was made of them
    dry_run.dry_run(open_toy(tmp_path, f"data={rows}", write=False), [])
    rows.write_text(rows.read_text().replace("Say 1", "Tell 1"))
    with pytest.raises(
        InputError,
        match=r"rows\.jsonl: changed since this run began: sha256 was "
        r"\w{64}, now \w{64};",
    ):
        open_toy(tmp_path, f"data={rows}", write=False)
